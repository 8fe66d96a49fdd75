"""One replica on the target: its disk images, and what may be done to them when.

Until there is a first point a pass goes straight into the images. From then on it goes into a
journal, which a commit makes the replica's next point; the images follow. docs/crash-model.md has
the order of steps and what a crash at each leaves.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.image import stamp
from replicator.adoption import is_unclaimed
from replicator.images import HashSegment, create_replica, hash_segments, open_images
from replicator.journal import SLOTS, JournalDamaged, JournalHeader, JournalWriter, remove_journals
from replicator.manifest import (
    MAX_ABORTED_TOKENS,
    PRIVATE_DIRECTORY,
    Filled,
    Manifest,
    Point,
    ReplicaDisk,
    check_disks,
    check_epoch,
    check_power_of_two,
    check_text,
    clear_errors,
    manifest_path,
    new_manifest,
    read_manifest,
    write_manifest,
)
from replicator.pins import pinned_points
from replicator.points import before_commit, remove_unlisted, report_lost, thin_one
from replicator.promotion import clear_image_fences, promoted_text, rollback_journal
from replicator.recovery import (
    applied,
    apply_journal,
    recover,
    report_damage,
    sync_images,
    unknown,
)
from replicator.retention import parse_policy
from replicator.undo import undo_path

if TYPE_CHECKING:
    from replicator.store import Store

Status = Literal["new", "existing"]
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class TargetFull(FuseDiskError):
    """There is no room for a pass; the replica is as it was before it."""


def _compare_with_manifest(
    name: str, manifest: Manifest, source_id: str, disks: Sequence[ReplicaDisk]
) -> None:
    """Refuse a source that this replica is not a copy of."""
    if manifest.state == "promoted":
        raise FuseDiskError(promoted_text(name, manifest, ours=manifest.source_id == source_id))
    if manifest.source_id != source_id and not is_unclaimed(manifest):
        raise FuseDiskError(
            f"replica {name!r} belongs to source {manifest.source_id!r}, not to {source_id!r}; "
            "replicate under another name"
        )
    have = {disk.name: disk.size for disk in manifest.disks}
    want = {disk.name: disk.size for disk in disks}
    if have.keys() != want.keys():
        raise FuseDiskError(
            f"replica {name!r} has disks {', '.join(sorted(map(repr, have)))} but the source has "
            f"{', '.join(sorted(map(repr, want)))}; replicate under another name"
        )
    for disk, size in want.items():
        if have[disk] != size:
            raise FuseDiskError(
                f"disk {disk!r} of replica {name!r} has {have[disk]} bytes but the source's has "
                f"{size}; replicate under another name"
            )


def _in_order(manifest: Manifest | None, disks: Sequence[ReplicaDisk]) -> list[ReplicaDisk]:
    """Return the source's disks in the order that the replica's records number them by."""
    if manifest is None:
        return list(disks)
    by_name = {disk.name: disk for disk in disks}
    return [by_name[disk.name] for disk in manifest.disks]


class Replica:
    """An open replica. All methods may be called from any thread.

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
        self._receiving: JournalWriter | None = None
        self._filling: int | None = None
        self._apply_mutex = threading.Lock()
        self._condition = threading.Condition()
        self._shared = 0
        self._exclusive = False
        self._closed = False
        self._unusable: str | None = None
        self.status: Status = status
        """"new" if `open` created the replica, else "existing"."""

    @classmethod
    def open(cls, store: Store, name: str, source_id: str, disks: Sequence[ReplicaDisk]) -> Replica:
        """Open the replica `name` of the source's `disks`, in the source's order of disks.

        Creates it if there is none; adopts images without a manifest, as of unknown history.
        Raises FuseDiskError, with nothing changed, if the name or a disk is invalid, the replica
        is in use, promoted, damaged or of another source, or if disks, sizes or images differ.
        """
        directory = store.replica_path(name)
        check_text("source id", source_id)
        check_disks(disks)
        fresh = new_manifest(source_id, disks)
        files = store.files
        with store.claiming(name):
            status: Status = "existing"
            with clear_errors(f"cannot open replica {directory}"):
                is_new = not os.path.lexists(directory) or not any(directory.iterdir())
            if is_new:
                create_replica(files, directory, fresh)
                status = "new"
            manifest = read_manifest(directory)
            if manifest is not None:
                _compare_with_manifest(name, manifest, source_id, disks)
            ordered = _in_order(manifest, disks)
            fds = open_images(directory, ordered)
            try:
                with clear_errors(f"cannot open replica {directory}"):
                    if manifest is None:
                        (directory / PRIVATE_DIRECTORY).mkdir(exist_ok=True)
                        write_manifest(files, directory, fresh)
                        files.sync_directory(directory)
                        manifest = fresh
                    manifest = recover(files, directory, manifest, fds)
                    keep = store.keep or manifest.keep
                    claimed = msgspec.structs.replace(
                        manifest, source_id=source_id, disks=ordered, keep=keep
                    )
                    if claimed != manifest:
                        write_manifest(files, directory, claimed)
                        manifest = claimed
                numbers = [ordered.index(disk) for disk in disks]
                return cls(store, directory, manifest, fds, status, numbers)
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise

    @classmethod
    def load(cls, store: Store, name: str) -> Replica:
        """Open an existing replica in whatever state, as resolving a lost cutover answer needs.

        The images of a promoted replica are left alone: nothing reads or writes them here.
        Raises FuseDiskError if it does not exist, is in use or damaged, or lacks an image.
        """
        directory = store.replica_path(name)
        with store.claiming(name):
            manifest = read_manifest(directory)
            if manifest is None:
                raise FuseDiskError(f"no replica {name!r} in store {store.path}; check the name")
            # Promoted images belong to their guest, who may have resized or moved them; that must
            # not stand in the way of telling the source that the cutover took place.
            promoted = manifest.state == "promoted"
            fds = [] if promoted else open_images(directory, manifest.disks)
            try:
                with clear_errors(f"cannot open replica {directory}"):
                    manifest = recover(store.files, directory, manifest, fds)
                return cls(store, directory, manifest, fds, "existing")
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise

    @property
    def name(self) -> str:
        """The replica's name in its store."""
        return self._directory.name

    @property
    def manifest(self) -> Manifest:
        """What is durably recorded; an immutable snapshot."""
        return self._manifest

    def write(
        self, disk: int, offset: int, data: bytes | memoryview, digest: bytes | None = None
    ) -> None:
        """Take `data` for byte `offset` of disk number `disk`; durable with `commit`.

        `digest` is the xxh3-128 of `data` where the caller has checked it.
        Raises FuseDiskError outside the disk, outside a pass (see `begin`), or on an I/O error;
        TargetFull drops the pass.
        """
        view = memoryview(data)
        with self._dropping_if_full(), self._sharing():
            self._require_changeable()
            disk, fd = self._range(disk, offset, view.nbytes)
            with clear_errors(f"cannot write to image {self._image(disk)}"):
                if self._receiving is None:
                    self._files.write(fd, [view], offset)
                elif view.nbytes:
                    # Invariant: applying what was committed never ends for want of room.
                    self._files.reserve(fd, offset, view.nbytes)
                    self._receiving.data(disk, offset, view, digest)

    def zero(self, disk: int, offset: int, length: int) -> None:
        """Take it that `length` bytes at byte `offset` of disk number `disk` read as zeros.

        The room is given back where the filesystem can; what is a hole already is not touched.
        Raises FuseDiskError outside the disk, outside a pass (see `begin`), or on an I/O error;
        TargetFull drops the pass.
        """
        with self._dropping_if_full(), self._sharing():
            self._require_changeable()
            disk, fd = self._range(disk, offset, length)
            with clear_errors(f"cannot zero a range of image {self._image(disk)}"):
                if self._receiving is None:
                    self._files.zero(fd, offset, length)
                else:
                    self._receiving.zero(disk, offset, length)

    def hashes(
        self, disk: int, offset: int, length: int, seed: int, block: int = 65536
    ) -> list[HashSegment]:
        """Hash `length` bytes at byte `offset` with xxh3_128 and `seed`, per `block` bytes.

        The segments cover the range in order, without gaps, each beginning at a multiple of
        `block`. Only at the end of the disk may a length, and so the last block, fall short of it.
        They show the last committed point, also while a pass is received, once there is one.
        Raises FuseDiskError outside the disk, for an unaligned range, if promoted, or on an I/O
        error.
        """
        check_power_of_two("hash block size", block)
        if not 0 <= seed < 2**64:
            raise FuseDiskError(f"hash seed {seed} must be 0 to 2^64 - 1")
        with self._at_rest(), self._sharing():
            self._require_not_promoted()
            disk, fd = self._range(disk, offset, length)
            end = offset + length
            if offset % block or (end % block and end != self._manifest.disks[disk].size):
                raise FuseDiskError(
                    f"hash range of {length} bytes at {offset} must begin and end at a multiple "
                    f"of {block}, or end with the disk"
                )
            with clear_errors(f"cannot read image {self._image(disk)}"):
                return list(hash_segments(fd, offset, length, seed, block))

    def begin(self, epoch: int, generation: str | None = None) -> None:
        """Begin a pass towards `epoch`; one that was cut off is dropped and may be begun again.

        What a checkpoint noted of (`generation`, `epoch`) holds on, of any other it is forgotten.

        Before the first point, what the images are to go through is recorded durably. Raises
        FuseDiskError if the replica is promoted.
        """
        check_epoch(epoch)
        with self._dropping_if_full(), self._excluding():
            self._require_not_promoted()
            self._drop_pass()
            manifest = self._manifest
            if manifest.state == "filling":
                filled = manifest.filled
                # Invariant: before the images take anything of another pass, nothing is claimed
                # any more of the one before.
                if filled is not None and (filled.generation, filled.epoch) != (generation, epoch):
                    filled = None
                if not manifest.applying or filled != manifest.filled:
                    self._record(msgspec.structs.replace(manifest, applying=True, filled=filled))
                self._filling = epoch
                return
            generation, last = manifest.committed
            header = JournalHeader(uuid.uuid4().hex, manifest.source_id, generation, last, epoch)
            # Invariant: the slot of a committed journal is not touched before it is applied.
            (slot, *_) = (
                s for s in SLOTS if manifest.journal is None or s != manifest.journal.slot
            )
            with clear_errors(f"cannot begin a journal for replica {self.name!r}"):
                self._receiving = JournalWriter(self._files, self._directory, slot, header)

    @property
    def filled(self) -> Filled | None:
        """How far a pass to the first point came that was cut off; None where that is not known."""
        filled = self._manifest.filled
        return filled if filled is not None and filled.order == self._order() else None

    def checkpoint(self, generation: str, epoch: int, disk: int, offset: int) -> None:
        """Note durably that the pass to the first point is there up to byte `offset` of a disk.

        Covers the writes that returned before. Without effect in any other pass. Raises
        FuseDiskError on an I/O error.
        """
        check_text("generation", generation)
        with self._dropping_if_full():
            self._checkpoint(generation, epoch, disk, offset)

    def _checkpoint(self, generation: str, epoch: int, disk: int, offset: int) -> None:
        with self._sharing():
            if self._manifest.state != "filling" or self._filling != epoch:
                return
            self._range(disk, offset, 0)
            # Invariant: what the manifest claims to be there is durable before it says so.
            self._sync_images()
        with self._excluding():
            # The pass may have ended meanwhile, or another one begun.
            if self._manifest.state == "filling" and self._filling == epoch:
                filled = Filled(generation, epoch, disk, offset, self._order())
                self._record(msgspec.structs.replace(self._manifest, filled=filled))

    def _order(self) -> list[str]:
        return [self._manifest.disks[number].name for number in self._numbers]

    def commit(
        self, generation: str, epoch: int, now: float | None = None, *, consistent: bool = True
    ) -> None:
        """Make the pass durable and record it as the replica's point; call `apply` then.

        Before the first point a pass may be no state that the disks ever had (not `consistent`): it
        is recorded as the base of the next one, and the replica goes on to count as filling.

        `now` is the time recorded with it, in Unix seconds; default: the clock's.

        Waits for the apply of the pass before it. Raises FuseDiskError outside a pass, if promoted,
        if the epoch goes back within its generation, or if the filesystem reports an error; after
        the last, the replica has to be opened again. TargetFull drops the pass.
        """
        check_text("generation", generation)
        check_epoch(epoch)
        with self._dropping_if_full(), self._at_rest(), self._excluding():
            self._require_changeable()
            last = self._manifest
            now = time.time() if now is None else now
            if not consistent and last.state != "filling":
                # Invariant: the images at rest are always a state that the disks had.
                raise FuseDiskError(f"replica {self.name!r} takes only passes of one instant")
            if last.generation == generation and last.epoch is not None and epoch < last.epoch:
                raise FuseDiskError(
                    f"replica {self.name!r} holds epoch {last.epoch} and cannot go back to "
                    f"{epoch}; compare the disks again"
                )
            if self._receiving is not None and self._receiving.records:
                with clear_errors(f"cannot sync journal {self._receiving.path}"):
                    ref = self._receiving.seal(generation, epoch, now)
                # Invariant: from here on the journal may be named by a manifest, so only the next
                # open may drop it.
                self._receiving.close()
                self._receiving = None
                # Invariant: this record is the commit; nothing is acknowledged or applied before.
                points = before_commit(last.points, parse_policy(last.keep), now, self._pinned())
                self._record(
                    msgspec.structs.replace(last, applying=True, journal=ref, points=points)
                )
                return
            self._drop_pass()
            if last.state == "filling":
                self._sync_images()
            self._filling = None
            if not consistent:
                based = msgspec.structs.replace(
                    last, generation=generation, epoch=epoch, applying=False, filled=None
                )
                self._record(based)
                return
            self._record(
                msgspec.structs.replace(
                    last,
                    generation=generation,
                    epoch=epoch,
                    state="following",
                    applying=False,
                    filled=None,
                    points=[
                        *before_commit(last.points, parse_policy(last.keep), now, self._pinned()),
                        Point(last.next_point, generation, epoch, now),
                    ],
                    next_point=last.next_point + 1,
                )
            )

    def apply(self) -> None:
        """Bring the images to the committed point, durably, and let go of points not to be kept.

        Another thread may receive the next pass meanwhile. Raises FuseDiskError on an I/O error;
        the replica has then to be opened again, which applies it again.
        """
        with self._at_rest():
            self._thin()

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
                self._files, self._directory, manifest, self._fds, self._record_points
            )
        except JournalDamaged as damage:
            report_damage(self._directory, damage, len(manifest.points))
            with self._excluding():
                self._record(unknown(self._manifest))
                self._unusable = "lost a pass to a damaged journal; open it again and compare"
            raise
        except FuseDiskError:
            with self._condition:
                self._unusable = "failed to apply a pass; open it again"
            raise
        with self._excluding():
            # Invariant: the images are durable at this point before the manifest says so, and
            # the manifest before the journal goes.
            self._record(applied(self._manifest, points))
        assert manifest.journal is not None
        with clear_errors(f"cannot remove the applied journal of replica {self.name!r}"):
            remove_journals(self._files, self._directory, [manifest.journal.slot])

    def _record_points(self, points: list[Point]) -> None:
        with self._excluding():
            self._record(msgspec.structs.replace(self._manifest, points=points))

    def _pinned(self) -> frozenset[int]:
        with clear_errors(f"cannot look who reads replica {self.name!r}"):
            return pinned_points(self._store.path, self.name)

    def _thin(self) -> None:
        """Let go of the points that the policy no longer keeps; `_apply_mutex` is held."""
        policy, pinned = parse_policy(self._manifest.keep), self._pinned()
        while True:
            step = thin_one(self._files, self._directory, self._manifest, policy, pinned)
            if step is None:
                return
            self._record_points(step)
            with clear_errors(f"cannot remove a recovery point of replica {self.name!r}"):
                remove_unlisted(self._files, self._directory, step)

    def promote(self, token: str, epoch: int) -> None:
        """Make the replica authoritative at `epoch` for the cutover `token`; durable on return.

        Repeating it with the same token and epoch changes nothing. Raises FuseDiskError if the
        replica is not at rest at that epoch, the token was aborted, or it is promoted otherwise.
        """
        check_text("cutover token", token)
        check_epoch(epoch)
        with self._at_rest(), self._excluding():
            manifest = self._manifest
            what = f"replica {self.name!r} cannot be promoted"
            if manifest.state == "promoted" and manifest.token != token:
                raise FuseDiskError(
                    f"{what}: another cutover ({manifest.token!r}) already did; "
                    "use the replica as it is"
                )
            if token in manifest.aborted_tokens:
                raise FuseDiskError(f"{what}: cutover {token!r} was aborted; start a new cutover")
            if manifest.epoch != epoch:
                raise FuseDiskError(
                    f"{what}: it holds epoch {manifest.epoch}, not {epoch}; "
                    "replicate once more, then start a new cutover"
                )
            if manifest.state == "promoted":
                return
            if manifest.state != "following":
                raise FuseDiskError(f"{what}: its first fill is not complete; let it finish")
            if self._receiving is not None:
                raise FuseDiskError(f"{what}: a pass is half received; replicate until it commits")
            self._promote(token)

    def take_over(self, token: str, *, force: bool) -> None:
        """Make the replica the disk without its source; durable on return.

        Repeating it changes nothing. Raises FuseDiskError if there is no whole point, unless
        `force` is given, or on an I/O error.
        """
        check_text("token", token)
        with self._at_rest(), self._excluding():
            manifest = self._manifest
            if manifest.state == "promoted":
                return
            if manifest.state == "filling" and not force:
                raise FuseDiskError(
                    f"replica {self.name!r} has no whole point: its images are no state that the "
                    "disks ever had; --force takes them as they are, check them before use"
                )
            self._drop_pass()
            self._promote(token)

    def roll_back(self, point_id: int) -> None:
        """Bring the images back to a recovery point, by a journal made of the undo records.

        So a crash leaves the one or the other point, and the images are as if the pass to the
        point were the last one received. Raises FuseDiskError if the point is not there, or there
        is no room; then nothing has changed.
        """
        with self._at_rest():
            with self._excluding():
                self._require_not_promoted()
                self._drop_pass()
                manifest = self._manifest
            with clear_errors(f"cannot roll replica {self.name!r} back"):
                ref = rollback_journal(
                    self._files, self._directory, manifest, self._fds, point_id, time.time()
                )
            if ref is None:
                return
            with self._excluding():
                # Invariant: as in `commit`, this record alone makes the journal count.
                self._record(msgspec.structs.replace(manifest, applying=True, journal=ref))
            self._apply(self._manifest)

    def _promote(self, token: str) -> None:
        """Record the promotion; the replica is at rest and nobody shares it."""
        # Promoted implies applied and synced: nothing of ours flushes these images afterwards.
        self._sync_images()
        try:
            stamps = [stamp(fd) for fd in self._fds]
            # Invariant: an adopted image loses its fence only while the manifest still refuses
            # mounts, and before it allows them.
            clear_image_fences(self._files, self._directory, self._manifest)
        except OSError as error:
            raise FuseDiskError(
                f"cannot promote replica {self.name!r}: {error.strerror}; it is a replica still"
            ) from error
        self._record(
            msgspec.structs.replace(
                self._manifest,
                state="promoted",
                token=token,
                applying=False,
                filled=None,
                promoted_at=time.time(),
                stamps=stamps,
            )
        )

    def abort(self, token: str) -> None:
        """Record durably that the cutover `token` never promotes this replica.

        The last 16 aborted tokens are kept. Raises FuseDiskError if it was promoted with `token`.
        """
        check_text("cutover token", token)
        with self._excluding():
            manifest = self._manifest
            if manifest.token == token:
                raise FuseDiskError(
                    f"cutover {token!r} cannot be aborted: replica {self.name!r} is promoted "
                    "with it; go on at the target"
                )
            if token not in manifest.aborted_tokens:
                kept = [*manifest.aborted_tokens, token][-MAX_ABORTED_TOKENS:]
                self._record(msgspec.structs.replace(manifest, aborted_tokens=kept))

    def close(self) -> None:
        """Close the images after the calls under way; nothing is synced, and a pass not committed
        is dropped. Repeating it is fine."""
        with self._apply_mutex, self._alone():
            if self._closed:
                return
            self._closed = True
            try:
                self._drop_pass()
            finally:
                for fd in self._fds:
                    # Errors of a write show in fsync, which decides; a close adds nothing.
                    with suppress(OSError):
                        os.close(fd)
                self._fds = []
                self._numbers = []
                self._unusable = "is closed"
                self._store.release(self.name)

    def __enter__(self) -> Replica:
        """Return the replica itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the replica."""
        self.close()

    def _image(self, disk: int) -> Path:
        return self._directory / self._manifest.disks[disk].name

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

    def _require_changeable(self) -> None:
        self._require_not_promoted()
        # A manifest that names a point must not lie about the images, not even for one write.
        if self._manifest.state == "following" and self._receiving is None:
            raise FuseDiskError(f"replica {self.name!r} is at rest; begin a pass before writing")

    def _drop_pass(self) -> None:
        if self._receiving is not None:
            self._receiving.drop()
            self._receiving = None

    @contextmanager
    def _dropping_if_full(self) -> Iterator[None]:
        """Give the room of an unfinished pass back where the target is full."""
        try:
            yield
        except FuseDiskError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _FULL:
                raise
            with self._alone():
                self._drop_pass()
            freed = self._drop_oldest_point()
            raise TargetFull(
                f"target full: no room for a pass of replica {self.name!r}; "
                + (f"recovery point {freed} was dropped" if freed else "free some at the target")
                + ", the sender tries again"
            ) from error

    def _drop_oldest_point(self) -> int | None:
        """Give the room of the oldest point back; its id, or None where only the newest is left."""
        with self._apply_mutex, self._alone():
            points = self._manifest.points
            if self._unusable is not None or len(points) < 2:
                return None
            oldest = points[0]
            # Before the record, which needs room too: a listed oldest point without its file is
            # taken for dropped.
            with suppress(OSError):
                self._files.unlink(undo_path(self._directory, oldest.id))
            report_lost(self._directory, [oldest], "target full")
            self._record(msgspec.structs.replace(self._manifest, points=points[1:]))
            return oldest.id

    def _sync_images(self) -> None:
        try:
            sync_images(self._files, self._directory, self._manifest, self._fds)
        except FuseDiskError:
            self._unusable = "failed to sync; open it again and repeat the pass"
            raise

    def _record(self, manifest: Manifest) -> None:
        try:
            write_manifest(self._files, self._directory, manifest)
        except OSError as error:
            # Old or new may be on disk now; only reading it again can tell.
            self._unusable = "failed to record its state; open it again"
            raise FuseDiskError(
                f"cannot write manifest {manifest_path(self._directory)}: {error.strerror}"
            ) from error
        self._manifest = manifest

    def _require_usable(self) -> None:
        if self._unusable is not None:
            raise FuseDiskError(f"replica {self.name!r} {self._unusable}")

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
