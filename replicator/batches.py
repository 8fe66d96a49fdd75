"""Reading ahead of what is sent: the next batch is read and hashed while the one before goes out.

A batch is up to 4 MiB of transfers, read in one go on a thread: to change threads costs more than
to hash a megabyte. There are never more than three, one being read, one waiting and one being sent.
What could not be read is left out of the batch and named in it.

Where a thread sends, it gets them from one that reads all of them, and no task is woken between.
"""

import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import trio

from replicator.compression import Compressor
from replicator.messages import DATA_BYTES_MAX, Data, Zero
from replicator.transfers import Readable, pieces, read_transfers

_BATCH_BYTES = 4 << 20
_PIECES_MAX = 256
_BATCHES_MAX = 3
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


class Ahead:
    """Batches between a thread that reads and one that sends."""

    def __init__(self, buffers: Sequence[mmap]) -> None:
        self._spare: queue.SimpleQueue[mmap | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        for buffer in buffers:
            self._spare.put(buffer)
        self._stopped = False
        self.ended = False
        """Whether `take` gave the last one."""

    def take(self, seconds: float) -> Batch | None:
        """The next batch; None at the end, or where there is none within so many seconds."""
        try:
            batch = self._read.get(timeout=seconds)
        except queue.Empty:
            return None
        self.ended = batch is None
        return batch

    def give_back(self, batch: Batch) -> None:
        """Let a batch's buffer be used again; its transfers are void."""
        batch.transfers.clear()
        self._spare.put(batch.buffer)

    def fill(self, prepare: Callable[[mmap], Batch]) -> None:
        """Read until a batch covers nothing or `stop` is called; a thread's work."""
        try:
            while (buffer := self._spare.get()) is not None and not self._stopped:
                batch = prepare(buffer)
                if not batch.covered:
                    return
                self._read.put(batch)
        finally:
            # Invariant: whoever waits for a batch hears of the end, for whatever reason it comes.
            self._read.put(None)

    def stop(self) -> None:
        """Read no more than what is being read."""
        self._stopped = True
        self._spare.put(None)


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

    @asynccontextmanager
    async def reading_ahead(
        self, disk: int, ranges: Iterable[tuple[int, int]], readable: Readable | None = None
    ) -> AsyncIterator[Ahead]:
        """As `reading`, all of it on one thread, for another one that sends."""
        source = readable or self._source
        parts = (piece for start, end in ranges for piece in pieces(source, disk, start, end))
        while len(self._spare) < _BATCHES_MAX:
            self._spare.append(_aligned(_BATCH_BYTES))
        ahead = Ahead(self._spare)
        self._compressor.begin()

        def prepare(buffer: mmap) -> Batch:
            return self._prepare(source, disk, parts, buffer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, ahead.fill, prepare)
            try:
                yield ahead
            finally:
                # Invariant: the thread is waited for, so that nobody uses its buffers any more.
                ahead.stop()

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
