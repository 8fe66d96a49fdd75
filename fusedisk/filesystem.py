"""The FUSE namespace: a directory with one regular file per disk, and what is refused in it."""

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import pyfuse3

from fusedisk.datapath import FIRST_DISK

# Nothing but this server changes names or sizes, so the kernel may keep what it was told.
_ENTRY_SECONDS = 3600.0
_ATTRIBUTE_SECONDS = 1.0


@dataclass(frozen=True)
class NamedDisk:
    """A disk's name, its backing image, and its size in bytes."""

    name: str
    fd: int
    size: int


class DiskFilesystem(pyfuse3.Operations):
    """Names, attributes and opening. Reads and changes of disks never get here: see datapath."""

    def __init__(
        self,
        disks: Sequence[NamedDisk],
        uid: int,
        gid: int,
        mode: int,
        standing_by: Callable[[], bool] = lambda: False,
    ) -> None:
        """``standing_by``: whether another process writes to the images still."""
        super().__init__()
        self._standing_by = standing_by
        self._disks = disks
        self._uid, self._gid, self._mode = uid, gid, mode

    def _disk(self, inode: int) -> NamedDisk:
        index = inode - FIRST_DISK
        if not 0 <= index < len(self._disks):
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._disks[index]

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.entry_timeout, entry.attr_timeout = _ENTRY_SECONDS, _ATTRIBUTE_SECONDS
        if inode == pyfuse3.ROOT_INODE:
            mode = stat.S_IFDIR | self._mode | (self._mode & 0o444) >> 2
            entry.st_mode = pyfuse3.ModeT(mode)
            entry.st_nlink = 2
            return entry
        disk = self._disk(inode)
        backing = os.fstat(disk.fd)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | self._mode)
        entry.st_nlink = 1
        entry.st_size = disk.size
        entry.st_blksize = 4096
        regular = stat.S_ISREG(backing.st_mode)
        entry.st_blocks = backing.st_blocks if regular else -(-disk.size // 512)
        entry.st_atime_ns = entry.st_mtime_ns = backing.st_mtime_ns
        entry.st_ctime_ns = backing.st_ctime_ns
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: object = None
    ) -> pyfuse3.EntryAttributes:
        if parent_inode == pyfuse3.ROOT_INODE:
            for index, disk in enumerate(self._disks):
                if os.fsencode(disk.name) == name:
                    return self._attributes(FIRST_DISK + index)
            if name in (b".", b".."):
                return self._attributes(pyfuse3.ROOT_INODE)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: object,
    ) -> pyfuse3.EntryAttributes:
        current = self._attributes(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size != current.st_size:
            raise pyfuse3.FUSEError(errno.EPERM)
        if not fields.update_size:
            raise pyfuse3.FUSEError(errno.EPERM)
        return current

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        self._disk(inode)
        # The kernel leaves O_TRUNC to open instead of asking setattr, and forgets the size after.
        if flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EPERM)
        # Only this mount changes the image, so cached pages stay right across opens. Direct I/O of
        # a guest stays direct all the way: the kernel then allows its writes side by side.
        # The handle is the inode, the same in every server of this mount.
        # Of an image that others write to no page may stay in the kernel's cache.
        direct = bool(flags & os.O_DIRECT) or self._standing_by()
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(inode), direct_io=direct, keep_cache=not direct
        )

    async def flush(self, fh: int) -> None:
        self._disk(fh)

    async def release(self, fh: int) -> None:
        self._disk(fh)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Inodes live as long as the mount: there is nothing to count."""

    async def opendir(self, inode: int, ctx: object) -> int:
        if inode != pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    async def releasedir(self, fh: int) -> None:
        """Nothing is kept for an open directory."""

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for index, disk in enumerate(self._disks):
            if index < start_id:
                continue
            attributes = self._attributes(FIRST_DISK + index)
            name = pyfuse3.FileNameT(os.fsencode(disk.name))
            if not pyfuse3.readdir_reply(token, name, attributes, index + 1):
                return

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = sum(-(-disk.size // 4096) for disk in self._disks)
        data.f_files = len(self._disks)
        data.f_namemax = 255
        return data

    async def access(self, inode: int, mode: int, ctx: object) -> bool:
        return True


def _refusing(code: int) -> Callable[..., Awaitable[NoReturn]]:
    async def refuse(*_: object) -> NoReturn:
        raise pyfuse3.FUSEError(code)

    return refuse


# The set of disks is fixed by the mount command. Never ENOSYS: the kernel would stop asking for the
# whole connection.
for _name in ("create", "mkdir", "mknod", "symlink", "link", "rename", "unlink", "rmdir"):
    setattr(DiskFilesystem, _name, _refusing(errno.EPERM))
for _name in ("setxattr", "getxattr", "listxattr", "removexattr"):
    setattr(DiskFilesystem, _name, _refusing(errno.EOPNOTSUPP))
