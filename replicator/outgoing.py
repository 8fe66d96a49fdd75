"""What a sender does with ranges of a disk: batches are read ahead and sent in their order.

Over a socket one thread reads, another sends, and a task only hears now and then what was sent.
Over any other stream, and where there is a rate to keep to, a task sends batch after batch.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from replicator.batches import Ahead, Batch, BatchReader
from replicator.compression import Compressor
from replicator.link import Link
from replicator.messages import Event
from replicator.transfers import Readable

# So long a batch is waited for before the task looks around.
_WAIT_SECONDS = 0.25


class Outgoing:
    """Sends batches over one link."""

    def __init__(
        self,
        link: Link,
        source: Readable,
        compressor: Compressor,
        held: Callable[[], Awaitable[None]],
    ) -> None:
        """``held`` is awaited before each piece of work."""
        self._link, self._compressor, self._held = link, compressor, held
        self._reader = BatchReader(source, compressor)

    async def send(
        self,
        disk: int,
        ranges: Iterable[tuple[int, int]],
        readable: Readable | None,
        going: Callable[[Batch], Sequence[Event]],
        sent: Callable[[Sequence[Batch]], Awaitable[None]],
    ) -> None:
        """Read and send; errors come out in a group.

        ``going`` says what of a batch is sent, as it is about to be, perhaps on a thread. ``sent``
        is told in order which batches were sent; their transfers may be void.
        """
        if not self._link.on_threads:
            async with self._reader.reading(disk, ranges, readable) as batches:
                waiting = trio.current_time()
                async for batch in batches:
                    came = trio.current_time()
                    await self._send_one(batch, going, came - waiting)
                    await sent([batch])
                    waiting = trio.current_time()
                    self._reader.give_back(batch)
            return
        async with self._reader.reading_ahead(disk, ranges, readable) as ahead:
            while not ahead.ended:
                await self._held()
                if self._link.limited:
                    await self._send_next(ahead, going, sent)
                    continue
                run = _Run(ahead, going, self._compressor)
                await self._link.stream(run.more)
                if went := run.sent():
                    await sent(went)

    async def _send_next(
        self,
        ahead: Ahead,
        going: Callable[[Batch], Sequence[Event]],
        sent: Callable[[Sequence[Batch]], Awaitable[None]],
    ) -> None:
        waiting = trio.current_time()
        batch = await trio.to_thread.run_sync(ahead.take, _WAIT_SECONDS)
        if batch is not None:
            await self._send_one(batch, going, trio.current_time() - waiting)
            await sent([batch])
            ahead.give_back(batch)

    async def _send_one(
        self, batch: Batch, going: Callable[[Batch], Sequence[Event]], waited: float
    ) -> None:
        await self._held()
        begun = trio.current_time()
        await self._link.send(*going(batch))
        self._compressor.waited(batch.transfers, waited, trio.current_time() - begun)


class _Run:
    """Gives a link's thread the transfers of batches, and remembers which of these were sent."""

    def __init__(
        self, ahead: Ahead, going: Callable[[Batch], Sequence[Event]], compressor: Compressor
    ) -> None:
        self._ahead, self._going, self._compressor = ahead, going, compressor
        self._batch: Batch | None = None
        self._waiting_since = self._came_at = 0.0
        self._sent: list[Batch] = []

    def more(self, seconds: float) -> Sequence[Event] | None:
        """What follows, where there is any within so many seconds; what came before was sent."""
        self._done()
        self._waiting_since = time.monotonic()
        batch = self._ahead.take(seconds)
        if batch is None:
            return None
        self._came_at = time.monotonic()
        self._batch = batch
        return self._going(batch)

    def sent(self) -> list[Batch]:
        """The batches that were sent; their transfers are void."""
        self._done()
        return self._sent

    def _done(self) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            return
        came = self._came_at
        for_link = time.monotonic() - came
        self._compressor.waited(batch.transfers, came - self._waiting_since, for_link)
        self._ahead.give_back(batch)
        self._sent.append(batch)
