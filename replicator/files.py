"""Every operation by which a replica changes files, in one object that a test can stand in for.

A simulated disk (tests/simulated_disk.py) takes its place to lose, tear and reorder whatever was
not synced. Reading is not here: a crash does not change what a read returns.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusedisk.extents import data_extents

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_FICLONE, _FICLONERANGE = 0x40049409, 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
# What filesystems say that do not share blocks between files, or not between these two.
CANNOT_CLONE = _UNSUPPORTED | {errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOTSUP}
_ZEROS = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_SYNC_FILE_RANGE_WRITE = 2

Buffer = bytes | bytearray | memoryview


class Files:
    """The real operations. All raise OSError."""

    def create(self, path: Path) -> int:
        """Make a new empty file, open for reading and writing; nothing may be there already."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600)

    def mkdir(self, path: Path) -> None:
        """Make a directory whose parent exists."""
        path.mkdir()

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write all of the buffers one after the other at byte `offset`; return their length."""
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        start = offset
        while views:
            done = os.pwritev(fd, views, offset)
            offset += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]
        return offset - start

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a hole of a range without changing the file's size."""
        _retry_fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """Find room for a later write to a range, so that it cannot end in ENOSPC.

        Where the filesystem cannot, nothing is promised.
        """
        try:
            _retry_fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def clone(self, source: int, fd: int) -> None:
        """Make a file's content that of another, of the same size or larger, sharing its blocks."""
        fcntl.ioctl(fd, _FICLONE, source)

    def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
        """As `clone`, for a range of whole blocks; it may end with both files instead."""
        fcntl.ioctl(fd, _FICLONERANGE, _CLONE_RANGE.pack(source, offset, length, offset))

    def can_clone(self, directory: Path, fd: int) -> bool:
        """Whether files in a directory can share blocks; tried with two that have no name.

        ``fd`` is one of the filesystem that is there already.
        """
        try:
            with (
                tempfile.TemporaryFile(dir=directory) as one,
                tempfile.TemporaryFile(dir=directory) as other,
            ):
                self.clone(one.fileno(), other.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return self._refuses_to_clone_onto_itself(fd)
            if error.errno not in CANNOT_CLONE:
                raise
            return False
        return True

    def _refuses_to_clone_onto_itself(self, fd: int) -> bool:
        """Takes no room; only a filesystem that could clone looks as far as finding this wrong."""
        try:
            self.clone(fd, fd)
        except OSError as error:
            return error.errno == errno.EINVAL
        return True

    def truncate(self, fd: int, size: int) -> None:
        """Set a file's size in bytes."""
        os.ftruncate(fd, size)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Let the disk begin with what was written to a range. Says nothing of errors.

        The kernel, which does the same by itself at any time, keeps them for the next sync.
        """
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def sync(self, fd: int) -> None:
        """Make a file's content and size durable."""
        os.fsync(fd)

    def sync_directory(self, path: Path) -> None:
        """Make creations, renames and removals in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def room(self, directory: Path) -> int:
        """How many bytes the filesystem of a directory has left for us."""
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize

    def rename(self, old: Path, new: Path) -> None:
        """Move a file over `new`, or a directory over nothing or an empty directory."""
        old.rename(new)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        path.unlink()

    def zero(self, fd: int, offset: int, length: int) -> None:
        """Make a range read as zeros, as a hole where the filesystem can; holes are left alone."""
        for start, run in data_extents(fd, offset, offset + length):
            try:
                self.punch(fd, start, run)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                for at in range(start, start + run, len(_ZEROS)):
                    step = min(len(_ZEROS), start + run - at)
                    self.write(fd, [memoryview(_ZEROS)[:step]], at)


def _retry_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
