"""Before a mount: decide whether the change maps may be believed, and make what a server needs.

Three verdicts: the last mount ended cleanly and nobody touched the images since; or it ended in a
crash and the activity log names what may be damaged; or nothing is believed and a new generation
begins, whose replicas are compared by hash. A crash at any step leads to one of them.
docs/crash-model.md has the order of the steps, and why.
"""

import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from fusedisk import activityfile
from fusedisk.changemap import EPOCH_MAX, ChangeMap, Control
from fusedisk.epochs import STEP, raise_bound, read_bound
from fusedisk.errors import FuseDiskError
from fusedisk.image import Image, stamp
from fusedisk.state import (
    CleanMark,
    Disk,
    MountRecord,
    read_mount_record,
    sync_directory,
    write_durably,
)


class _Verdict(NamedTuple):
    """``reason``: why the maps are not believed. ``hot``: regions in use when the host crashed."""

    old: MountRecord | None
    epoch: int
    reason: str | None = None
    hot: list[int] | None = None


def prepare(
    directory: Path,
    mountpoint: Path,
    images: Sequence[Image],
    chunk_size: int,
    *,
    read_only: bool,
    base: str | None = None,
    distrust: bool = False,
    standby: bool = False,
    cache: str = "writeback",
) -> str | None:
    """Leave the directory ready for the server, with no clean mark; the caller holds the lock.

    ``base`` is the promotion that the images are the unchanged disks of: a generation that is not
    of it ends there. Returns what the user should know of the change maps, if anything.
    ``distrust`` makes them begin anew; with ``standby`` nothing is written yet. ``cache`` is for
    those who read the images beside the server. Raises FuseDiskError.
    """
    disks = [Disk(i.name, str(i.path), i.size, chunk_size) for i in images]
    if _regions(disks) > activityfile.REGIONS_MAX:
        raise FuseDiskError("the disks of a mount may have 4 PiB together; make several mounts")
    first = not (directory / "mount.json").exists() and not any(directory.glob("*.map"))
    verdict = _judge(directory, disks, images)
    if distrust and verdict.reason is None:
        verdict = verdict._replace(reason="--distrust was given")
    if verdict.epoch > EPOCH_MAX - 2 * STEP:
        (directory / "epochs").unlink(missing_ok=True)
        verdict = verdict._replace(epoch=1, reason="its epochs are used up")
    old = verdict.old
    # A mount that stood by wrote nothing: there is nothing that its map could lack.
    first = first or (old is not None and old.standby)
    # Invariant: the images' times, which a crash may lose, do not bring a promotion back that a
    # mount has written after: only its marks can tell.
    if distrust or (verdict.reason is not None and not first and (old is None or old.base == base)):
        base = None
    born = base is not None and (old is None or old.base != base)
    # Invariant: no generation goes on where the receiver writes, whose changes no map of ours has;
    # another replica of it would never be sent them.
    believed = old is not None and verdict.reason is None and not born and not standby
    reason = old.reason if old and believed else verdict.reason
    if old is None and first:
        reason = "no earlier mount of the disks is on record"
    elif born:
        reason = "the disks are those of a replica that was promoted"
    record = MountRecord(
        old.source_id if old else _source_id(images),
        old.generation if old and believed else str(uuid.uuid4()),
        str(mountpoint),
        read_only,
        disks,
        old.base if old and believed else base,
        _boot_id(),
        [_inode(image.fd) for image in images],
        standby,
        cache,
        reason,
    )
    try:
        if not believed:
            _begin_anew(directory, disks)
        elif verdict.hot is None:
            # Invariant: the log is that of the new mount before the clean mark goes.
            activityfile.create(directory / "activity", record.generation, _regions(disks))
        else:
            _mark_doubtful(directory, disks, verdict.hot, verdict.epoch)
        _publish(directory, record, verdict.epoch)
        if not believed:
            activityfile.create(directory / "activity", record.generation, _regions(disks))
    except OSError as error:
        raise FuseDiskError(
            f"cannot write to state directory {directory}: {error.strerror}"
        ) from None
    if believed and verdict.hot is not None:
        mib = -(-sum(end - start for _, start, end in _ranges(disks, verdict.hot)) >> 20)
        return f"not unmounted cleanly: {mib} MiB that were in use will be sent again"
    # A map that begins anew with a promotion says all that changed since: nothing is lost.
    if believed or first or born or standby:
        return None
    return f"the change map is not trusted and begins anew: {verdict.reason}"


def _regions(disks: Sequence[Disk]) -> int:
    return activityfile.first_regions([disk.size for disk in disks])[-1]


def _ranges(disks: Sequence[Disk], hot: Sequence[int]) -> list[tuple[int, int, int]]:
    """(disk, start, end in bytes) of regions."""
    firsts = activityfile.first_regions([disk.size for disk in disks])
    found = []
    for index, disk in enumerate(disks):
        for region in hot:
            if firsts[index] <= region < firsts[index + 1]:
                start = (region - firsts[index]) * activityfile.REGION_BYTES
                found.append((index, start, min(start + activityfile.REGION_BYTES, disk.size)))
    return found


def _begin_anew(directory: Path, disks: Sequence[Disk]) -> None:
    # Invariant: whatever made the old maps believable is gone, durably, before they are.
    (directory / "activity").unlink(missing_ok=True)
    (directory / "clean.json").unlink(missing_ok=True)
    sync_directory(directory)
    for leftover in directory.glob("*.map"):
        leftover.unlink()
    for index, disk in enumerate(disks):
        changes = ChangeMap.create(directory / f"{index}.map", disk.size, disk.chunk_size)
        changes.sync()
        changes.close()


