"""Recovery points of a replica: undo before an overwrite, thinning, and reading one of them."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from fusedisk.errors import FuseDiskError
from replicator.files import Files
from replicator.journal import ChangedRange
from replicator.manifest import PRIVATE_DIRECTORY, Manifest, Point
from replicator.retention import Policy, kept
from replicator.undo import PointDamaged, UndoLog, undo_path

log = logging.getLogger("replicator.store")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def before_commit(
    points: Sequence[Point], policy: Policy, now: float, pinned: Set[int] = frozenset()
) -> list[Point]:
    """Return the points to list with a commit at `now`: the images' own only if it stays.

    Without undo records of its own it can go at once, and then the point before it takes
    the undo records of the pass.
    """
    own = points[-1] if points else None
    if own is None or own.undo_bytes or own.clone is not None or own.id in pinned:
        return list(points)
    stays = kept(policy, [*(point.time for point in points), now])[-2]
    return list(points) if stays else list(points[:-1])


def save_undo(
    files: Files,
    directory: Path,
    manifest: Manifest,
    fds: Sequence[int],
    ranges: Iterable[ChangedRange],
) -> list[Point]:
    """Save what the images hold where a pass overwrites them, durably, for the newest point listed.

    Takes from `ranges` no more than it needs. Where there is no room, or records are damaged, the
    oldest points go; the caller records that before the images change. Returns the points as they
    are then. Raises FuseDiskError.
    """
    points = list(manifest.points)
    if not points or points[-1].clone is not None:
        return points
    try:
        undo = UndoLog(files, directory, points[-1], manifest.disks)
    except PointDamaged as error:
        whole = _independent(points)
        report_lost(directory, points[len(whole) :], str(error))
        return whole
    except OSError as error:
        raise FuseDiskError(f"cannot open undo records: {error.strerror}") from error
    try:
        for disk, offset, length in ranges:
            save = partial(undo.save, disk, fds[disk], offset, offset + length)
            _with_room(files, directory, points, save)
        _with_room(files, directory, points, undo.flush)
        if points:
            # Invariant: what is about to be overwritten is durable here before.
            undo.sync()
            points[-1] = msgspec.structs.replace(points[-1], undo_bytes=undo.end)
    except OSError as error:
        raise FuseDiskError(f"cannot write {undo.path}: {error.strerror}") from error
    finally:
        undo.close()
    return points


def _with_room(
    files: Files, directory: Path, points: list[Point], step: Callable[[], None]
) -> None:
    """Take a step, again and again while there are points to drop; without any it is left out."""
    while points:
        try:
            return step()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            drop_oldest(files, directory, points)


def drop_oldest(files: Files, directory: Path, points: list[Point]) -> None:
    """Take the oldest point off the list and give its room back. Raises OSError."""
    oldest = points.pop(0)
    report_lost(directory, [oldest], "target full")
    remove_files(files, directory, oldest)


def remove_files(files: Files, directory: Path, point: Point) -> None:
    """Remove what only a point needs. Raises OSError."""
    with suppress(FileNotFoundError):
        files.unlink(undo_path(directory, point.id))
    if point.clone is not None:
        for path in _clones(directory, point.clone):
            files.unlink(path)


def _clones(directory: Path, clone: int) -> list[Path]:
    folder = directory / PRIVATE_DIRECTORY / "clones"
    return sorted(folder.glob(f"{clone}.*")) if folder.is_dir() else []


def _independent(points: Sequence[Point]) -> list[Point]:
    """The points that need nothing of the newest clone's successors: those up to that clone."""
    left = list(points)
    while left and left[-1].clone is None:
        left.pop()
    return left


def chain(points: Sequence[Point], point_id: int) -> tuple[list[Point], int | None]:
    """A point and those after it whose undo records it is read through, and the clone below these.

    Below is None where it is the images.
    """
    found = []
    for point in points:
        if point.id >= point_id:
            found.append(point)
            if point.clone is not None:
                return found, point.clone
    return found, None


def report_lost(directory: Path, points: Sequence[Point], reason: str) -> None:
    """Say in the log which recovery points are no more, and why."""
    log.warning(
        "replica %s: %s; dropped %s (up to epoch %d)",
        directory.name,
        reason,
        "the oldest recovery point" if len(points) == 1 else f"{len(points)} recovery points",
        points[-1].epoch,
    )


def still_there(directory: Path, manifest: Manifest) -> list[Point]:
    """Return the points without the oldest ones that a full target has cost their files."""
    left = list(manifest.points)
    while left and _lacks_files(directory, left[0], len(manifest.disks)):
        del left[0]
    return left


def _lacks_files(directory: Path, point: Point, disks: int) -> bool:
    if point.undo_bytes and not undo_path(directory, point.id).exists():
        return True
    return point.clone is not None and len(_clones(directory, point.clone)) < disks


def overdue(manifest: Manifest, policy: Policy) -> Set[int]:
    """Ids of the points that the policy does not keep any more."""
    wanted = kept(policy, [point.time for point in manifest.points])
    return {p.id for p, stays in zip(manifest.points, wanted, strict=True) if not stays}


def thin_one(
    files: Files,
    directory: Path,
    manifest: Manifest,
    policy: Policy,
    pinned: Set[int] = frozenset(),
) -> list[Point] | None:
    """Prepare one point to go; the points to record then, or None if all may stay.

    Points that are ``pinned`` stay, whatever the policy.

    The next older point takes its undo records; older wins where both have a range. A crash
    before the record leaves records that are there twice, which changes no point.
    Raises FuseDiskError.
    """
    points = manifest.points
    due = overdue(manifest, policy)
    keep = [point.id not in due or point.id in pinned for point in points]
    if all(keep):
        return None
    index = keep.index(False)
    left = [*points[:index], *points[index + 1 :]]
    if index == 0 or points[index - 1].clone is not None:
        return left
    # The older one lies over what this one lies over, from now on by itself.
    left[index - 1] = msgspec.structs.replace(points[index - 1], clone=points[index].clone)
    if not points[index].undo_bytes:
        return left
    try:
        newer = UndoLog(files, directory, points[index], manifest.disks)
        try:
            older = UndoLog(files, directory, points[index - 1], manifest.disks)
            try:
                newer.check()
                older.absorb(newer)
                older.sync()
                left[index - 1] = msgspec.structs.replace(left[index - 1], undo_bytes=older.end)
            finally:
                older.close()
        finally:
            newer.close()
    except PointDamaged as error:
        # All older ones need it, down to the newest that has clones.
        whole = _independent(points[:index])
        report_lost(directory, points[len(whole) : index + 1], str(error))
        return [*whole, *points[index + 1 :]]
    except OSError as error:
        if error.errno in _FULL:
            report_lost(directory, points[:1], "target full")
            return points[1:]
        raise FuseDiskError(f"cannot merge recovery points: {error.strerror}") from error
    return left


def remove_unlisted(files: Files, directory: Path, points: Sequence[Point]) -> None:
    """Remove undo files and clones of points that are no longer listed. Raises OSError."""
    folder = undo_path(directory, 0).parent
    listed = {str(point.id) for point in points}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.name not in listed:
                files.unlink(path)
    folder = directory / PRIVATE_DIRECTORY / "clones"
    needed = {str(point.clone) for point in points} | {"next"}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.name.partition(".")[0] not in needed:
                files.unlink(path)
