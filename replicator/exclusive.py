"""How much of a file's room is its own: what removing it would give back (Linux: FIEMAP)."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FIEMAP = 0xC020660B
_HEAD = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQQQLLLL")
_LAST, _SHARED = 0x1, 0x2000
_EXTENTS = 512


def exclusive_bytes(path: Path) -> int:
    """Bytes of a file's extents that no other file shares.

    All that is allocated where the filesystem cannot tell. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            return _exclusive(fd)
        except OSError:
            return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def _exclusive(fd: int) -> int:
    total, start, size = 0, 0, os.fstat(fd).st_size
    while start < size:
        buffer = bytearray(_HEAD.size + _EXTENTS * _EXTENT.size)
        _HEAD.pack_into(buffer, 0, start, size - start, 0, 0, _EXTENTS, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        count = _HEAD.unpack_from(buffer)[3]
        flags = _LAST
        for number in range(count):
            where = _HEAD.size + number * _EXTENT.size
            logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, where)
            total += 0 if flags & _SHARED else length
            start = logical + length
        if not count or flags & _LAST:
            break
    return total
