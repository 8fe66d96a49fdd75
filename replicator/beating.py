"""Signs of life from a receiver that is busy."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from replicator import messages as m
from replicator.link import Link
from replicator.running import one_error

# Less than half of the shortest --link-timeout.
_BEAT_SECONDS = 0.8


@asynccontextmanager
async def saying_that_it_lives(link: Link) -> AsyncIterator[None]:
    """Send a Pong now and then: a long sync must not look like a dead network."""

    async def beat() -> None:
        while True:
            await trio.sleep(_BEAT_SECONDS)
            # A beat that is cut short would leave half a frame behind.
            with trio.CancelScope(shield=True):
                await link.send(m.Pong(0))

    with one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            yield
            nursery.cancel_scope.cancel()
