"""What is written to a view of a recovery point: kept aside, and gone with the view.

One sparse file without a name holds it at the disk's own offsets, so that nothing is left of it
however its process ends. Whole blocks only: of one that is written in part the rest is copied from
the point first.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from replicator.files import Files

BLOCK_BYTES = 4096
_ZEROS = bytes(BLOCK_BYTES)

Read = Callable[[int, int], bytes]


class Room:
    """How much all disks of a view may keep aside together, in bytes."""

    def __init__(self, limit: int) -> None:
        self._left = limit // BLOCK_BYTES

    def take(self, blocks: int) -> None:
        """Raises OSError (ENOSPC) where so much is not left; then none is taken."""
        if blocks > self._left:
            raise OSError(errno.ENOSPC, "the room for what is written to the view is used up")
        self._left -= blocks


class Scratch:
    """The changed blocks of one disk, over ``read`` of the disk below. For one thread at a time."""

    def __init__(self, folder: Path, size: int, room: Room, read: Read) -> None:
        """Raises OSError."""
        self._size, self._room, self._read = size, room, read
        self._written: set[int] = set()
        self._files = Files()
        with tempfile.TemporaryFile(dir=folder) as file:
            self.fd = os.dup(file.fileno())
        self._files.truncate(self.fd, -(-size // BLOCK_BYTES) * BLOCK_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        """Return a range as it is by now. Raises OSError, FuseDiskError."""
        parts, position, end = [], offset, offset + length
        while position < end:
            block = position // BLOCK_BYTES
            ours = block in self._written
            stop = min((block + 1) * BLOCK_BYTES, end)
            while stop < end and (stop // BLOCK_BYTES in self._written) == ours:
                stop = min(stop + BLOCK_BYTES, end)
            if ours:
                parts.append(os.pread(self.fd, stop - position, position))
            else:
                parts.append(self._read(position, stop - position))
            position = stop
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Change a range within the disk. Raises OSError, FuseDiskError; then nothing changed."""
        if not data:
            return
        end = offset + len(data)
        blocks = range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        fresh = [block for block in blocks if block not in self._written]
        # Before room is taken for it: reading may fail.
        edges = {
            block: self._below(block)
            for block in fresh
            if block * BLOCK_BYTES < offset or (block + 1) * BLOCK_BYTES > end
        }
        self._room.take(len(fresh))
        for block, content in edges.items():
            self._files.write(self.fd, [content], block * BLOCK_BYTES)
        self._files.write(self.fd, [data], offset)
        self._written.update(fresh)

    def _below(self, block: int) -> bytes:
        start = block * BLOCK_BYTES
        content = self._read(start, min(BLOCK_BYTES, self._size - start))
        return content + _ZEROS[len(content) :]

    def close(self) -> None:
        """Let go of all that was written."""
        os.close(self.fd)