def _mark_doubtful(directory: Path, disks: Sequence[Disk], hot: Sequence[int], epoch: int) -> None:
    """Count what was in use as changed in ``epoch``. The regions stay on record as they are."""
    maps = [ChangeMap(directory / f"{index}.map", True) for index in range(len(disks))]
    try:
        for index, start, end in _ranges(disks, hot):
            maps[index].mark(epoch, start, end - start)
        # Not needed while they are on record; it keeps the next crash from depending on this one.
        for changes in maps:
            changes.sync()
    finally:
        for changes in maps:
            changes.close()


def _publish(directory: Path, record: MountRecord, epoch: int) -> None:
    limit = raise_bound(directory, epoch + STEP)
    # Invariant: the clean mark is durably gone before the first write.
    (directory / "clean.json").unlink(missing_ok=True)
    sync_directory(directory)
    # An INIT request kept from another mount must never be given to a server of this one.
    (directory / "init").unlink(missing_ok=True)
    (directory / "control").unlink(missing_ok=True)
    Control.create(directory / "control", epoch, limit).close()
    write_durably(directory / "mount.json", msgspec.json.encode(record))


def _judge(directory: Path, disks: list[Disk], images: Sequence[Image]) -> _Verdict:
    # A sender may have closed epochs after the clean mark was taken, or before a crash: the counter
    # goes beyond whatever is known of it.
    seen = max(_epoch_seen(directory), 0) + 1
    bound = read_bound(directory)
    beyond = max(seen, (bound or 0) + 1)
    try:
        old = read_mount_record(directory)
    except FuseDiskError:
        return _Verdict(None, beyond, "its state was lost")
    if old.standby:
        return _Verdict(old, beyond, "it only stood by")
    if old.disks != disks:
        return _Verdict(old, beyond, "the disks are not the ones mounted before")
    try:
        content = (directory / "clean.json").read_bytes()
        mark = msgspec.json.decode(content, type=CleanMark)
    except FileNotFoundError:
        return _judge_crash(directory, old, images, beyond if bound else None)
    except (OSError, msgspec.MsgspecError):
        return _Verdict(old, beyond, "its clean mark is damaged")
    reason = _clean_doubt(mark, old, images) or _map_doubt(directory, disks)
    return _Verdict(old, max(seen, mark.epoch + 1), reason)


def _clean_doubt(mark: CleanMark, old: MountRecord, images: Sequence[Image]) -> str | None:
    if mark.generation != old.generation or len(mark.stamps) != len(images):
        return "its clean mark belongs to another mount"
    for image, before in zip(images, mark.stamps, strict=True):
        if stamp(image.fd) != before:
            return f"image {image.name} changed while it was not mounted"
    return None


def _map_doubt(directory: Path, disks: Sequence[Disk]) -> str | None:
    for index, disk in enumerate(disks):
        try:
            changes = ChangeMap(directory / f"{index}.map")
        except (OSError, ValueError):
            return f"the change map of {disk.name} is missing or damaged"
        fits = (changes.size, changes.chunk_size) == (disk.size, disk.chunk_size)
        changes.close()
        if not fits:
            return f"the change map of {disk.name} is of another disk"
    return None


def _judge_crash(
    directory: Path, old: MountRecord, images: Sequence[Image], beyond: int | None
) -> _Verdict:
    """``beyond``: an epoch that no replica can hold, None where that is not known."""
    reason = _map_doubt(directory, old.disks) or _touched(old, images)
    if _flush_failed(directory):
        reason = "a flush failed"
    hot = None
    if reason is None and beyond is not None:
        try:
            hot = activityfile.read(directory / "activity", old.generation, _regions(old.disks))
        except FileNotFoundError:
            reason = "it has no activity log"
        except (OSError, ValueError) as error:
            reason = str(error)
    if reason is None and beyond is None:
        reason = "how far its epochs came is not known"
    if reason is not None:
        return _Verdict(old, beyond or 1, f"it was not unmounted cleanly, and {reason}")
    return _Verdict(old, beyond or 1, None, hot)


def _touched(old: MountRecord, images: Sequence[Image]) -> str | None:
    """What shows that somebody else changed an image after the crash."""
    if old.inodes != [_inode(image.fd) for image in images]:
        return "an image is another file than before"
    if old.boot_id == _boot_id():
        return None
    booted = _boot_time()
    for image in images:
        status = os.fstat(image.fd)
        # A crash of the host cannot have left a time later than the start of the next boot.
        changed = max(status.st_mtime, status.st_ctime)
        if stat.S_ISREG(status.st_mode) and changed >= booted:
            return f"image {image.name} changed after the host came up again"
    return None


def _inode(fd: int) -> int:
    status = os.fstat(fd)
    return status.st_ino if stat.S_ISREG(status.st_mode) else 0


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _boot_time() -> int:
    """When the running kernel started, in seconds of the wall clock (proc(5): btime)."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1])
    return 0


def _epoch_seen(directory: Path) -> int:
    """The epoch that the last mount reached, as far as it can still be read."""
    try:
        control = Control(directory / "control")
    except (OSError, ValueError):
        return 0
    epoch = control.epoch
    control.close()
    return epoch


def _flush_failed(directory: Path) -> bool:
    """Whether the last mount met a flush that failed, as far as that can still be read."""
    try:
        control = Control(directory / "control")
    except (OSError, ValueError):
        return False
    doubtful = control.doubtful
    control.close()
    return doubtful


def _source_id(images: Sequence[Image]) -> str:
    """The same for the same images on the same machine, so that lost state costs a comparison."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = os.uname().nodename
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "\n".join([machine, *(str(i.path) for i in images)])))
