"""Copying a recovery point out of a store, into new or existing images.

Only blocks that differ are written, so a copy that was interrupted goes on where it was when it is
run again, and an image that is nearly right costs reading alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from fusedisk.errors import FuseDiskError
from replicator.files import Files
from replicator.livepoint import LivePoint
from replicator.pointview import PointView

_BLOCK_BYTES = 1 << 20


def restore(view: PointView | LivePoint, directory: Path, advance: Callable[[int], None]) -> int:
    """Make `directory/<disk>` the disks as they were at a point; return the bytes written.

    `advance` is told of every byte of the disks twice, once copied and once verified. Raises
    FuseDiskError, with nothing changed where an image that is there does not fit.
    """
    files = Files()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / disk.name for disk in view.disks]
        for path, disk in zip(paths, view.disks, strict=True):
            check_fits(path, disk.size)
        written = 0
        fds = [opened(path, disk.size) for path, disk in zip(paths, view.disks, strict=True)]
        try:
            for number, fd in enumerate(fds):
                written += _copy(files, view, number, fd, advance)
                files.sync(fd)
            files.sync_directory(directory)
            for number, fd in enumerate(fds):
                _verify(view, number, fd, paths[number], advance)
        finally:
            for fd in fds:
                os.close(fd)
    except OSError as error:
        raise FuseDiskError(
            f"cannot restore to {directory}: {error.strerror or error}; remove the cause and run "
            "it again, it goes on where it was"
        ) from error
    return written


def check_fits(path: Path, size: int) -> None:
    """Check that an image can become a disk of ``size`` bytes. Raises FuseDiskError."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise FuseDiskError(f"{path} is not a regular file; move it away")
    if status.st_size not in (0, size):
        raise FuseDiskError(
            f"{path} has {status.st_size} bytes but the disk has {size}; move it away"
        )


def opened(path: Path, size: int) -> int:
    """Open an image, or make it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.ftruncate(fd, size)
    return fd


def _copy(
    files: Files, view: PointView | LivePoint, disk: int, fd: int, advance: Callable[[int], None]
) -> int:
    written = 0
    for start, end, is_data in _blocks(view, disk):
        if not is_data:
            files.zero(fd, start, end - start)
        else:
            data = view.read(disk, start, end - start)
            if os.pread(fd, end - start, start) != data:
                if any(data):
                    written += files.write(fd, [data], start)
                else:
                    files.zero(fd, start, end - start)
        advance(end - start)
    return written


def _verify(
    view: PointView | LivePoint, disk: int, fd: int, path: Path, advance: Callable[[int], None]
) -> None:
    """Read both again, the copy from the disk where the kernel lets go of its pages."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for start, end, _ in _blocks(view, disk):
        for at in range(start, end, _BLOCK_BYTES):
            length = min(_BLOCK_BYTES, end - at)
            want = xxhash.xxh3_128_digest(view.read(disk, at, length))
            if xxhash.xxh3_128_digest(os.pread(fd, length, at)) != want:
                raise FuseDiskError(
                    f"{path} differs from the point at byte {at} after copying; check the disk "
                    "it is on and run it again"
                )
        advance(end - start)


def _blocks(view: PointView | LivePoint, disk: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is data) covering a disk; data at most a block at a time."""
    position = 0
    for start, end in view.data(disk):
        if start > position:
            yield position, start, False
        for at in range(start, end, _BLOCK_BYTES):
            yield at, min(at + _BLOCK_BYTES, end), True
        position = end
    if position < view.disks[disk].size:
        yield position, view.disks[disk].size, False
