"""How far a pass came, noted while it is received, so that it can go on after it was cut off."""

from __future__ import annotations

import msgspec

from fusedisk.errors import FuseDiskError
from replicator.clones import ClonePass
from replicator.deciding import DecidableReplica
from replicator.journal import JournalDamaged, JournalHeader, JournalWriter
from replicator.manifest import Claim, Filled, Received, check_text, clear_errors
from replicator.messages import HASH_BLOCK_BYTES
from replicator.received import towards, with_claim


class CheckpointedReplica(DecidableReplica):
    """Checkpoints of the pass being received, and going on with one that was cut off."""

    @property
    def filled(self) -> Filled | None:
        """How far a pass to the first point came that was cut off; None where that is not known."""
        filled = self._manifest.filled
        return filled if filled is not None and filled.order == self._order() else None

    @property
    def claims(self) -> list[Claim]:
        """What is there beyond the epoch committed last, of a pass that was cut off."""
        if (filled := self.filled) is not None and filled.based:
            return [Claim(filled.epoch, filled.disk, filled.offset)]
        return [] if self.received is None else self.received.claims

    @property
    def received(self) -> Received | None:
        """What is kept of a pass after the first point that was cut off, until one is begun."""
        received = self._manifest.received
        if received is None or self._begun or received.order != self._order():
            return None
        # The store may have been moved to a filesystem of the other kind.
        return received if (received.clones is not None) == self._cloning else None

    @property
    def towards(self) -> str | None:
        """The generation whose epochs the claims count."""
        return self._manifest.generation if self.received is None else towards(self.received)

    @property
    def kept(self) -> bytes:
        """The digest of the pass that was cut off, as it was noted; empty where there is none."""
        noted = self.filled or self.received
        return bytes.fromhex((noted and noted.digest) or "")

    @property
    def kept_bytes(self) -> int:
        """How much room the journal of that pass takes; clones hold nothing twice, and count 0."""
        return 0 if self.received is None else self.received.length

    @property
    def number(self) -> int:
        """Of the pass being received, counted since the replica was opened."""
        return self._number

    @property
    def passed(self) -> bytes:
        """The digest of the pass being received, as far as it is written."""
        with self._condition:
            return self._passed.value()

    def checkpoint(
        self,
        generation: str,
        epoch: int,
        disk: int,
        offset: int,
        passed: bytes = b"",
        *,
        of: int | None = None,
    ) -> None:
        """Note durably that the pass is there up to byte `offset` of a disk, where it was `passed`.

        "There" is what nobody wrote after `epoch`. Covers the writes that returned before. Without
        effect in a pass towards another generation, and in another than the one with the number
        `of` (see `number`). Raises FuseDiskError on an I/O error.
        """
        check_text("generation", generation)
        of = self._number if of is None else of
        with self._leaving_if_full():
            filling = self._manifest.state == "filling"
            note = self._checkpoint_fill if filling else self._checkpoint_pass
            note(generation, Claim(epoch, disk, offset), passed.hex() or None, of)

    def _checkpoint_fill(self, generation: str, at: Claim, passed: str | None, of: int) -> None:
        with self._sharing():
            # Invariant: nothing is claimed of a pass that was said of the one before it.
            if of != self._number or not self._is_filled_by(generation, at.epoch):
                return
            self._range(at.disk, at.offset, 0)
            # Invariant: what the manifest claims to be there is durable before it says so.
            self._sync_images()
        with self._excluding():
            # The pass may have ended meanwhile, or another one begun.
            if of == self._number and self._is_filled_by(generation, at.epoch):
                self._record(
                    msgspec.structs.replace(
                        self._manifest, filled=self._as_filled(generation, at, passed)
                    )
                )

    def _is_filled_by(self, generation: str, epoch: int) -> bool:
        """Whether the pass under way leads to the first point, from its base or to that epoch."""
        if self._manifest.state != "filling" or self._filling is None:
            return False
        return generation == self._manifest.generation if self._based else epoch == self._filling

    def _filled_for(
        self, epoch: int, generation: str | None, *, based: bool, continues: bool
    ) -> Filled | None:
        """What holds on of the pass before while another one fills the images."""
        filled = self._manifest.filled
        if filled is None or filled.based != based:
            return None
        if based:
            # A sequel touches nothing that was not written after the claim's epoch.
            return filled if continues else None
        return filled if (filled.generation, filled.epoch) == (generation, epoch) else None

    def _as_filled(self, generation: str, at: Claim, passed: str | None) -> Filled:
        before = self._manifest.filled
        place = at.disk, at.offset
        if self._based and before is not None and (before.disk, before.offset) > place:
            # Each claim holds by itself; the one that reaches farther saves more.
            at = Claim(before.epoch, before.disk, before.offset)
        return Filled(
            *(generation, at.epoch, at.disk, at.offset, self._order(), passed), based=self._based
        )

    def _checkpoint_pass(self, generation: str, claim: Claim, passed: str | None, of: int) -> None:
        with self._sharing():
            receiving = self._receiving
            # Invariant: the epochs of claims are counted by the marks of one generation.
            if receiving is None or of != self._number or self._towards != generation:
                return
            self._range(claim.disk, claim.offset, 0)
            received = self._synced(receiving)
        with self._excluding():
            if self._receiving is not receiving:
                return
            before = self._manifest.received
            claims = [] if before is None else before.claims
            if not self._is_of_comparison(claims, claim):
                return
            claims = with_claim(claims, claim)
            received = msgspec.structs.replace(received, claims=claims, digest=passed)
            self._record(msgspec.structs.replace(self._manifest, received=received))

    def _is_of_comparison(self, claims: list[Claim], claim: Claim) -> bool:
        """Whether a claim may stand beside those that there are, where the pass compares.

        Invariant: whoever goes on compares beyond the farthest claim, and sends what was written
        after its epoch. What is kept for there was read after the epoch that the comparison began
        with, so that is its epoch until the comparison is known to be complete.
        """
        if self._based or claim.epoch == self._epoch:
            return True
        return any(self._is_whole(each) for each in (claim, *claims))

    def _is_whole(self, claim: Claim) -> bool:
        last = len(self._numbers) - 1
        end = self._manifest.disks[self._numbers[last]].size
        return (claim.disk, claim.offset) >= (last, end)

    def _synced(self, receiving: JournalWriter | ClonePass) -> Received:
        """Make durable what the pass has; what to note of it, but for the claims."""
        generation, epoch = self._manifest.committed
        assert generation is not None and epoch is not None
        noted = Received(
            *(receiving.id, generation, epoch, self._order(), []),
            towards=self._towards,
            compared=not self._based,
        )
        try:
            # Invariant: what the manifest claims to be there is durable before it says so.
            if isinstance(receiving, ClonePass):
                return msgspec.structs.replace(noted, clones=receiving.sync())
            slot, length = receiving.slot, receiving.sync()
            return msgspec.structs.replace(noted, slot=slot, length=length)
        except OSError as error:
            # The kernel reports a lost write once: a second sync would lie.
            self._give_up("failed to sync; open it again and repeat the pass", error)
            raise FuseDiskError(f"cannot sync {receiving.path}: {error.strerror}") from error

    def _go_on(self, epoch: int, generation: str | None, *, based: bool) -> None:
        """Take up the pass that is kept, which is dropped if it is not what was written."""
        with self._excluding():
            self._require_not_promoted()
            try:
                self._take_up(generation, based=based)
            except JournalDamaged:
                self._forget_pass()
                raise
            self._begun, self._based = True, based
            self._towards, self._epoch = generation, epoch

    def _take_up(self, generation: str | None, *, based: bool) -> None:
        received = self.received
        if received is None or (towards(received), not received.compared) != (generation, based):
            raise FuseDiskError(f"replica {self.name!r} keeps no pass to go on with; begin anew")
        with clear_errors(f"cannot go on with a pass for replica {self.name!r}"):
            if received.clones is not None:
                self._receiving = ClonePass(self._files, self._directory, self._fds, kept=received)
                if received.compared:
                    self._uncompare(self._receiving, received.claims[0])
                return
            base = received.generation, received.epoch
            header = JournalHeader(received.id, self._manifest.source_id, *base, received.epoch)
            self._receiving = JournalWriter(
                self._files, self._directory, received.slot, header, received.length
            )

    def _uncompare(self, receiving: ClonePass, farthest: Claim) -> None:
        """Make a pass what its point is beyond the place that it was compared up to.

        Invariant: what was sent beyond it may be torn, and nobody need have written there since.
        The sender compares with the point, so it may find nothing there that it would send again.
        (A journal has no torn record; what one says was the source's then, or was written since.)
        """
        for number, disk in enumerate(self._numbers):
            start = farthest.offset if number == farthest.disk else 0
            if number >= farthest.disk:
                receiving.take_back(disk, start // HASH_BLOCK_BYTES * HASH_BLOCK_BYTES)

    def _order(self) -> list[str]:
        return [self._manifest.disks[number].name for number in self._numbers]
