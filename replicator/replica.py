"""One replica on the target: its disk images, and what may be done to them when.

Until there is a first point a pass goes straight into the images. From then on it goes into a
journal, which a commit makes the replica's next point; the images follow. docs/crash-model.md has
the order of steps and what a crash at each leaves.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec
import xxhash

from fusedisk.errors import FuseDiskError
from replicator.chain import fold
from replicator.checkpoints import CheckpointedReplica
from replicator.clones import ClonePass, preserve
from replicator.holding import Status
from replicator.images import HashSegment, create_replica, hash_segments, open_images
from replicator.journal import SLOTS, JournalDamaged, JournalHeader, JournalWriter
from replicator.manifest import (
    PRIVATE_DIRECTORY,
    Point,
    ReplicaDisk,
    check_disks,
    check_epoch,
    check_power_of_two,
    check_text,
    clear_errors,
    new_manifest,
    read_manifest,
    write_manifest,
)
from replicator.opening import compare_with_manifest, in_order
from replicator.points import before_commit
from replicator.records import Piece
from replicator.recovery import recover
from replicator.retention import parse_policy
from replicator.room import TargetFull
from replicator.transfers import TransferDigest

if TYPE_CHECKING:
    from replicator.store import Store

__all__ = ["Replica", "TargetFull"]


class Replica(CheckpointedReplica):
    """An open replica: passes into it, and its hashes. Any thread may call any method."""

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
                compare_with_manifest(name, manifest, source_id, disks)
            ordered = in_order(manifest, disks)
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

    def write(
        self, disk: int, offset: int, data: bytes | memoryview, digest: bytes | None = None
    ) -> None:
        """Take `data` for byte `offset` of disk number `disk`; durable with `commit`.

        `digest` is the xxh3-128 of `data` where the caller has checked it.
        Raises FuseDiskError outside the disk, outside a pass (see `begin`), or on an I/O error;
        TargetFull ends the pass, where the points that could be dropped are gone already.
        """
        self.write_many([Piece(disk, offset, memoryview(data), digest)])

    def write_many(self, pieces: Sequence[Piece]) -> None:
        """Take data for many places in this order, of a few MiB in all; else as `write`."""
        with self._leaving_if_full():
            self._as_room_is_made(lambda: self._write(pieces))

    def _write(self, pieces: Sequence[Piece]) -> None:
        with self._sharing():
            self._require_changeable()
            placed = [self._placed(piece) for piece in pieces if piece.data.nbytes]
            for disk, group in groupby(placed, key=attrgetter("disk")):
                with clear_errors(f"cannot write to image {self._image(disk)}"):
                    self._take(disk, list(group))
            # Last, since all of it is written again where room had to be made.
            for disk, offset, data, digest in pieces:
                self._stored(disk, offset, data.nbytes, digest or xxhash.xxh3_128_digest(data))

    def _placed(self, piece: Piece) -> Piece:
        disk, _ = self._range(piece.disk, piece.offset, piece.data.nbytes)
        return Piece(disk, *piece[1:])

    def _take(self, disk: int, pieces: Sequence[Piece]) -> None:
        fd = self._fds[disk]
        if self._receiving is None:
            for piece in pieces:
                self._files.write(fd, [piece.data], piece.offset)
            return
        if not self._cloning:
            # Invariant: applying what was committed never ends for want of room.
            for start, end in _joined(pieces):
                self._files.reserve(fd, start, end - start)
        self._receiving.data(pieces)

    def zero(self, disk: int, offset: int, length: int) -> None:
        """Take it that `length` bytes at byte `offset` of disk number `disk` read as zeros.

        The room is given back where the filesystem can; what is a hole already is not touched.
        Raises FuseDiskError outside the disk, outside a pass (see `begin`), or on an I/O error;
        TargetFull ends the pass, as in `write`.
        """
        with self._leaving_if_full():
            self._as_room_is_made(lambda: self._zero(disk, offset, length))

    def _zero(self, disk: int, offset: int, length: int) -> None:
        number = disk
        with self._sharing():
            self._require_changeable()
            disk, fd = self._range(disk, offset, length)
            with clear_errors(f"cannot zero a range of image {self._image(disk)}"):
                if self._receiving is None:
                    self._files.zero(fd, offset, length)
                else:
                    self._receiving.zero(disk, offset, length)
            self._stored(number, offset, length, b"")

    def _stored(self, number: int, offset: int, length: int, content: bytes) -> None:
        # Invariant: only what was written goes into the root; of a journal all is checked once
        # more when it is applied, its heads as a whole.
        with self._condition:
            self._passed.take(number, offset, length, content)

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

    def begin(
        self,
        epoch: int,
        generation: str | None = None,
        data_bytes: int = 0,
        *,
        continues: bool = False,
        based: bool = False,
        root: bytes | None = None,
    ) -> None:
        """Begin a pass towards `epoch`; one that was cut off is dropped and may be begun again.

        What a checkpoint noted of (`generation`, `epoch`) holds on, of any other it is forgotten.
        With `continues` the pass is the one in `received` or `filled`, which goes on. With `root`
        a chain begins, which the pass goes into, else into that of the point before it.

        A pass that is `based` has what changed since the epoch committed last, and no more.

        `data_bytes` is about how much data it will have, if that is known.

        Before the first point, what the images are to go through is recorded durably. Raises
        FuseDiskError if the replica is promoted, TargetFull where a journal would not fit, and
        JournalDamaged where what was to go on is not what was written; it is dropped then. The
        oldest points are dropped to make it fit, but none that is in use.
        """
        check_epoch(epoch)
        if self._cloning:
            # Invariant: a pass is cloned from images at the point committed last.
            with self._at_rest():
                pass
        with self._leaving_if_full():
            with self._excluding():
                self._require_not_promoted()
                self._number += 1
                passed = TransferDigest(self.kept if continues else b"")
                if not continues:
                    self._forget_pass()
            if not self._cloning and self._manifest.state == "following":
                self._make_room_for(data_bytes)
            self._passed, self._base = passed, root
            if continues and self._manifest.state != "filling":
                self._go_on(epoch, generation, based=based)
            else:
                self._begin(epoch, generation, based=based, continues=continues)

    def _begin(self, epoch: int, generation: str | None, *, based: bool, continues: bool) -> None:
        with self._excluding():
            self._require_not_promoted()
            self._begun = True
            manifest = self._manifest
            if manifest.state == "filling":
                based = based and generation is not None and generation == manifest.generation
                # Invariant: before the images take anything of another pass, nothing is claimed
                # any more of the one before.
                filled = self._filled_for(epoch, generation, based=based, continues=continues)
                if not manifest.applying or filled != manifest.filled:
                    self._record(msgspec.structs.replace(manifest, applying=True, filled=filled))
                self._filling, self._based = epoch, based
                return
            self._towards, self._epoch, self._based = generation, epoch, based
            if self._cloning:
                with clear_errors(f"cannot begin a pass for replica {self.name!r}"):
                    before, self._published = self._published, None
                    self._receiving = ClonePass(self._files, self._directory, self._fds, before)
                return
            header = JournalHeader(uuid.uuid4().hex, manifest.source_id, *manifest.committed, epoch)
            # Invariant: the slot of a committed journal is not touched before it is applied, and
            # removed: the pass would lose its file by that.
            taken = {manifest.journal.slot} if manifest.journal else {self._clearing}
            (slot, *_) = (s for s in SLOTS if s not in taken)
            with clear_errors(f"cannot begin a journal for replica {self.name!r}"):
                self._receiving = JournalWriter(self._files, self._directory, slot, header)

    def commit(
        self,
        generation: str,
        epoch: int,
        now: float | None = None,
        *,
        consistent: bool = True,
        frozen: bool = False,
    ) -> None:
        """Make the pass durable and record it as the replica's point; call `apply` then.

        Before the first point a pass may be no state that the disks ever had (not `consistent`): it
        is recorded as the base of the next one, and the replica goes on to count as filling.

        `frozen` is noted with the point: the guest was frozen at its instant.
        `now` is the time recorded with it, in Unix seconds; default: the clock's.

        Waits for the apply of the pass before it. Raises FuseDiskError outside a pass, if promoted,
        if the epoch goes back within its generation, or if the filesystem reports an error; after
        the last, the replica has to be opened again. TargetFull ends the pass.
        """
        check_text("generation", generation)
        check_epoch(epoch)
        with self._leaving_if_full(), self._at_rest(), self._excluding():
            self._require_changeable()
            last, root = self._manifest, None
            base = bytes.fromhex(last.root or "") if self._base is None else self._base
            if base:
                root = fold(base, generation, epoch, self._passed).hex()
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
                points = before_commit(last.points, parse_policy(last.keep), now, self._pinned())
                try:
                    with clear_errors(f"cannot sync {self._receiving.path}"):
                        if self._cloning:
                            points = preserve(self._files, self._directory, self._fds, points)
                        ref = self._receiving.seal(generation, epoch, now)
                        ref = msgspec.structs.replace(ref, frozen=frozen, root=root)
                except JournalDamaged:
                    self._forget_pass()
                    raise
                # Invariant: from here on the journal may be named by a manifest, so only the next
                # open may drop it.
                if isinstance(self._receiving, JournalWriter):
                    self._receiving.close()
                self._committed, self._receiving = self._receiving, None
                # Invariant: this record is the commit; nothing is acknowledged or applied before.
                self._record(
                    msgspec.structs.replace(
                        last, applying=True, journal=ref, points=points, received=None
                    )
                )
                return
            self._drop_pass()
            if last.state == "filling":
                self._sync_images()
            self._filling = None
            if not consistent:
                based = msgspec.structs.replace(
                    last,
                    generation=generation,
                    epoch=epoch,
                    applying=False,
                    filled=None,
                    root=root,
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
                    received=None,
                    points=[
                        *before_commit(last.points, parse_policy(last.keep), now, self._pinned()),
                        Point(last.next_point, generation, epoch, now, frozen=frozen),
                    ],
                    next_point=last.next_point + 1,
                    root=root,
                )
            )

    def apply(self) -> None:
        """Bring the images to the committed point, durably, and let go of points not to be kept.

        Another thread may receive the next pass meanwhile. Raises FuseDiskError on an I/O error;
        the replica has then to be opened again, which applies it again.
        """
        with self._at_rest():
            self._thin()

    def _require_changeable(self) -> None:
        self._require_not_promoted()
        # A manifest that names a point must not lie about the images, not even for one write.
        if self._manifest.state == "following" and self._receiving is None:
            raise FuseDiskError(f"replica {self.name!r} is at rest; begin a pass before writing")


def _joined(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """The ranges of pieces of a disk, as one where a piece begins at the end of another."""
    found: list[tuple[int, int]] = []
    for piece in pieces:
        start, end = piece.offset, piece.offset + piece.data.nbytes
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found
