"""The FUSE side of a mounted recovery point: its disks as files, read through `LivePoint`.

Not on a guest's own data path: requests go through pyfuse3 one after the other, and file I/O is in
a thread. A point is read from one thread at a time, so one lock is all there is to it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import pyfuse3
import trio

from fusedisk.datapath import FIRST_DISK
from fusedisk.errors import FuseDiskError
from fusedisk.filesystem import DiskFilesystem, NamedDisk
from replicator.livepoint import LivePoint
from replicator.scratch import Read, Room, Scratch

log = logging.getLogger("replicator.mount")
T = TypeVar("T")


class PointDisks:
    """The disks of a point, with what was written to them aside. For one thread at a time."""

    def __init__(self, point: LivePoint, folder: Path | None, room_bytes: int) -> None:
        """Writable if there is a ``folder`` for what is written.

        Takes the point over, unless it raises OSError.
        """
        self.point = point
        self.scratches: list[Scratch] = []
        if folder is None:
            return
        room = Room(room_bytes)
        try:
            for number, disk in enumerate(point.disks):
                self.scratches.append(Scratch(folder, disk.size, room, self._below(number)))
        except BaseException:
            self._drop()
            raise

    def _below(self, disk: int) -> Read:
        return lambda offset, length: self.point.read(disk, offset, length)

    def read(self, disk: int, offset: int, length: int) -> bytes:
        """A range, cut off at the disk's end. Raises OSError, FuseDiskError."""
        length = min(length, self.point.disks[disk].size - offset)
        if length <= 0:
            return b""
        if self.scratches:
            return self.scratches[disk].read(offset, length)
        return self.point.read(disk, offset, length)

    def write(self, disk: int, offset: int, data: bytes) -> int:
        """Write within the disk; how much was written. Raises OSError, FuseDiskError."""
        if not self.scratches:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        left = self.point.disks[disk].size - offset
        if left <= 0 and data:
            # What the kernel says of a block device that ends there.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.scratches[disk].write(offset, data[:left])
        return min(len(data), left)

    def close(self) -> None:
        """Let the point and what was written go."""
        self._drop()
        self.point.close()

    def _drop(self) -> None:
        for scratch in self.scratches:
            scratch.close()


class PointFilesystem(DiskFilesystem):
    """Names and attributes as those of any mount; reads and writes come here as well."""

    def __init__(self, disks: PointDisks, uid: int, gid: int) -> None:
        named = [
            NamedDisk(disk.name, disks.point.file(number), disk.size)
            for number, disk in enumerate(disks.point.disks)
        ]
        super().__init__(named, uid, gid, 0o600 if disks.scratches else 0o400)
        self._point_disks = disks
        self._turn = trio.Lock()
        self._failed = False

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """A range of a disk."""
        return await self._in_thread(self._point_disks.read, fh - FIRST_DISK, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Written aside."""
        return await self._in_thread(self._point_disks.write, fh - FIRST_DISK, off, buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """What is written is thrown away: nothing has to be durable."""

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        async with self._turn:
            try:
                return cast(T, await trio.to_thread.run_sync(work, *arguments))
            except FuseDiskError as error:
                self._say(str(error))
                raise pyfuse3.FUSEError(errno.EIO) from None
            except OSError as error:
                self._say(error.strerror or str(error))
                raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    def _say(self, reason: str) -> None:
        # Once: a guest may try again for as long as it runs.
        if not self._failed:
            self._failed = True
            log.error("a request failed: %s", reason)
