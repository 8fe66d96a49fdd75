"""The state directory of a mount: who it is, its change maps, and whether they may be trusted.

    lock          flock held by the keeper and the server; held = mounted
    mount.json    source id, generation, disks; replaced by rename
    clean.json    the clean mark: present only after a clean unmount, removed before serving
    activity      regions that a crash of the host may have damaged (fusedisk.activityfile)
    epochs        a bound of the epoch counter (fusedisk.epochs)
    control       control word and announcements (fusedisk.changemap), made anew by each mount
    N.map         change map of disk N
    init          the kernel's INIT request, for a server that has to go on after another
    pids.json     who keeps and serves the mount, and how often the server was started again

What the next mount makes of it, also after a crash, is decided in fusedisk.preparing.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusedisk.changemap import ChangeMap, Control
from fusedisk.errors import FuseDiskError
from fusedisk.image import stamp

_EPOCHS_BEYOND = 1024


class Disk(msgspec.Struct, forbid_unknown_fields=True):
    """One disk of a mount. Sizes are bytes."""

    name: str
    path: str
    size: int
    chunk_size: int


class MountRecord(msgspec.Struct, forbid_unknown_fields=True):
    """Contents of mount.json.

    ``base``: the promotion that this generation began from, with the disks as they were then.
    """

    source_id: str
    generation: str
    mountpoint: str
    read_only: bool
    disks: list[Disk]
    base: str | None = None
    # Where and when it was mounted: the boot, and the inode of each image (0 for a device).
    boot_id: str = ""
    inodes: list[int] = []
    # Nothing was written through it yet: the images belong to a replica (fusedisk.standby).
    standby: bool = False
    # How the images are read and written: "writeback" (page cache) or "none" (O_DIRECT).
    cache: str = "writeback"
    # Why this generation began, and with it what every replica is compared for.
    reason: str | None = None


class CleanMark(msgspec.Struct, forbid_unknown_fields=True):
    """Contents of clean.json: the maps hold every write up to and including ``epoch``."""

    generation: str
    epoch: int
    stamps: list[dict[str, str | int]]


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file so that after a crash it is the old or the new one, never a mixture."""
    scratch = path.with_name(path.name + ".new")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def default_state_dir(image: Path) -> Path:
    """Beside the image; for a device node, whose directory is gone at reboot, below /var/lib."""
    image = Path(os.path.realpath(image))
    if image.is_block_device():
        return Path("/var/lib/fusedisk") / image.name
    return image.with_name(image.name + ".fusedisk")


def lock_state(directory: Path) -> int:
    """Make the directory if needed and lock it; the descriptor holds the lock.

    Raises FuseDiskError when another mount has it or it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FuseDiskError(
            f"cannot use state directory {directory}: {error.strerror}; choose one by --state-dir"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise FuseDiskError(f"state directory {directory} is in use by another mount") from None
    return fd


def locked(directory: Path) -> bool:
    """Whether a mount holds the state directory."""
    try:
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def read_mount_record(directory: Path) -> MountRecord:
    """The record of the mount. Raises FuseDiskError when it is missing or damaged."""
    try:
        return msgspec.json.decode((directory / "mount.json").read_bytes(), type=MountRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise FuseDiskError(f"{directory / 'mount.json'} is missing or damaged: {error}") from None


def record_clean(
    directory: Path, fds: Sequence[int], control: Control, maps: Sequence[ChangeMap]
) -> None:
    """Flush images and maps and publish the clean mark. Raises OSError: then there is no mark."""
    for fd in fds:
        os.fsync(fd)
    for changes in maps:
        changes.sync()
    mark = CleanMark(
        read_mount_record(directory).generation,
        # Senders may close a few more epochs before they notice the end of the mount.
        control.epoch + _EPOCHS_BEYOND,
        [stamp(fd) for fd in fds],
    )
    write_durably(directory / "clean.json", msgspec.json.encode(mark))
