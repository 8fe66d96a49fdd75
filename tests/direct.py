"""I/O past the kernel's cache of a mounted file, as a guest's disk has it."""

import mmap
import os
from pathlib import Path


def read_direct(disk: Path, length: int, offset: int) -> bytes:
    """Read. Raises OSError."""
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            return buffer[: os.preadv(fd, [buffer], offset)]
    finally:
        os.close(fd)


def write_direct(disk: Path, data: bytes, offset: int) -> None:
    """Write whole pages. Raises OSError."""
    fd = os.open(disk, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            assert os.pwrite(fd, buffer, offset) == len(data)
    finally:
        os.close(fd)
