"""Applying a committed journal to the images: after a commit, and again from its start at open.

Applying twice, or on top of half of itself, ends in the same images: a record says what a range
holds afterwards, whatever it held before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from fusedisk.errors import FuseDiskError
from replicator.clones import ClonePass, publish, remove_next
from replicator.files import Files
from replicator.journal import (
    SLOTS,
    ChangedRange,
    JournalDamaged,
    JournalWriter,
    journal_directory,
    read_journal,
    read_ranges,
    remove_journals,
)
from replicator.manifest import (
    JournalRef,
    Manifest,
    Point,
    Received,
    ReplicaDisk,
    settle_manifest,
    write_manifest,
)
from replicator.points import remove_unlisted, save_undo, still_there
from replicator.received import is_there
from replicator.writeback import Writeback

log = logging.getLogger("replicator.store")


def apply_journal(
    files: Files,
    directory: Path,
    manifest: Manifest,
    fds: Sequence[int],
    record_points: Callable[[list[Point]], None],
    *,
    ours: JournalWriter | ClonePass | None = None,
) -> list[Point]:
    """Bring the images to the point of the manifest's journal and sync them.

    `ours` is what wrote it, where this process did; else it is read through before the images
    change, and clones are taken over whole.
    Returns the points before it, with what was added to the undo records; `record_points` makes
    it durable where some had to go. Raises JournalDamaged
    with the images half changed, or FuseDiskError if they cannot be written; then it can be
    done again.
    """
    assert manifest.journal is not None
    ref, disks = manifest.journal, manifest.disks

    def sync() -> None:
        sync_images(files, directory, manifest, fds)

    if ref.clones is not None:
        changed = ours.changed if isinstance(ours, ClonePass) else {}
        return publish(files, directory, manifest, fds, record_points, sync, changed)
    source_id = manifest.source_id
    ranges = (read_ranges if ours else _checked_ranges)(directory, ref, source_id, disks)
    points = save_undo(files, directory, manifest, fds, ranges)
    if not ours:
        for _ in ranges:
            pass
    if len(points) < len(manifest.points):
        # Invariant: a point whose undo records are not complete is not listed once the images
        # change; saving them again after a crash would save the new content as the old.
        record_points(points)
    writebacks = [Writeback(files, fd) for fd in fds]
    for record in read_journal(directory, ref, source_id, disks):
        try:
            if record.data is None:
                files.zero(fds[record.disk], record.offset, record.length)
            else:
                files.write(fds[record.disk], [record.data], record.offset)
                writebacks[record.disk].wrote(record.offset, record.length)
        except OSError as error:
            image = directory / disks[record.disk].name
            raise FuseDiskError(
                f"cannot apply a pass to image {image}: {error.strerror}; it is kept in the "
                "journal, and applied when the replica is opened after the cause is removed"
            ) from error
    sync()
    return points


def _checked_ranges(
    directory: Path, ref: JournalRef, source_id: str, disks: Sequence[ReplicaDisk]
) -> Iterator[ChangedRange]:
    for record in read_journal(directory, ref, source_id, disks):
        yield record.disk, record.offset, record.length


def sync_images(files: Files, directory: Path, manifest: Manifest, fds: Sequence[int]) -> None:
    """Make the images durable. Raises FuseDiskError; the replica has then to be opened again."""
    for disk, fd in zip(manifest.disks, fds, strict=True):
        try:
            files.sync(fd)
        except OSError as error:
            # The kernel reports a lost write once, and may then call the page clean: a second
            # fsync would lie. Dropping the pages makes a later compare see what is on disk.
            for each in fds:
                with suppress(OSError):
                    os.posix_fadvise(each, 0, 0, os.POSIX_FADV_DONTNEED)
            raise FuseDiskError(
                f"cannot sync image {directory / disk.name}: {error.strerror}"
            ) from error


def applied(manifest: Manifest, points: Sequence[Point]) -> Manifest:
    """Return what to record once the images have reached the journal's point."""
    assert manifest.journal is not None
    ref = manifest.journal
    reached = Point(manifest.next_point, ref.generation, ref.epoch, ref.time, frozen=ref.frozen)
    return msgspec.structs.replace(
        manifest,
        generation=ref.generation,
        epoch=ref.epoch,
        applying=False,
        journal=None,
        points=[*points, reached],
        next_point=manifest.next_point + 1,
        root=ref.root,
    )


def unknown(manifest: Manifest) -> Manifest:
    """Return what to record of images that are a mixture: nothing promotes them, all is compared.

    A replica that is filling has no point, and a source compares one that it did not create.
    """
    return msgspec.structs.replace(
        manifest,
        generation=None,
        epoch=None,
        state="filling",
        applying=True,
        journal=None,
        filled=None,
        received=None,
        # What is repaired is not recorded for undoing.
        points=[],
        root=None,
    )


def report_damage(directory: Path, damage: JournalDamaged, points: int) -> None:
    """Say in the log what was found and what mends it."""
    log.error(
        "replica %s: %s; its images are a mixture now and cannot be promoted until the source, "
        "which compares them by hash when it connects, has repaired them%s",
        directory.name,
        damage,
        f"; its {points} recovery points are lost" if points > 1 else "",
    )


def recover(files: Files, directory: Path, manifest: Manifest, fds: Sequence[int]) -> Manifest:
    """Finish what a crash interrupted, and return the manifest as it is then.

    `fds` are in the order of the manifest's disks. Raises OSError or FuseDiskError, and can be
    repeated.
    """
    if manifest.state == "filling" and manifest.applying:
        # Invariant: what the source compares by hash is on the disk or going there. After a failed
        # sync the cache may show bytes as clean that never got there.
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    # Invariant: what was read here is durable before a journal it does not name is removed.
    settle_manifest(files, directory)
    left = still_there(directory, manifest)
    received = manifest.received if is_there(directory, manifest) else None
    if left != manifest.points or received != manifest.received:
        manifest = msgspec.structs.replace(manifest, points=left, received=received)
        write_manifest(files, directory, manifest)
    if manifest.journal is not None:
        epoch = manifest.journal.epoch
        before = manifest

        def record_points(points: list[Point]) -> None:
            write_manifest(files, directory, msgspec.structs.replace(before, points=points))

        try:
            points = apply_journal(files, directory, manifest, fds, record_points)
            manifest = applied(manifest, points)
            log.info("replica %s: applied the journal of epoch %d", directory.name, epoch)
        except JournalDamaged as damage:
            report_damage(directory, damage, len(manifest.points))
            manifest = unknown(manifest)
        write_manifest(files, directory, manifest)
    _cut_to_noted(directory, manifest.received, files)
    if _remove_leftovers(files, directory, manifest.received):
        log.info("replica %s: removed what was left in its journal", directory.name)
    remove_unlisted(files, directory, manifest.points)
    return manifest


def _cut_to_noted(directory: Path, received: Received | None, files: Files) -> None:
    """Give the room back of what a pass that is kept has beyond what was noted of it.

    Whoever goes on with it does the same, so here it may fail.
    """
    if received is None or received.clones is not None:
        return
    path = journal_directory(directory) / str(received.slot)
    with suppress(OSError), path.open("r+b") as file:
        files.truncate(file.fileno(), received.length)


def _remove_leftovers(files: Files, directory: Path, received: Received | None) -> int:
    """Remove passes that are neither committed nor noted as received, and return how many files."""
    slots, disks = list(SLOTS), []
    if received is not None:
        disks = received.clones or []
        if received.clones is None:
            slots.remove(received.slot)
    return remove_journals(files, directory, slots) + remove_next(files, directory, disks)
