"""Making a replica the disk when its source is gone: the steps that `Replica` puts in order."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import fence_path
from replicator.clones import ClonePass
from replicator.files import Files
from replicator.journal import JournalHeader, JournalWriter
from replicator.manifest import JournalRef, Manifest
from replicator.pointview import PointView
from replicator.records import Piece

_PIECE_BYTES = 1 << 20

Writer = TypeVar("Writer", JournalWriter, ClonePass)


def promoted_text(name: str, manifest: Manifest, *, ours: bool) -> str:
    """Why a source is refused by a promoted replica; ``ours`` if it was the replica's source."""
    when = ""
    if manifest.promoted_at is not None:
        when = datetime.fromtimestamp(manifest.promoted_at, UTC).strftime(" on %Y-%m-%d %H:%M UTC")
    if not ours:
        return (
            f"replica {name!r} was promoted{when} and is a disk of its own; replicate under "
            "another name, or make it a replica again with 'replicator adopt' at the target"
        )
    return (
        f"replica {name!r} was promoted{when}; this source is no longer the disk: fence it with "
        "'replicator resolve', or replicate under another name"
    )


def clear_image_fences(files: Files, directory: Path, manifest: Manifest) -> None:
    """Remove the fences that adopted images brought along, durably. Raises OSError."""
    removed = False
    for disk in manifest.disks:
        with suppress(FileNotFoundError):
            files.unlink(fence_path(directory / disk.name))
            removed = True
    if removed:
        files.sync_directory(directory)


def rollback_journal(
    files: Files,
    directory: Path,
    manifest: Manifest,
    fds: Sequence[int],
    point_id: int,
    now: float,
) -> JournalRef | None:
    """Write the journal of a pass back to a recovery point; None where the images are there.

    No journal may be pending. Raises OSError or FuseDiskError; then nothing has changed.
    """

    def begin(view: PointView) -> JournalWriter:
        base = manifest.committed
        header = JournalHeader(uuid.uuid4().hex, manifest.source_id, *base, view.point.epoch)
        return JournalWriter(files, directory, 0, header)

    def fill(view: PointView, writer: JournalWriter) -> None:
        for disk, fd in enumerate(fds):
            ranges = view.overwritten(disk) if view.clone is None else _differing(view, disk, fd)
            for start, end, is_data in ranges:
                if is_data:
                    # Invariant: applying what was committed never ends for want of room.
                    files.reserve(fd, start, end - start)
                _write_back(view, writer, disk, start, end, is_data=is_data)

    return _sealed(PointView(directory, manifest, point_id), manifest, begin, fill, now)


def rollback_clones(
    files: Files,
    directory: Path,
    manifest: Manifest,
    fds: Sequence[int],
    point_id: int,
    now: float,
) -> JournalRef | None:
    """As `rollback_journal`, of a pass that is a clone of what the point lies over."""

    def begin(view: PointView) -> ClonePass:
        return ClonePass(files, directory, [view.file(disk) for disk in range(len(fds))])

    def fill(view: PointView, writer: ClonePass) -> None:
        for disk in range(len(fds)):
            # Also where nothing was overwritten: the clone itself is the way back.
            writer.file(disk)
            for start, end, is_data in view.overwritten(disk):
                _write_back(view, writer, disk, start, end, is_data=is_data)

    return _sealed(PointView(directory, manifest, point_id), manifest, begin, fill, now)


def _sealed(
    view: PointView,
    manifest: Manifest,
    begin: Callable[[PointView], Writer],
    fill: Callable[[PointView, Writer], None],
    now: float,
) -> JournalRef | None:
    """The pass to the point of ``view``, which is closed; None where the images are there."""
    try:
        if view.point.id == manifest.points[-1].id:
            return None
        writer = begin(view)
        try:
            fill(view, writer)
            ref = writer.seal(view.point.generation, view.point.epoch, now)
        except BaseException:
            writer.drop()
            raise
        writer.close()
        return msgspec.structs.replace(ref, frozen=view.point.frozen)
    finally:
        view.close()


def _write_back(
    view: PointView,
    writer: JournalWriter | ClonePass,
    disk: int,
    start: int,
    end: int,
    *,
    is_data: bool,
) -> None:
    if not is_data:
        writer.zero(disk, start, end - start)
        return
    for at in range(start, end, _PIECE_BYTES):
        data = view.read(disk, at, min(_PIECE_BYTES, end - at))
        writer.data([Piece(disk, at, memoryview(data))])


def _differing(view: PointView, disk: int, fd: int) -> Iterator[tuple[int, int, bool]]:
    """What an image has otherwise than a point that does not lie over it."""
    size = view.disks[disk].size
    for start in range(0, size, _PIECE_BYTES):
        end = min(start + _PIECE_BYTES, size)
        if view.read(disk, start, end - start) != os.pread(fd, end - start, start):
            yield start, end, True


def disk_paths(directory: Path, manifest: Manifest) -> list[str]:
    """The images, for whoever is to use them now."""
    return [str(directory / disk.name) for disk in manifest.disks]


def require_points(name: str, manifest: Manifest) -> None:
    """Raise FuseDiskError where nothing was committed yet."""
    if not manifest.points:
        raise FuseDiskError(f"replica {name!r} has no recovery point; leave --point out")
