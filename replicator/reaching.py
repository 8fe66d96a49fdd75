"""How far a pass has come is noted beside what follows of it, one place at a time.

What comes while one is noted waits, the last of them alone: it says more than those before it.
"""

from functools import partial

import trio

from replicator import messages as m
from replicator.replica import Replica


class Reached:
    """Notes of one session's passes."""

    def __init__(self, replica: Replica, nursery: trio.Nursery) -> None:
        """``nursery`` gets their task, which raises what `Replica.checkpoint` does."""
        self._replica, self._nursery = replica, nursery
        self._next: partial[None] | None = None
        self._noting = False

    def note(self, at: m.Reached) -> None:
        """All of the pass before a place is written; returns at once."""
        place = at.generation, at.epoch, at.disk, at.offset
        replica = self._replica
        # Invariant: the digest and the pass are those of now, whenever it is noted.
        self._next = partial(replica.checkpoint, *place, replica.passed, of=replica.number)
        if not self._noting:
            self._noting = True
            self._nursery.start_soon(self._note)

    async def _note(self) -> None:
        while self._next is not None:
            note, self._next = self._next, None
            await trio.to_thread.run_sync(note)
        self._noting = False
