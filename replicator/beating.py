"""Signs of life from a receiver that is busy."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from replicator import messages as m
from replicator.link import Link, LinkLost
from replicator.running import one_error

# Less than half of the shortest --link-timeout.
_BEAT_SECONDS = 0.8


class Beat:
    """A Pong now and then while there is work: a long step must not look like a dead network."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._resting = self._working = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """Meanwhile a thread works beside a task that rests; it says so itself."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Meanwhile it is the peer's turn, and nothing is said."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    async def keep(self) -> None:
        """Say it until the link is lost; who uses the link finds out why."""
        while True:
            await trio.sleep(_BEAT_SECONDS)
            if self._resting and not self._working:
                continue
            # A beat that is cut short would leave half a frame behind.
            with trio.CancelScope(shield=True):
                try:
                    await self._link.send(m.Pong(m.SIGN_OF_LIFE))
                except LinkLost:
                    return


@asynccontextmanager
async def saying_that_it_lives(link: Link) -> AsyncIterator[None]:
    """Beat while the block lasts."""
    with one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Beat(link).keep)
            yield
            nursery.cancel_scope.cancel()
