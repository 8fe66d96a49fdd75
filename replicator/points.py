"""Recovery points of a replica: undo before an overwrite, thinning, and reading one of them."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from replicator.files import Files
from replicator.images import open_images
from replicator.journal import Record
from replicator.manifest import Manifest, Point
from replicator.retention import Policy, kept
from replicator.undo import Overlay, PointDamaged, UndoLog, read_exactly, undo_path

log = logging.getLogger("replicator.store")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def before_commit(
    points: Sequence[Point], policy: Policy, now: float, pinned: Set[int] = frozenset()
) -> list[Point]:
    """Return the points to list with a commit at `now`: the images' own only if it stays.

    Without undo records of its own it can go at once, and then the point before it takes
    the undo records of the pass.
    """
    if not points or points[-1].undo_bytes or points[-1].id in pinned:
        return list(points)
    stays = kept(policy, [*(point.time for point in points), now])[-2]
    return list(points) if stays else list(points[:-1])


def save_undo(
    files: Files,
    directory: Path,
    manifest: Manifest,
    fds: Sequence[int],
    records: Iterable[Record],
) -> list[Point]:
    """Save what the images hold where a pass overwrites them, durably, for the newest point listed.

    Reads all of the records, so that damage is found before the images change. Where there is no
    room, or records are damaged, the oldest points go; the caller records that before the images
    change. Returns the points as they are then. Raises FuseDiskError.
    """
    points = list(manifest.points)
    if not points:
        for _ in records:
            pass
        return points
    try:
        undo = UndoLog(files, directory, points[-1], manifest.disks)
    except PointDamaged as error:
        report_lost(directory, points, str(error))
        return []
    except OSError as error:
        raise FuseDiskError(f"cannot open undo records: {error.strerror}") from error
    try:
        for record in records:
            while True:
                try:
                    if points:
                        fd = fds[record.disk]
                        undo.save(record.disk, fd, record.offset, record.offset + record.length)
                    break
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    _drop_oldest(files, directory, points)
        if points:
            # Invariant: what is about to be overwritten is durable here before.
            undo.sync()
            points[-1] = msgspec.structs.replace(points[-1], undo_bytes=undo.end)
    except OSError as error:
        raise FuseDiskError(f"cannot write {undo.path}: {error.strerror}") from error
    finally:
        undo.close()
    return points


def _drop_oldest(files: Files, directory: Path, points: list[Point]) -> None:
    oldest = points.pop(0)
    report_lost(directory, [oldest], "target full")
    with suppress(FileNotFoundError):
        files.unlink(undo_path(directory, oldest.id))


def report_lost(directory: Path, points: Sequence[Point], reason: str) -> None:
    """Say in the log which recovery points are no more, and why."""
    log.warning(
        "replica %s: %s; dropped %s (up to epoch %d)",
        directory.name,
        reason,
        "the oldest recovery point" if len(points) == 1 else f"{len(points)} recovery points",
        points[-1].epoch,
    )


def still_there(directory: Path, points: Sequence[Point]) -> list[Point]:
    """Return the points without the oldest ones that a full target has cost their undo files."""
    left = list(points)
    while left and left[0].undo_bytes and not undo_path(directory, left[0].id).exists():
        del left[0]
    return left


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
    wanted = kept(policy, [point.time for point in points])
    keep = [yes or point.id in pinned for yes, point in zip(wanted, points, strict=True)]
    if all(keep):
        return None
    index = keep.index(False)
    left = [*points[:index], *points[index + 1 :]]
    if index == 0 or not points[index].undo_bytes:
        return left
    try:
        newer = UndoLog(files, directory, points[index], manifest.disks)
        try:
            older = UndoLog(files, directory, points[index - 1], manifest.disks)
            try:
                newer.check()
                older.absorb(newer)
                older.sync()
                left[index - 1] = msgspec.structs.replace(points[index - 1], undo_bytes=older.end)
            finally:
                older.close()
        finally:
            newer.close()
    except PointDamaged as error:
        # All older ones need it.
        report_lost(directory, points[: index + 1], str(error))
        return points[index + 1 :]
    except OSError as error:
        if error.errno in _FULL:
            report_lost(directory, points[:1], "target full")
            return points[1:]
        raise FuseDiskError(f"cannot merge recovery points: {error.strerror}") from error
    return left


def remove_unlisted(files: Files, directory: Path, points: Sequence[Point]) -> None:
    """Remove the undo files of points that are no longer listed. Raises OSError."""
    folder = undo_path(directory, 0).parent
    listed = {str(point.id) for point in points}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.name not in listed:
                files.unlink(path)


class PointView:
    """A point of a replica, for reading. Nothing else may change the replica meanwhile."""

    def __init__(self, files: Files, directory: Path, manifest: Manifest, point_id: int) -> None:
        """Open the point. Raises FuseDiskError if there is none, or it is damaged."""
        ids = [point.id for point in manifest.points]
        if point_id not in ids:
            raise FuseDiskError(
                f"replica {directory.name!r} has no recovery point {point_id}; "
                "'replicator points' lists them"
            )
        self.point = manifest.points[ids.index(point_id)]
        self.disks = manifest.disks
        self._overlays = [Overlay() for _ in manifest.disks]
        self._logs: list[UndoLog] = []
        self._images = open_images(directory, manifest.disks)
        try:
            for point in manifest.points[ids.index(point_id) :]:
                if point.undo_bytes:
                    self._overlay(UndoLog(files, directory, point, manifest.disks))
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise FuseDiskError(f"cannot read undo records: {error.strerror}") from error
            raise

    def _overlay(self, undo: UndoLog) -> None:
        self._logs.append(undo)
        undo.check()
        for disk, overlay in enumerate(undo.overlays):
            for start, end, place in overlay.pieces(0, self.disks[disk].size):
                if place is not None:
                    self._overlays[disk].add(start, end, place)

    def read(self, disk: int, offset: int, length: int) -> bytes:
        """Return a range of a disk as it was at the point. Raises OSError."""
        parts = []
        for start, end, place in self._overlays[disk].pieces(offset, offset + length):
            if place is None:
                parts.append(read_exactly(self._images[disk], end - start, start))
            elif place.fd < 0:
                parts.append(bytes(end - start))
            else:
                parts.append(read_exactly(place.fd, end - start, place.at))
        return b"".join(parts)

    def overwritten(self, disk: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is data) of what was overwritten since the point, in order."""
        for start, end, place in self._overlays[disk].pieces(0, self.disks[disk].size):
            if place is not None:
                yield start, end, place.fd >= 0

    def data(self, disk: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may be data, in order; the rest is zeros. Raises OSError."""
        for start, end, place in self._overlays[disk].pieces(0, self.disks[disk].size):
            if place is None:
                for offset, length in data_extents(self._images[disk], start, end):
                    yield offset, offset + length
            elif place.fd >= 0:
                yield start, end

    def close(self) -> None:
        """Close all files."""
        for fd in self._images:
            os.close(fd)
        for undo in self._logs:
            undo.close()
        self._images, self._logs = [], []
