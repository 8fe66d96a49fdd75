"""Passes and recovery points as clones (reflinks), where the filesystem of the store has them.

`STORE/NAME/.fusedisk/clones/`:

    next.N   disk N as the pass being received leaves it: a clone of the image, written to
    ID.N     disk N at point ID, which is the end of the undo records of all points before it

So a pass is written once, with no journal. Its commit names the disks it has; then each image is
made a clone of its `next.N`. The image stays the same file: who has it open, such as a QEMU that
waits for a guest, would otherwise go on with a file that no name leads to.
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from fusedisk.errors import FuseDiskError
from replicator.changed import ChangedRanges
from replicator.files import CANNOT_CLONE, Files
from replicator.journal import JournalDamaged
from replicator.manifest import PRIVATE_DIRECTORY, JournalRef, Manifest, Point, Received
from replicator.points import drop_oldest
from replicator.records import Piece
from replicator.writeback import Writeback

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def clone_directory(directory: Path) -> Path:
    """Return where the replica in `directory` keeps its clones."""
    return directory / PRIVATE_DIRECTORY / "clones"


def next_path(directory: Path, disk: int) -> Path:
    """Return where the pass being received has a disk."""
    return clone_directory(directory) / f"next.{disk}"


class ClonePass:
    """A pass being received into clones. Methods may be called from any thread."""

    def __init__(
        self,
        files: Files,
        directory: Path,
        begin: Sequence[int],
        before: ClonePass | None = None,
        kept: Received | None = None,
    ) -> None:
        """Start a pass from the files `begin`, which nobody changes meanwhile, or go on with one.

        Where the pass `before` was published into these, what is left of it is as good as a clone,
        and this takes it over. Raises OSError.
        """
        self._files, self._directory, self._begin = files, directory, begin
        self.id = uuid.uuid4().hex if kept is None else kept.id
        self._next: dict[int, int] = {}
        self._equal: dict[int, int] = {}
        if before is not None:
            self._equal = before._next | before._equal
            before._next, before._equal = {}, {}
        self._writebacks: dict[int, Writeback] = {}
        self.changed: dict[int, ChangedRanges] = {}
        """What each disk of the pass has otherwise than its image, where that is known."""
        self._mutex = threading.Lock()
        self.path = clone_directory(directory)
        self.records = 0
        make_directory(files, directory)
        if kept is not None:
            self._go_on(kept)
        elif before is None:
            remove_next(files, directory)

    def _go_on(self, kept: Received) -> None:
        try:
            for disk in kept.clones or ():
                flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
                self._next[disk] = os.open(next_path(self._directory, disk), flags)
        except BaseException:
            self.close()
            raise
        self.records = len(self._next)

    def data(self, pieces: Sequence[Piece]) -> None:
        """Write data. Raises OSError."""
        for disk, offset, data, _ in pieces:
            fd = self._changing(disk, offset, data.nbytes)
            self._files.write(fd, [data], offset)
            with self._mutex:
                writeback = self._writebacks.setdefault(disk, Writeback(self._files, fd))
                writeback.wrote(offset, data.nbytes)

    def zero(self, disk: int, offset: int, length: int) -> None:
        """Make zeros of a range. Raises OSError."""
        if length:
            self._files.zero(self._changing(disk, offset, length), offset, length)

    def _changing(self, disk: int, offset: int, length: int) -> int:
        fd = self.file(disk)
        with self._mutex:
            # Invariant: noted before the first byte is written, which may be the last that can be.
            if disk in self.changed:
                self.changed[disk].add(offset, length)
        return fd

    def file(self, disk: int) -> int:
        """The disk as the pass leaves it, cloned before its first change. Raises OSError."""
        with self._mutex:
            self.records += 1
            if disk in self._equal:
                self._next[disk] = self._equal.pop(disk)
                self.changed[disk] = ChangedRanges()
            if disk not in self._next:
                path = next_path(self._directory, disk)
                fd = self._files.create(path)
                try:
                    self._files.clone(self._begin[disk], fd)
                except BaseException:
                    os.close(fd)
                    # It may be tried again once there is room.
                    self._files.unlink(path)
                    raise
                self._next[disk] = fd
                self.changed[disk] = ChangedRanges()
            return self._next[disk]

    def take_back(self, disk: int, start: int) -> None:
        """Make a kept disk what it was before the pass, from a whole block on.

        Raises OSError, and JournalDamaged where the filesystem does not clone a part of a file.
        """
        if disk not in self._next:
            return
        image, length = self._begin[disk], os.fstat(self._begin[disk]).st_size - start
        try:
            if start == 0:
                self._files.clone(image, self._next[disk])
            elif length > 0:
                self._files.clone_range(image, self._next[disk], start, length)
        except OSError as error:
            if error.errno not in CANNOT_CLONE:
                raise
            raise JournalDamaged(f"cannot go on with a comparison in {self.path}") from error

    def sync(self) -> list[int]:
        """Make durable what was written before, and return which disks that is. Raises OSError."""
        with self._mutex:
            written = dict(self._next)
        for fd in written.values():
            # Invariant: content and names are durable before a manifest names them.
            self._files.sync(fd)
        self._files.sync_directory(self.path)
        return sorted(written)

    def seal(self, generation: str, epoch: int, time: float) -> JournalRef:
        """Make the pass durable; what to name in the manifest. Raises OSError."""
        return JournalRef(0, self.id, generation, epoch, time, self.sync())

    def close(self) -> None:
        """Close the files and leave them as they are. Repeating it is fine."""
        for fd in [*self._next.values(), *self._equal.values()]:
            with suppress(OSError):
                os.close(fd)
        self._next, self._equal = {}, {}

    def drop(self) -> None:
        """Remove a pass that is not to be committed, to give its room back."""
        self.close()
        # What cannot be removed now is removed when the replica is opened next.
        with suppress(OSError):
            remove_next(self._files, self._directory)


def make_directory(files: Files, directory: Path) -> None:
    """Make the directory of clones where there is none, durably. Raises OSError."""
    folder = clone_directory(directory)
    if not folder.is_dir():
        files.mkdir(folder)
        files.sync_directory(folder.parent)


def remove_next(files: Files, directory: Path, kept: Sequence[int] = ()) -> int:
    """Remove the files of a pass, which must not be committed, and return how many.

    Those of the disks in `kept` stay. Not durable: those that come back are not named by a
    manifest. Raises OSError.
    """
    removed = 0
    folder = clone_directory(directory)
    if folder.is_dir():
        staying = {next_path(directory, disk) for disk in kept}
        for path in sorted(set(folder.glob("next.*")) - staying):
            files.unlink(path)
            removed += 1
    return removed


def preserve(
    files: Files, directory: Path, fds: Sequence[int], points: Sequence[Point]
) -> list[Point]:
    """Clone the images for the newest point, unless it has clones; the points to record then.

    The clones are durable; until they are on record they count for nothing. Raises OSError.
    """
    if not points or points[-1].clone is not None:
        return list(points)
    make_directory(files, directory)
    newest = points[-1]
    for disk, image in enumerate(fds):
        path = clone_path(directory, newest.id, disk)
        with suppress(FileNotFoundError):
            files.unlink(path)
        fd = files.create(path)
        try:
            files.clone(image, fd)
            files.sync(fd)
        finally:
            os.close(fd)
    files.sync_directory(clone_directory(directory))
    return [*points[:-1], msgspec.structs.replace(newest, clone=newest.id)]


def clone_path(directory: Path, clone: int, disk: int) -> Path:
    """Return where the clone of a disk for a point is."""
    return clone_directory(directory) / f"{clone}.{disk}"


def open_clones(directory: Path, manifest: Manifest, clone: int) -> list[int]:
    """Open the clones of all disks for reading. Raises OSError, FuseDiskError for damage."""
    return _open([clone_path(directory, clone, n) for n in range(len(manifest.disks))], manifest)


def _open(paths: Sequence[Path], manifest: Manifest, disks: Sequence[int] = ()) -> list[int]:
    numbers = disks or range(len(manifest.disks))
    fds: list[int] = []
    try:
        for path, disk in zip(paths, numbers, strict=True):
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
            size = os.fstat(fds[-1]).st_size
            if size != manifest.disks[disk].size:
                raise FuseDiskError(
                    f"{path} is damaged: it has {size} bytes, the disk {manifest.disks[disk].size}"
                )
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def publish(
    files: Files,
    directory: Path,
    manifest: Manifest,
    fds: Sequence[int],
    record_points: Callable[[list[Point]], None],
    sync: Callable[[], None],
    changed: Mapping[int, ChangedRanges],
) -> list[Point]:
    """Make the images what the committed pass left, and `sync` them; the points before it.

    Of a disk in `changed` that alone is cloned: besides, image and pass have to be the same.
    Repeating it ends the same. Where there is no room even for that, the oldest points go, which
    `record_points` makes durable. Raises JournalDamaged with nothing changed, or FuseDiskError.
    """
    ref = manifest.journal
    assert ref is not None and ref.clones is not None
    try:
        paths = [next_path(directory, disk) for disk in ref.clones]
        passed = _open(paths, manifest, ref.clones)
    except FuseDiskError as error:
        raise JournalDamaged(str(error)) from error
    except OSError as error:
        raise JournalDamaged(f"pass in {clone_directory(directory)}: {error.strerror}") from error
    points = list(manifest.points)
    try:
        while True:
            try:
                for disk, fd in zip(ref.clones, passed, strict=True):
                    _clone(files, fd, fds[disk], changed.get(disk))
                sync()
                return points
            except OSError as error:
                if error.errno not in _FULL or len(points) < 2:
                    raise FuseDiskError(
                        f"cannot apply a pass to the images in {directory}: {error.strerror}; it "
                        "is kept, and applied when the replica is opened after the cause is removed"
                    ) from error
                drop_oldest(files, directory, points)
                record_points(points)
    finally:
        for fd in passed:
            os.close(fd)


def _clone(files: Files, source: int, image: int, changed: ChangedRanges | None) -> None:
    ranges = None if changed is None else changed.to_clone(source)
    try:
        for start, end in ranges or ():
            files.clone_range(source, image, start, end - start)
    except OSError as error:
        # Some want blocks of another size than they say.
        if error.errno not in CANNOT_CLONE:
            raise
        ranges = None
    if ranges is None:
        files.clone(source, image)
