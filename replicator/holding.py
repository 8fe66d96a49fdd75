"""A replica that this process holds: its locks, its record, and how its images get to rest."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from fusedisk.errors import FuseDiskError
from replicator.clones import ClonePass, remove_next
from replicator.journal import JournalDamaged, JournalWriter, remove_journals
from replicator.manifest import (
    PRIVATE_DIRECTORY,
    JournalRef,
    Manifest,
    Point,
    clear_errors,
    manifest_path,
    write_manifest,
)
from replicator.pins import pinned_points
from replicator.points import overdue, remove_unlisted, thin_one
from replicator.recovery import (
    applied,
    apply_journal,
    report_damage,
    sync_images,
    unknown,
)
from replicator.retention import parse_policy
from replicator.transfers import TransferDigest

if TYPE_CHECKING:
    from replicator.store import Store

Status = Literal["new", "existing"]
log = logging.getLogger("replicator.store")


class HeldReplica:
    """What passes and decisions share. All methods may be called from any thread.

    Three locks, taken in this order:
    - `_apply_mutex`: held while the journal is applied, so that whoever needs the images at the
      committed point gets there by taking it; it also keeps the descriptors open meanwhile.
    - sharing and excluding: writes and reads run side by side; a change of the manifest waits for
      those under way and keeps new ones out, so that a commit covers exactly the writes that
      returned before it, and no descriptor is closed (and its number reused) under a write.
      An apply touches only the images and shares with nobody who does, so it is not counted.
    - the journal writer's own.

    Every method raises FuseDiskError when it refuses, and when the filesystem reports an error.
    """

    def __init__(
        self,
        store: Store,
        directory: Path,
        manifest: Manifest,
        fds: list[int],
        status: Status,
        numbers: list[int] | None = None,
    ) -> None:
        """Use `Replica.open` or `Replica.load`; this takes over `fds` and the claimed name.

        `numbers` are the places of the source's disks in the manifest, whose order never changes:
        journals and undo records number the disks by it.
        """
        self._store = store
        self._files = store.files
        self._directory = directory
        self._manifest = manifest
        self._fds = fds
        self._numbers = numbers or list(range(len(fds)))
        # Known as long as the replica is open: all of its points are clones, or undo records.
        with clear_errors(f"cannot open replica {directory}"):
            self._cloning = bool(fds) and store.files.can_clone(
                directory / PRIVATE_DIRECTORY, fds[0]
            )
        self._receiving: JournalWriter | ClonePass | None = None
        self._committed: JournalWriter | ClonePass | None = None
        self._published: ClonePass | None = None
        self._filling: int | None = None
        self._clearing: int | None = None
        self._based = False
        self._towards: str | None = None
        self._epoch = self._number = 0
        self._passed = TransferDigest()
        self._base: bytes | None = None
        self._dropped = 0
        self._begun = False
        self._apply_mutex = threading.Lock()
        self._condition = threading.Condition()
        self._shared = 0
        self._exclusive = False
        self._closed = False
        self._unusable: str | None = None
        self._unusable_since: BaseException | None = None
        self._said_in_use: Set[int] = frozenset()
        self.status: Status = status
        """"new" if `open` created the replica, else "existing"."""

    @property
    def name(self) -> str:
        """The replica's name in its store."""
        return self._directory.name

    @property
    def manifest(self) -> Manifest:
        """What is durably recorded; an immutable snapshot."""
        return self._manifest

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Apply what is committed, and keep the images at that point."""
        with self._apply_mutex:
            with self._condition:
                self._require_usable()
                manifest = self._manifest
            if manifest.journal is not None:
                self._apply(manifest)
            yield

    def _apply(self, manifest: Manifest) -> None:
        try:
            points = apply_journal(
                self._files,
                self._directory,
                manifest,
                self._fds,
                self._record_points,
                ours=self._committed,
            )
        except JournalDamaged as damage:
            report_damage(self._directory, damage, len(manifest.points))
            with self._excluding():
                self._record(unknown(self._manifest))
                self._give_up("lost a pass to a damaged journal; open it again and compare", damage)
            raise
        except FuseDiskError as error:
            with self._condition:
                self._give_up("failed to apply a pass; open it again", error.__cause__)
            raise
        with self._excluding():
            # Invariant: the images are durable at this point before the manifest says so, and
            # the manifest before the journal goes.
            self._record(applied(self._manifest, points))
            assert manifest.journal is not None
            self._clearing = manifest.journal.slot
        try:
            with clear_errors(f"cannot remove the applied journal of replica {self.name!r}"):
                self._clear_away(manifest.journal)
        finally:
            with self._condition:
                self._clearing = None

    def _clear_away(self, applied: JournalRef) -> None:
        """What is left of a pass that was applied. Raises OSError."""
        committed, self._committed = self._committed, None
        if isinstance(committed, ClonePass):
            # Invariant: the manifest does not name it any more, so the next pass may write there.
            self._published = committed
        elif applied.clones is not None:
            remove_next(self._files, self._directory)
        else:
            remove_journals(self._files, self._directory, [applied.slot])

    def _record_points(self, points: list[Point]) -> None:
        with self._excluding():
            self._record(msgspec.structs.replace(self._manifest, points=points))

    def _pinned(self) -> frozenset[int]:
        with clear_errors(f"cannot look who reads replica {self.name!r}"):
            return pinned_points(self._store.path, self.name)

    def _thin(self) -> None:
        """Let go of the points that the policy no longer keeps; `_apply_mutex` is held."""
        policy, pinned = parse_policy(self._manifest.keep), self._pinned()
        due = overdue(self._manifest, policy) & pinned
        for point in sorted(due - self._said_in_use):
            log.info("replica %s: point %d is kept for as long as it is in use", self.name, point)
        self._said_in_use = due
        while True:
            step = thin_one(self._files, self._directory, self._manifest, policy, pinned)
            if step is None:
                return
            self._record_points(step)
            with clear_errors(f"cannot remove a recovery point of replica {self.name!r}"):
                remove_unlisted(self._files, self._directory, step)

    def prove(self) -> None:
        """Write and sync a little, to find out whether the disk answers. Raises OSError."""
        self._store.prove(self.name)

    def close(self) -> None:
        """Close the images after the calls under way; nothing is synced, and a pass not committed
        is dropped but for what a checkpoint noted. Repeating it is fine."""
        with self._apply_mutex, self._alone():
            if self._closed:
                return
            self._closed = True
            try:
                self._leave_pass()
                self._drop_published()
                if self._committed is not None:
                    self._committed.close()
            finally:
                for fd in self._fds:
                    # Errors of a write show in fsync, which decides; a close adds nothing.
                    with suppress(OSError):
                        os.close(fd)
                self._fds = []
                self._numbers = []
                self._unusable = "is closed"
                self._store.release(self.name)

    def __enter__(self) -> Self:
        """Return the replica itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the replica."""
        self.close()

    def _image(self, disk: int) -> str:
        # For messages, prepared with every write: a Path would cost as much as the write.
        return f"{self._directory}/{self._manifest.disks[disk].name}"

    def _range(self, number: int, offset: int, length: int) -> tuple[int, int]:
        """Return the place and the descriptor of the source's disk if the range lies within it."""
        if not 0 <= number < len(self._numbers):
            raise FuseDiskError(f"replica {self.name!r} has no disk number {number}")
        disk = self._numbers[number]
        size = self._manifest.disks[disk].size
        if offset < 0 or length < 0 or offset + length > size:
            raise FuseDiskError(
                f"{length} bytes at {offset} are outside disk "
                f"{self._manifest.disks[disk].name!r} of {size} bytes"
            )
        return disk, self._fds[disk]

    def _require_not_promoted(self) -> None:
        if self._manifest.state == "promoted":
            raise FuseDiskError(
                f"replica {self.name!r} is promoted and belongs to its guest; "
                "replicate under another name"
            )

    def _drop_pass(self) -> None:
        if self._receiving is not None:
            self._receiving.drop()
            self._receiving = None

    def _leave_pass(self) -> None:
        """Leave of the pass what is noted; the next session may go on with it."""
        receiving, received = self._receiving, self._manifest.received
        if receiving is not None and received is not None and received.id == receiving.id:
            receiving.close()
            self._receiving = None
        self._drop_pass()

    def _forget_pass(self) -> None:
        """Drop the pass being received, or what is kept of one that was cut off."""
        received, receiving = self._manifest.received, self._receiving
        # Before the record, which needs room too, and what is kept may have taken all of it: a pass
        # whose files are gone is not kept, whatever the manifest says.
        self._drop_pass()
        if receiving is None and received is not None:
            with clear_errors(f"cannot remove a pass of replica {self.name!r}"):
                if received.clones is None:
                    remove_journals(self._files, self._directory, [received.slot])
                else:
                    remove_next(self._files, self._directory)
        if received is not None:
            # Invariant: nothing is claimed any more of files that another pass is to have.
            self._record(msgspec.structs.replace(self._manifest, received=None))

    def _drop_published(self) -> None:
        if self._published is not None:
            self._published.drop()
            self._published = None

    def _sync_images(self) -> None:
        try:
            sync_images(self._files, self._directory, self._manifest, self._fds)
        except FuseDiskError as error:
            self._give_up("failed to sync; open it again and repeat the pass", error.__cause__)
            raise

    def _record(self, manifest: Manifest) -> None:
        try:
            write_manifest(self._files, self._directory, manifest)
        except OSError as error:
            # Old or new may be on disk now; only reading it again can tell.
            self._give_up("failed to record its state; open it again", error)
            raise FuseDiskError(
                f"cannot write manifest {manifest_path(self._directory)}: {error.strerror}"
            ) from error
        self._manifest = manifest

    def _give_up(self, what: str, cause: BaseException | None) -> None:
        self._unusable = what
        # The first one: what fails after it fails because of it.
        self._unusable_since = self._unusable_since or cause

    def _require_usable(self) -> None:
        if self._unusable is not None:
            # Its cause says, as that of the first failure, whether trying again may help: tasks of
            # a session fail together, and any of their errors may be the one that is told.
            raise FuseDiskError(f"replica {self.name!r} {self._unusable}") from self._unusable_since

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive)
            self._require_usable()
            self._shared += 1
        try:
            yield
        finally:
            with self._condition:
                self._shared -= 1
                self._condition.notify_all()

    @contextmanager
    def _excluding(self) -> Iterator[None]:
        with self._alone():
            self._require_usable()
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive)
            # Set before waiting for the shared ones, so that a stream of them cannot starve this.
            self._exclusive = True
            self._condition.wait_for(lambda: self._shared == 0)
        try:
            yield
        finally:
            with self._condition:
                self._exclusive = False
                self._condition.notify_all()
