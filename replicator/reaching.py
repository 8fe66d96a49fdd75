"""How far a pass has come is noted beside what follows of it, one place at a time.

What comes while one is noted waits, but for what a later one says too. A comparison says of its own
epoch that it is complete, and what follows is of a later one that does not reach as far: both wait.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio

from replicator import messages as m
from replicator.manifest import CLAIMS_MAX, Claim
from replicator.received import covers
from replicator.replica import Replica


@dataclass(frozen=True)
class _Note:
    generation: str
    claim: Claim
    passed: bytes
    of: int

    def replaces(self, earlier: _Note) -> bool:
        # What was said of a pass before has no effect any more.
        return earlier.of != self.of or (
            earlier.generation == self.generation and covers(self.claim, earlier.claim)
        )


class Reached:
    """Notes of one session's passes."""

    def __init__(self, replica: Replica, nursery: trio.Nursery) -> None:
        """``nursery`` gets their task, which raises what `Replica.checkpoint` does."""
        self._replica, self._nursery = replica, nursery
        self._waiting: deque[_Note] = deque()
        self._noting = False

    def note(self, at: m.Reached) -> None:
        """All of the pass before a place is written; returns at once."""
        replica = self._replica
        # Invariant: the digest and the pass are those of now, whenever it is noted.
        claim = Claim(at.epoch, at.disk, at.offset)
        note = _Note(at.generation, claim, replica.passed, replica.number)
        waiting = [each for each in self._waiting if not note.replaces(each)]
        # A sender has two waiting at most. One that is left out is not believed, which is safe.
        self._waiting = deque([*waiting, note][:CLAIMS_MAX])
        if not self._noting:
            self._noting = True
            self._nursery.start_soon(self._note)

    async def _note(self) -> None:
        while self._waiting:
            await trio.to_thread.run_sync(self._checkpoint, self._waiting.popleft())
        self._noting = False

    def _checkpoint(self, note: _Note) -> None:
        place = note.claim.epoch, note.claim.disk, note.claim.offset
        self._replica.checkpoint(note.generation, *place, note.passed, of=note.of)
