"""What a pass reads: the chunks of a closed epoch as they were when it was closed."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import trio

from fusedisk.capture import Capture, NoCapture
from fusedisk.changemap import ChangeMap
from fusedisk.epochs import reserve
from fusedisk.errors import FuseDiskError
from replicator.source import Source

SPILL_BYTES = 1 << 30
"""Room for copies of chunks that the guest overwrites before they are read, unless set."""

_CLOSED_POLL_SECONDS = 0.001
_PLACE_POLL_SECONDS = 0.1
# Of a range, whose extents and overwritten chunks are looked at together.
_WINDOW_BYTES = 64 << 20


@dataclass
class GivenUp:
    """How many captures of a replica were given up, and why the last was; None if it was not."""

    captures: int = 0
    reason: str | None = None


class CapturedSource:
    """The disks of a source at the end of an epoch; stands in for the Source that is read from.

    What is read is to be believed only while :attr:`intact` is true afterwards. Read it in the
    order of disks and offsets, and only what :meth:`ranges` gives.
    """

    def __init__(self, source: Source, capture: Capture) -> None:
        self._source, self._capture = source, capture

    async def close_epoch(self, since: int) -> None:
        """Close the epoch and capture what was written after epoch ``since`` up to its end.

        Raises FuseDiskError when the mount is gone.
        """
        self._capture.open(since)
        while not self._capture.closed():
            self._require_mounted()
            await trio.sleep(_CLOSED_POLL_SECONDS)
        # Invariant: an epoch is closed for this very mount: the next one would give it out again.
        self._require_mounted()

    def _require_mounted(self) -> None:
        if not self._source.mounted:
            raise FuseDiskError("the mount is gone; mount it again and start again")

    @property
    def epoch(self) -> int:
        """The one that was closed."""
        return self._capture.epoch

    @property
    def intact(self) -> bool:
        """Whether the capture was not given up."""
        return self._capture.intact

    def report(self) -> dict[str, int]:
        """The ``capture`` object of the status: bytes of copies made, and room for them."""
        return {
            "epoch": self.epoch,
            "spill_bytes": self._capture.spilled_bytes,
            "spill_bytes_max": self._capture.spill_bytes_max,
        }

    def ranges(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what the capture has of whole chunks of a disk, in bytes.

        A thread's work. It is looked up while it is taken, so that no list of all is held.
        Invariant: what is asked for was not read yet. Until then a chunk stays part of the capture
        or no part of it: overwritten, it has a copy, or else the capture is not intact.
        """
        changes, size = self._source.maps[disk], self._source.record.disks[disk].size
        chunk_size = changes.chunk_size
        chunk, stop = -(-start // chunk_size), -(-end // chunk_size)
        while chunk < stop:
            runs, chunk = self._capture.runs(changes, disk, chunk, stop)
            for first, count in runs:
                yield first * chunk_size, min((first + count) * chunk_size, size)

    def data_extents(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run that may hold data. Raises OSError."""
        for at in range(start, end, _WINDOW_BYTES):
            yield from self._window(disk, at, min(at + _WINDOW_BYTES, end))

    def _window(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        changes = self._source.maps[disk]
        size = changes.chunk_size
        extents = list(self._source.data_extents(disk, start, end))
        # Looked at after the holes: what was written since may have been data, or a hole, before.
        first, last = start // size, -(-end // size)
        newer = changes.newer(first, last - first, self.epoch)
        extents += [
            (max(start, chunk * size), min(end, (chunk + 1) * size) - max(start, chunk * size))
            for chunk in newer
        ]
        yield from _united(sorted(extents))

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a byte of a disk; a thread's work. Raises OSError."""
        image = self._source.fds[disk]
        self._capture.fill(self._source.maps[disk], disk, image, buffer, offset)

    async def __aenter__(self) -> "CapturedSource":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # To free a large spill takes the filesystem a while, and nothing else is to wait for it.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._capture.close)


def unchanged(
    maps: Sequence[ChangeMap], ranges: Sequence[tuple[int, int, int]], since: int
) -> list[tuple[int, int, int]]:
    """What of ranges (disk, start, end) nobody wrote after epoch ``since``, by chunks.

    What was written since is part of the capture or of a later one, whole.
    """
    found = []
    for disk, start, end in ranges:
        size = maps[disk].chunk_size
        for chunk in range(start // size, -(-end // size)):
            if not maps[disk].newer(chunk, 1, since):
                found.append((disk, max(start, chunk * size), min(end, (chunk + 1) * size)))
    return found


def _united(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begun, reached = 0, 0
    for offset, length in extents:
        if reached and offset <= reached:
            reached = max(reached, offset + length)
            continue
        if reached:
            yield begun, reached - begun
        begun, reached = offset, offset + length
    if reached:
        yield begun, reached - begun


async def claim(source: Source, spill_bytes: int) -> CapturedSource:
    """Take a place for a capture, which :meth:`CapturedSource.close_epoch` then begins.

    ``spill_bytes`` are the room for copies; where they are not enough the capture is given up.
    Waits where too many captures are open. Raises OSError when the bound of the epochs cannot be
    written.
    """
    while True:
        # Invariant: the bound is durably beyond what a capture opens.
        await trio.to_thread.run_sync(reserve, source.state, source.control)
        chunk_size = source.record.disks[0].chunk_size
        with suppress(NoCapture):
            return CapturedSource(
                source, Capture(str(source.state), source.control, spill_bytes, chunk_size)
            )
        await trio.sleep(_PLACE_POLL_SECONDS)
