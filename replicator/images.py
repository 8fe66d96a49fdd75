"""The disk images of a replica: made, opened, and hashed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from fusedisk.direct import read_into
from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from replicator.files import Files
from replicator.manifest import PRIVATE_DIRECTORY, Manifest, ReplicaDisk, write_manifest

_IO_BYTES = 1 << 20


class HashSegment(NamedTuple):
    """A range of a disk in bytes: all zeros (a hole), or one 16-byte digest for each block."""

    offset: int
    length: int
    zero: bool
    digests: bytes


def _open_image(path: Path, size: int) -> int:
    try:
        # A symbolic link could lead writes out of the store; a FIFO could block the open.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise FuseDiskError(
            f"image {path} is missing; put it back, or replicate under another name"
        ) from None
    except OSError as error:
        raise FuseDiskError(f"cannot open image {path}: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FuseDiskError(f"image {path} is not a regular file; move it away")
    if status.st_size != size:
        os.close(fd)
        raise FuseDiskError(
            f"image {path} has {status.st_size} bytes but the disk has {size}; restore the image, "
            "or replicate under another name"
        )
    return fd


def open_images(directory: Path, disks: Sequence[ReplicaDisk]) -> list[int]:
    """Open the images in the order of `disks`; FuseDiskError if one is missing or unfit."""
    fds: list[int] = []
    try:
        for disk in disks:
            fds.append(_open_image(directory / disk.name, disk.size))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def create_replica(files: Files, directory: Path, manifest: Manifest) -> None:
    """Make a whole replica under a private name and rename it: a crash leaves none or all of it.

    Raises FuseDiskError.
    """
    staging = directory.with_name(f".new-{directory.name}")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        files.mkdir(staging)
        files.mkdir(staging / PRIVATE_DIRECTORY)
        for disk in manifest.disks:
            fd = files.create(staging / disk.name)
            try:
                files.truncate(fd, disk.size)
                files.sync(fd)
            finally:
                os.close(fd)
        write_manifest(files, staging, manifest)
        files.sync_directory(staging)
        # Succeeds over an empty directory and over nothing, never over somebody's files.
        files.rename(staging, directory)
        files.sync_directory(directory.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise FuseDiskError(f"cannot create replica {directory}: {error.strerror}") from error


def hash_segments(
    fd: int, offset: int, length: int, seed: int, block: int
) -> Iterator[HashSegment]:
    """Hash a range with xxh3-128 and `seed`, per `block` bytes; holes are not read.

    Raises OSError.
    """
    end = offset + length
    position = offset
    for start, stop in block_runs(fd, offset, end, block):
        if start > position:
            yield HashSegment(position, start - position, True, b"")
        yield HashSegment(start, stop - start, False, _digests(fd, start, stop, seed, block))
        position = stop
    if end > position:
        yield HashSegment(position, end - position, True, b"")


def block_runs(fd: int, start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) runs of whole blocks that hold any data, merged where they touch."""
    pending: tuple[int, int] | None = None
    for offset, length in data_extents(fd, start, end):
        first = offset // block * block
        stop = min(-(-(offset + length) // block) * block, end)
        if pending is not None and first <= pending[1]:
            pending = (pending[0], stop)
            continue
        if pending is not None:
            yield pending
        pending = (first, stop)
    if pending is not None:
        yield pending


def _digests(fd: int, start: int, stop: int, seed: int, block: int) -> bytes:
    digests = bytearray()
    for base in range(start, stop, max(block, _IO_BYTES)):
        data = memoryview(bytearray(min(max(block, _IO_BYTES), stop - base)))
        read_into(fd, data, base)
        for at in range(0, len(data), block):
            digests += xxhash.xxh3_128_digest(data[at : at + block], seed)
    return bytes(digests)
