"""How far a pass came, noted while it is received, so that it can go on after it was cut off."""

from __future__ import annotations

import msgspec

from fusedisk.errors import FuseDiskError
from replicator.clones import ClonePass
from replicator.deciding import DecidableReplica
from replicator.journal import JournalDamaged, JournalHeader, JournalWriter
from replicator.manifest import Claim, Filled, Received, check_text, clear_errors
from replicator.received import with_claim


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
    def kept(self) -> bytes:
        """The digest of the pass that was cut off, as it was noted; empty where there is none."""
        noted = self.filled or self.received
        return bytes.fromhex((noted and noted.digest) or "")

    @property
    def passed(self) -> bytes:
        """The digest of the pass being received, as far as it is written."""
        with self._condition:
            return self._passed.value()

    def checkpoint(
        self, generation: str, epoch: int, disk: int, offset: int, passed: bytes = b""
    ) -> None:
        """Note durably that the pass is there up to byte `offset` of a disk, where it was `passed`.

        "There" is what nobody wrote after `epoch`. Covers the writes that returned before. Without
        effect in a pass that goes from one history to another. Raises FuseDiskError on an I/O
        error.
        """
        check_text("generation", generation)
        with self._dropping_if_full():
            filling = self._manifest.state == "filling"
            note = self._checkpoint_fill if filling else self._checkpoint_pass
            note(generation, Claim(epoch, disk, offset), passed.hex() or None)

    def _checkpoint_fill(self, generation: str, at: Claim, passed: str | None) -> None:
        with self._sharing():
            begun = self._filling
            if not self._is_filled_by(generation, at.epoch):
                return
            self._range(at.disk, at.offset, 0)
            # Invariant: what the manifest claims to be there is durable before it says so.
            self._sync_images()
        with self._excluding():
            # The pass may have ended meanwhile, or another one begun.
            if self._filling == begun and self._is_filled_by(generation, at.epoch):
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

    def _checkpoint_pass(self, generation: str, claim: Claim, passed: str | None) -> None:
        with self._sharing():
            receiving = self._receiving
            if receiving is None or self._manifest.committed[0] != generation:
                return
            self._range(claim.disk, claim.offset, 0)
            received = self._synced(receiving)
        with self._excluding():
            if self._receiving is not receiving:
                return
            before = self._manifest.received
            claims = with_claim([] if before is None else before.claims, claim)
            received = msgspec.structs.replace(received, claims=claims, digest=passed)
            self._record(msgspec.structs.replace(self._manifest, received=received))

    def _synced(self, receiving: JournalWriter | ClonePass) -> Received:
        """Make durable what the pass has; what to note of it, but for the claims."""
        generation, epoch = self._manifest.committed
        assert generation is not None and epoch is not None
        noted = Received(receiving.id, generation, epoch, self._order(), [])
        try:
            # Invariant: what the manifest claims to be there is durable before it says so.
            if isinstance(receiving, ClonePass):
                return msgspec.structs.replace(noted, clones=receiving.sync())
            slot, length = receiving.slot, receiving.sync()
            return msgspec.structs.replace(noted, slot=slot, length=length)
        except OSError as error:
            # The kernel reports a lost write once: a second sync would lie.
            self._unusable = "failed to sync; open it again and repeat the pass"
            raise FuseDiskError(f"cannot sync {receiving.path}: {error.strerror}") from error

    def _go_on(self, generation: str | None) -> None:
        """Take up the pass that is kept, which is dropped if it is not what was written."""
        with self._excluding():
            self._require_not_promoted()
            try:
                self._take_up(generation)
            except JournalDamaged:
                self._forget_pass()
                raise
            self._begun = True

    def _take_up(self, generation: str | None) -> None:
        received = self.received
        if received is None or received.generation != generation:
            raise FuseDiskError(f"replica {self.name!r} keeps no pass to go on with; begin anew")
        with clear_errors(f"cannot go on with a pass for replica {self.name!r}"):
            if received.clones is not None:
                self._receiving = ClonePass(self._files, self._directory, self._fds, kept=received)
                return
            base = received.generation, received.epoch
            header = JournalHeader(received.id, self._manifest.source_id, *base, received.epoch)
            self._receiving = JournalWriter(
                self._files, self._directory, received.slot, header, received.length
            )

    def _order(self) -> list[str]:
        return [self._manifest.disks[number].name for number in self._numbers]
