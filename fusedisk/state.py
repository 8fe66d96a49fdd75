"""The state directory of a mount: who it is, its change maps, and whether they may be trusted.

    lock          flock held by the keeper and the server; held = mounted
    mount.json    source id, generation, disks; replaced by rename
    clean.json    the clean mark: present only after a clean unmount, removed before serving
    control       control word and announcements (fusedisk.changemap), made anew by each mount
    N.map         change map of disk N
    init          the kernel's INIT request, for a server that has to go on after another
    pids.json     who keeps and serves the mount, and how often the server was started again

A crash at any step leaves no clean mark, so the next mount begins a new generation with empty maps,
and replicas of an older generation are compared by hash.
"""

import fcntl
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusedisk.changemap import ChangeMap, Control
from fusedisk.errors import FuseDiskError
from fusedisk.image import Image, stamp

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


def prepare(
    directory: Path,
    mountpoint: Path,
    images: Sequence[Image],
    chunk_size: int,
    *,
    read_only: bool,
    base: str | None = None,
) -> str | None:
    """Decide whether the maps are trusted and leave the directory ready for the server.

    ``base`` is the promotion that the images are the unchanged disks of: a generation that is not
    of it ends there. Returns why the maps were not trusted, or None where they were or this is the
    first mount. The caller holds the lock. Afterwards no clean mark exists, durably.
    """
    disks = [Disk(i.name, str(i.path), i.size, chunk_size) for i in images]
    first = not (directory / "mount.json").exists() and not any(directory.glob("*.map"))
    old, mark, reason = _judge(directory, disks, images)
    anew = reason is not None or (base is not None and old is not None and old.base != base)
    # A sender may have closed epochs after the clean mark was taken: the counter goes beyond both.
    epoch = max(mark.epoch if mark else 0, _epoch_seen(directory)) + 1
    record = MountRecord(
        old.source_id if old else _source_id(images),
        old.generation if old and not anew else str(uuid.uuid4()),
        str(mountpoint),
        read_only,
        disks,
        base if anew or old is None else old.base,
    )
    # Invariant: the clean mark is durably gone before the first write.
    (directory / "clean.json").unlink(missing_ok=True)
    sync_directory(directory)
    if anew:
        for leftover in directory.glob("*.map"):
            leftover.unlink()
        for index, disk in enumerate(disks):
            ChangeMap.create(directory / f"{index}.map", disk.size, chunk_size).close()
    # An INIT request kept from another mount must never be given to a server of this one.
    (directory / "init").unlink(missing_ok=True)
    (directory / "control").unlink(missing_ok=True)
    Control.create(directory / "control", epoch).close()
    write_durably(directory / "mount.json", msgspec.json.encode(record))
    # A map that begins anew with a promotion says all that changed since: nothing is lost.
    return None if first or base is not None else reason


def _judge(
    directory: Path, disks: list[Disk], images: Sequence[Image]
) -> tuple[MountRecord | None, CleanMark | None, str | None]:
    """(old record, clean mark, why the maps cannot be trusted)."""
    try:
        old = read_mount_record(directory)
    except FuseDiskError:
        return None, None, "its state was lost"
    if old.disks != disks:
        return old, None, "the disks are not the ones mounted before"
    try:
        mark = msgspec.json.decode((directory / "clean.json").read_bytes(), type=CleanMark)
    except (OSError, msgspec.MsgspecError):
        return old, None, "it was not unmounted cleanly"
    if mark.generation != old.generation or len(mark.stamps) != len(images):
        return old, None, "its clean mark belongs to another mount"
    for image, before in zip(images, mark.stamps, strict=True):
        if stamp(image.fd) != before:
            return old, mark, f"image {image.name} changed while it was not mounted"
    for index, disk in enumerate(disks):
        try:
            changes = ChangeMap(directory / f"{index}.map")
        except (OSError, ValueError):
            return old, mark, f"the change map of {disk.name} is missing or damaged"
        fits = (changes.size, changes.chunk_size) == (disk.size, disk.chunk_size)
        changes.close()
        if not fits:
            return old, mark, f"the change map of {disk.name} is of another disk"
    return old, mark, None


def _epoch_seen(directory: Path) -> int:
    """The epoch that the last mount reached, as far as it can still be read."""
    try:
        control = Control(directory / "control")
    except (OSError, ValueError):
        return 0
    epoch = control.epoch
    control.close()
    return epoch


def _source_id(images: Sequence[Image]) -> str:
    """The same for the same images on the same machine, so that lost state costs a comparison."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = os.uname().nodename
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "\n".join([machine, *(str(i.path) for i in images)])))


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
