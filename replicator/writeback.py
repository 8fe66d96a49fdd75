"""Starting early to write a file, so that the disk works while the next bytes are made.

A sync at the end then finds little left to do. Nothing is durable by it: only the sync says that.
"""

from __future__ import annotations

from replicator.files import Files

_STEP_BYTES = 8 << 20


class Writeback:
    """What was written to a file and not handed to the disk yet; one thread at a time."""

    def __init__(self, files: Files, fd: int) -> None:
        """Of the file that `fd` has open for as long as this is used."""
        self._files, self._fd = files, fd
        self._low = self._high = self._bytes = 0

    def wrote(self, offset: int, length: int) -> None:
        """Take note of a write; the disk begins once there is enough of it."""
        end = offset + length
        self._low = min(self._low, offset) if self._bytes else offset
        self._high = max(self._high, end) if self._bytes else end
        self._bytes += length
        if self._bytes >= _STEP_BYTES:
            self._bytes = 0
            self._files.start_writeback(self._fd, self._low, self._high - self._low)
