"""Backing images: opening, exclusive use, and whether one changed while it was not mounted."""

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from fusedisk.direct import alignment, read_into
from fusedisk.errors import FuseDiskError

# The lock bytes of QEMU (block/file-posix.c): RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE, plus the
# number of a BLK_PERM_* bit (include/block/block-common.h).
_PERM_BASE, _UNSHARED_BASE = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = "hhqqi4x"

DISK_BYTES_MIN = 512
# The smallest chunk of a change map, so that no block lies in two.
_ALIGNMENT_MAX = 4096


@dataclass(frozen=True)
class Image:
    """An opened backing image; its descriptor carries the locks and is closed by the owner."""

    name: str
    path: Path
    fd: int
    size: int


def open_image(path: Path, *, read_only: bool, cache: str = "writeback") -> Image:
    """Open an image or block device and lock it against QEMU and other mounts of ours.

    With ``cache`` "none" its descriptor takes direct I/O alone. Raises FuseDiskError when it is
    missing, unreadable, too small, in use, or cannot be used in that way.
    """
    name = path.name
    path = Path(os.path.realpath(path))
    _check_name(name)
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise FuseDiskError(f"{path} is neither a file nor a block device; name a raw image")
        # O_EXCL claims a block device: a file system on it cannot be mounted beside us.
        claim = os.O_EXCL if stat.S_ISBLK(mode) and not read_only else 0
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | claim)
    except OSError as error:
        hint = "; stop what uses it" if error.errno == errno.EBUSY else ""
        raise FuseDiskError(f"cannot open image {path}: {error.strerror}{hint}") from None
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        if size < DISK_BYTES_MIN:
            raise FuseDiskError(
                f"image {path} has {size} bytes; a disk needs at least {DISK_BYTES_MIN}, "
                "use --create SIZE for a new one"
            )
        _lock(fd, path, read_only=read_only)
        if cache == "none":
            _pass_the_page_cache(fd, path, size)
    except BaseException:
        os.close(fd)
        raise
    keep_pages_small(fd)
    # What others left in the page cache may be large; it comes back as it is needed.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return Image(name, path, fd, size)


def _pass_the_page_cache(fd: int, path: Path, size: int) -> None:
    """Let a descriptor and its duplicates do direct I/O. Raises FuseDiskError."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        needed = alignment(fd)
        # Invariant: what is dirty in the cache is on disk before anybody writes past the cache.
        os.fsync(fd)
        read_into(fd, bytearray(DISK_BYTES_MIN), 0)
    except OSError as error:
        raise FuseDiskError(
            f"image {path} cannot be used without the page cache ({error.strerror}); "
            "leave out --cache none"
        ) from None
    if needed > _ALIGNMENT_MAX or size % needed:
        raise FuseDiskError(
            f"image {path} of {size} bytes needs I/O in blocks of {needed}; leave out --cache none"
        )


def keep_pages_small(fd: int) -> None:
    """Turn off the kernel's readahead for a descriptor of an image.

    Readahead fills the page cache with folios of up to 2 MiB. ext4 then walks all blocks of a folio
    for each write of 4 KiB into it (kernel: fs/buffer.c), which makes the write ten times as slow.
    Without it folios are single pages. Guests read ahead by themselves.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def create_image(path: Path, size: int) -> None:
    """Make a sparse image. Raises FuseDiskError; an existing file is never touched."""
    if size < DISK_BYTES_MIN:
        raise FuseDiskError(f"--create {size}: a disk needs at least {DISK_BYTES_MIN} bytes")
    try:
        with path.open("xb") as file:
            try:
                file.truncate(size)
                os.fsync(file.fileno())
            except BaseException:
                path.unlink()
                raise
    except OSError as error:
        raise FuseDiskError(f"cannot create image {path}: {error.strerror}") from None


def _check_name(name: str) -> None:
    fits = len(os.fsencode(name)) <= 200 and name.isprintable()
    if not name or not fits or name.startswith(".fusedisk"):
        raise FuseDiskError(f"image name {name!r} cannot be a disk's name; rename the image")


def _lock(fd: int, path: Path, *, read_only: bool) -> None:
    """Take QEMU's lock bytes on the open file description, which every dup of ``fd`` keeps."""
    held = [_READ] if read_only else [_READ, _WRITE]
    unshared = [_WRITE, _RESIZE]
    mine = [_PERM_BASE + p for p in held] + [_UNSHARED_BASE + p for p in unshared]
    theirs = [_UNSHARED_BASE + p for p in held] + [_PERM_BASE + p for p in unshared]
    for byte in mine:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, 0, byte, 1, 0))
    for byte in theirs:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, byte, 1, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
        if answer[0] != fcntl.F_UNLCK:
            raise FuseDiskError(
                f"image {path} is in use by another mount or by QEMU; stop that first"
            )


def stamp(fd: int) -> dict[str, str | int]:
    """What changes whenever somebody else changes the image; equal stamps mean unchanged.

    A block device has no modification time: its kernel's count of written sectors stands in,
    which is worth nothing after a reboot, so the boot's identity is part of it.
    """
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return {
            "size": status.st_size,
            "inode": status.st_ino,
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
        }
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    system = Path("/sys/dev/block") / number
    try:
        return {
            "size": os.lseek(fd, 0, os.SEEK_END),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "sequence": (system / "diskseq").read_text().strip(),
            "sectors_written": int((system / "stat").read_text().split()[6]),
        }
    except (OSError, IndexError, ValueError):
        # Never equal to a stamp on disk: what cannot be proved unchanged is compared again.
        return {"size": os.lseek(fd, 0, os.SEEK_END), "unknown": os.urandom(8).hex()}
