"""Reading ahead of what is sent: the next batch is read and hashed while the one before goes out.

A batch is up to 4 MiB of transfers, read in one go on a thread: to change threads costs more than
to hash a megabyte. There are never more than three, one being read, one waiting and one being sent.
What could not be read is left out of the batch and named in it.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import trio

from replicator.compression import Compressor
from replicator.messages import DATA_BYTES_MAX, Data, Zero
from replicator.transfers import Readable, pieces, read_transfers

_BATCH_BYTES = 4 << 20
_PIECES_MAX = 256
# Where a read fails, it is tried again in parts of this size, so that little is left out.
_RETRY_BYTES = 64 << 10


@dataclass
class Unread:
    """A range of a disk that could not be read, and why."""

    disk: int
    start: int
    end: int
    error: OSError


COMMITTED_LATER = "the rest was sent, and the epoch is committed once these can be read"
"""What becomes of it."""


def describe(unread: Sequence[Unread], paths: Sequence[str]) -> str:
    """Half a line for a person: what cannot be read."""
    first, size = unread[0], sum(one.end - one.start for one in unread)
    return (
        f"cannot read {size} bytes of the source, the first at byte {first.start} of "
        f"{paths[first.disk]}: {first.error.strerror or first.error}"
    )


@dataclass
class Batch:
    """Transfers in order, their data in ``buffer``: ``covered`` bytes of disk, up to ``end``."""

    buffer: mmap
    covered: int = 0
    end: int = 0
    transfers: list[Data | Zero] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)


class BatchReader:
    """Reads batches from a source, in buffers that it uses again."""

    def __init__(self, source: Readable, compressor: Compressor) -> None:
        self._source, self._compressor = source, compressor
        self._spare: list[mmap] = []

    def give_back(self, batch: Batch) -> None:
        """Use a batch's buffer again; its transfers are void."""
        batch.transfers.clear()
        self._spare.append(batch.buffer)

    @asynccontextmanager
    async def reading(
        self, disk: int, ranges: Iterable[tuple[int, int]], readable: Readable | None = None
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Batch]]:
        """Batches that cover ranges (start, end) of a disk, in order; of ``readable`` if given.

        The block's errors come out in a group, as from a nursery.
        """
        source = readable or self._source
        parts = (piece for start, end in ranges for piece in pieces(source, disk, start, end))
        send, receive = trio.open_memory_channel[Batch](1)
        self._compressor.begin()
        async with trio.open_nursery() as nursery, receive:
            nursery.start_soon(self._read_all, source, disk, parts, send)
            yield receive
            nursery.cancel_scope.cancel()

    async def _read_all(
        self,
        source: Readable,
        disk: int,
        parts: Iterator[tuple[int, int, bool]],
        send: trio.MemorySendChannel[Batch],
    ) -> None:
        async with send:
            while True:
                buffer = self._spare.pop() if self._spare else _aligned(_BATCH_BYTES)
                batch = await trio.to_thread.run_sync(self._prepare, source, disk, parts, buffer)
                if not batch.covered:
                    self.give_back(batch)
                    return
                await send.send(batch)

    def _prepare(
        self,
        source: Readable,
        disk: int,
        parts: Iterator[tuple[int, int, bool]],
        buffer: mmap,
    ) -> Batch:
        batch = _read(source, disk, parts, buffer)
        batch.transfers = [
            self._compressor.pack(one) if isinstance(one, Data) else one for one in batch.transfers
        ]
        return batch


def _aligned(size: int) -> mmap:
    """Memory from the begin of a page: to read into any other takes nearly twice the time."""
    return mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)


def _read(
    source: Readable, disk: int, parts: Iterator[tuple[int, int, bool]], buffer: mmap
) -> Batch:
    batch = Batch(buffer)
    view, used = memoryview(buffer), 0
    for count, (offset, length, is_data) in enumerate(parts, 1):
        batch.covered += length
        batch.end = offset + length
        if is_data:
            used += _read_piece(batch, source, disk, offset, view[used : used + length])
        else:
            batch.transfers.append(Zero(disk, offset, length))
        if used > _BATCH_BYTES - DATA_BYTES_MAX or count == _PIECES_MAX:
            break
    return batch


def _read_piece(batch: Batch, source: Readable, disk: int, offset: int, view: memoryview) -> int:
    try:
        batch.transfers += read_transfers(source, disk, offset, view)
    except OSError as error:
        if len(view) <= _RETRY_BYTES:
            batch.unread.append(Unread(disk, offset, offset + len(view), error))
            return len(view)
        for at in range(0, len(view), _RETRY_BYTES):
            _read_piece(batch, source, disk, offset + at, view[at : at + _RETRY_BYTES])
    return len(view)
