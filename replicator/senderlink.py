"""The sender's end of a link: one task reads all the time, and what is written keeps to a rate.

The conversation expects an answer only now and then, but the receiver may ask at any time whether
somebody is there. So `listen` reads throughout: it answers a Ping itself and queues the rest for
whoever waits in `receive`.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import Sent
from replicator.link import Buffer, Link, LinkLost, raise_failed
from replicator.messages import (
    SIGN_OF_LIFE,
    Bye,
    Commit,
    Committed,
    Event,
    Failed,
    LocalProtocolError,
    Ping,
    Pong,
    Promote,
    Promoted,
    RemoteProtocolError,
)
from replicator.ratelimit import TokenBucket
from replicator.stalling import Answers

# One answer is outstanding at a time; a peer that says more than a few things has to wait.
_QUEUED_EVENTS_MAX = 16
_LAST_WORD_SECONDS_MAX = 1.0
KEEPALIVE_SECONDS = 5.0
"""How often the target is asked whether its disk answers."""


class Pace:
    """A token bucket that tasks can wait for, and whose rate can change meanwhile."""

    def __init__(self, rate: int | None) -> None:
        self.bucket = TokenBucket(rate, trio.current_time)
        self._changed = trio.Event()

    def set_rate(self, rate: int | None) -> None:
        """Change the rate, also for those who wait."""
        self.bucket.set_rate(rate)
        self._changed.set()
        self._changed = trio.Event()

    async def ready(self) -> None:
        """Wait until bytes may be sent."""
        while seconds := self.bucket.delay():
            with trio.move_on_after(seconds):
                await self._changed.wait()


class SenderLink(Link):
    """A Link whose `listen` must run for as long as it is used."""

    def __init__(
        self, stream: trio.abc.Stream, pace: Pace, sent: Sent, silence_seconds_max: float
    ) -> None:
        super().__init__(stream, "sender", silence_seconds_max)
        self._pace, self._sent = pace, sent
        self._queue, self._events = trio.open_memory_channel[Event](_QUEUED_EVENTS_MAX)
        self._failure: Exception | None = None
        self._last_word: Event | None = None
        self._ended = trio.Event()
        self.answers = Answers(trio.current_time, self._unsent)
        self.on_moved = self.answers.moved
        self._keepalives: set[int] = set()
        self._waits = False
        self.on_end: Callable[[], None] = lambda: None

    async def listen(self) -> None:
        """Read until the connection ends; why it did is raised by `send` and `receive`."""
        try:
            while self._last_word is None:
                event = await super().receive()
                if isinstance(event, Ping):
                    self.answers.heard()
                    await super().send(Pong(event.nonce))
                    continue
                self.answers.heard(_question(event))
                if isinstance(event, Pong) and event.nonce in self._keepalives:
                    self._keepalives.discard(event.nonce)
                    continue
                if isinstance(event, Pong) and event.nonce == SIGN_OF_LIFE:
                    self._pass_on(event)
                    continue
                if isinstance(event, Failed | Bye):
                    self._last_word = event
                await self._queue.send(event)
        except (LinkLost, LocalProtocolError, RemoteProtocolError, FuseDiskError, OSError) as error:
            self._failure = error
        finally:
            # Invariant: whoever learns of the end finds the reason.
            self._queue.close()
            self._ended.set()
            self.on_end()

    def _pass_on(self, sign: Pong) -> None:
        # Whoever waits for an answer waits on; kept for nobody, signs would fill the queue during
        # a long pass, and no more would be read.
        if self._events.statistics().tasks_waiting_receive:
            self._queue.send_nowait(sign)

    async def keep_asking(self) -> None:
        """Ask now and then whether the target's disk answers; the session has to be open."""
        try:
            while True:
                await trio.sleep(KEEPALIVE_SECONDS)
                if not self.answers.outstanding:
                    nonce = 1 + secrets.randbits(32)
                    self._keepalives.add(nonce)
                    await self.send(Ping(nonce))
        except (LinkLost, LocalProtocolError, RemoteProtocolError, FuseDiskError, OSError):
            # Whoever converses learns of it too.
            return

    async def receive(self) -> Event:
        """The next event but Pings. Raises LinkLost at the end, RemoteProtocolError."""
        try:
            return await self._events.receive()
        except trio.EndOfChannel:
            self.raise_ended()
            raise LinkLost("the connection was lost") from None

    async def send(self, *events: Event) -> None:
        """Raises why the conversation ended, where the peer said so: Refused or LinkLost."""
        async with self._ending_explained():
            await super().send(*events)

    async def stream(self, more: Callable[[float], Sequence[Event] | None]) -> None:
        """As `Link.stream` does, until there is a rate to keep to. Raises as `send` does."""
        async with self._ending_explained():
            await super().stream(lambda seconds: None if self.limited else more(seconds))

    @asynccontextmanager
    async def _ending_explained(self) -> AsyncIterator[None]:
        self.raise_ended()
        try:
            yield
        except (LinkLost, LocalProtocolError):
            # The peer's reason may be waiting to be read.
            with trio.move_on_after(_LAST_WORD_SECONDS_MAX):
                await self._ended.wait()
            self.raise_ended()
            raise

    @property
    def limited(self) -> bool:
        """Whether what is sent has to keep to a rate."""
        return self._pace.bucket.rate is not None

    def raise_ended(self) -> None:
        """Raise why the conversation ended, if it did."""
        if isinstance(self._last_word, Failed):
            raise_failed(self._last_word)
        if self._last_word is not None:
            raise LinkLost("the receiver is shutting down")
        if isinstance(self._failure, LocalProtocolError):
            raise LinkLost("the connection was lost")
        if self._failure is not None:
            raise self._failure

    def _going(self, events: Sequence[Event]) -> None:
        # Not before: who asks may have waited for long until those before had sent theirs.
        for event in events:
            if isinstance(event, Ping | Commit | Promote):
                self.answers.asked(_question(event))

    async def _write(self, buffers: Sequence[Buffer]) -> None:
        try:
            await self._write_paced(buffers)
        finally:
            self.answers.writing(False)

    async def _send_stream(self, more: Callable[[float], Sequence[Event] | None]) -> None:
        try:
            await super()._send_stream(more)
        finally:
            if self._waits:
                self._waits = False
                self.answers.writing(False)

    def _took(self, count: int) -> None:
        super()._took(count)
        self._sent.bytes += count

    def _wait_on(self) -> None:
        # Not before: what is not read yet is nothing that the target keeps waiting.
        if not self._waits:
            self._waits = True
            self.answers.writing(True)

    async def _write_paced(self, buffers: Sequence[Buffer]) -> None:
        self.answers.writing(True)
        if not self.limited:
            await self._put(buffers)
            self._sent.bytes += sum(len(buffer) for buffer in buffers)
            return
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                self.answers.writing(False)
                await self._pace.ready()
                self.answers.writing(True)
                piece = view[: self._pace.bucket.slice_bytes]
                await self._put([piece])
                self._pace.bucket.spend(len(piece))
                self._sent.bytes += len(piece)
                view = view[len(piece) :]


def _question(event: Event) -> Hashable:
    """What an event asks or answers, the same for both; None for what is neither."""
    match event:
        case Ping(nonce) | Pong(nonce):
            return nonce
        case Commit() | Committed():
            return "commit"
        case Promote() | Promoted():
            return "promote"
        case _:
            return None
