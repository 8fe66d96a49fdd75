"""The root: a digest over all passes since a chain began, which both ends keep with the epoch.

Each commit folds into it what the pass was: at the source what was sent, at the target what was
stored. So two roots of a few bytes say whether all passes were stored, in order and nothing else.
They say nothing of what the medium has done since: that takes reading both sides again.
"""

from __future__ import annotations

import secrets
from collections import deque

import xxhash

from fusedisk.replicas import Root
from replicator.messages import DIGEST_BYTES, Opened
from replicator.transfers import TransferDigest

# More than can be on their way between two notes of a target.
_CHECKPOINTS_MAX = 1024


def fold(root: bytes, generation: str, epoch: int, passed: TransferDigest) -> bytes:
    """The root after a pass."""
    what = f"{epoch} {passed.count} {generation}".encode()
    return xxhash.xxh3_128_digest(root + passed.value() + what)


class Chain:
    """The source's side, across connections: what root a target must have, where that is known."""

    def __init__(self, root: Root | None = None) -> None:
        """``root`` is the one that was noted for this generation."""
        self.root = root
        """Of the commit that was answered last."""
        self._candidate: Root | None = None
        self._base, self._whole, self._kept = b"", False, b""
        self._checkpoints: deque[bytes] = deque(maxlen=_CHECKPOINTS_MAX)

    def meet(self, opened: Opened, generation: str) -> bool:
        """Take up a target; False where it is at an epoch of ours and not by what we sent.

        It is known to be right only at the root answered last, or at the one whose answer was lost.
        """
        known = [one for one in (self.root, self._candidate) if one and one.epoch == opened.epoch]
        self.root = self._candidate = None
        self._kept = opened.kept or b""
        if opened.generation != generation or opened.root is None or not known:
            return True
        for one in known:
            if bytes.fromhex(one.value) == opened.root:
                self.root = one
                return True
        # Invariant: kept until all is compared and committed, so that a target which was found to
        # be wrong is not believed by the next connection, or process.
        self.root = known[0]
        return False

    @property
    def sent_kept(self) -> bool:
        """Whether what the target keeps of a pass is what this process sent."""
        return self._kept in self._checkpoints

    def begin(self, kind: str, *, continues: bool) -> tuple[TransferDigest, bytes | None]:
        """Begin a pass, on top of what the target keeps if it goes on: its digest, and its root.

        The root is what Begin is to say: None for a pass that the chain goes on with. A copy or a
        comparison of everything begins a chain that is ``whole``.
        """
        anew = kind != "pass" or self.root is None
        self._whole = kind != "pass" or (self.root is not None and self.root.whole)
        if not continues:
            self._checkpoints.clear()
        elif not self.sent_kept:
            # Another process sent that: only the target says what it was.
            self._whole = False
        self._base = secrets.token_bytes(DIGEST_BYTES) if anew else self._value()
        passed = TransferDigest(self._kept if continues else b"")
        return passed, self._base if anew else None

    def checkpoint(self, digest: bytes) -> None:
        """Remember what a target may keep of the pass."""
        self._checkpoints.append(digest)

    def committing(self, generation: str, epoch: int, passed: TransferDigest) -> None:
        """To be called before Commit is sent: its answer may be lost."""
        value = fold(self._base, generation, epoch, passed)
        self._candidate = Root(value.hex(), epoch, self._whole)

    def committed(self) -> None:
        """The commit was answered."""
        self.root, self._candidate = self._candidate, None

    def promise(self) -> bytes | None:
        """The root that a target has to have to be promoted; None where it is not known."""
        return None if self.root is None else self._value()

    def doubt(self) -> None:
        """Nothing is proved by this chain any more."""
        if self.root is not None:
            self.root = Root(self.root.value, self.root.epoch, whole=False)

    @property
    def proves(self) -> bool:
        """Whether a target that has the root is the source, as far as a root can tell."""
        return self.root is not None and self.root.whole

    def _value(self) -> bytes:
        assert self.root is not None
        return bytes.fromhex(self.root.value)
