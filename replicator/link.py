"""A stream that speaks the protocol: events in, events out."""

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import trio

from fusedisk.errors import FuseDiskError
from replicator.messages import (
    Bye,
    Data,
    Event,
    Failed,
    LocalProtocolError,
    Pong,
    RemoteProtocolError,
    Zero,
)
from replicator.transport.socketreader import SocketReader
from replicator.transport.socketwriter import SocketWriter, after
from replicator.transport.unsent import unsent_bytes
from replicator.wire import Connection, Role, State

Expected = TypeVar("Expected", bound=Event)

SILENCE_SECONDS_MAX = 60.0
"""How long a peer may neither take nor send anything before it counts as gone."""


# What is read ahead of a part of a frame: the next header, or many small frames, in one call.
_AHEAD_BYTES = 16 << 10
# One write of a stream that is not a socket; its deadline is for so much.
_WRITE_BYTES = 256 << 10
# So much for a socket goes on a thread.
_THREAD_BYTES_MIN = 512 << 10
# So much is handed over together of what a thread receives, and so long it goes on.
_TAKEN_BYTES_MAX, _TAKEN_MAX = 4 << 20, 512
_TAKING_SECONDS = 0.25

Buffer: TypeAlias = bytes | memoryview


class LinkLost(Exception):
    """The connection ended; what was not committed is sent again over the next one."""


class Link:
    """One connection, over any stream.

    A cancelled `send` leaves half a frame behind: the link is then done, and only `close` is left.
    A cancelled `receive` loses nothing over a socket or a pipe; over TLS the link is done as well.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        role: Role,
        silence_seconds_max: float = SILENCE_SECONDS_MAX,
    ) -> None:
        self._stream = stream
        self._writer = (
            SocketWriter(stream.socket) if isinstance(stream, trio.SocketStream) else None
        )
        self._reader = (
            SocketReader(stream.socket) if isinstance(stream, trio.SocketStream) else None
        )
        self._receive_into = (
            _receiver_into(stream) if self._reader is None else self._reader.receive
        )
        self.silence_seconds_max = silence_seconds_max
        self.on_moved: Callable[[], object] = lambda: None
        """Called whenever the stream took some bytes."""
        self._connection = Connection(role)
        # Invariant: buffers reach the stream in the order in which the protocol saw the events.
        self._sending = trio.Lock()
        self._put_scope: trio.CancelScope | None = None
        self.received_bytes = self._received = 0
        self._read_by_somebody = trio.Event()
        self._read_by_somebody.set()
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._waiting = self._ahead[:0]

    async def send(self, *events: Event) -> None:
        """Send events with as few system calls as can be.

        Raises LinkLost, or LocalProtocolError for an event out of turn.
        """
        async with self._sending:
            with self._may_be_lost():
                buffers = [b for event in events for b in self._connection.send(event)]
                self._going(events)
                await self._write(buffers)

    @property
    def on_threads(self) -> bool:
        """Whether much data is best sent by `stream` and taken by `take_transfers`."""
        return self._writer is not None

    @property
    def limited(self) -> bool:
        """Whether what is sent has to keep to a rate, which `stream` does not."""
        return False

    async def stream(self, more: Callable[[float], Sequence[Event] | None]) -> None:
        """Send on a thread what `more` gives there, for a quarter of a second or so.

        It is called with how many seconds it may wait, once all that it gave before is sent; None
        is nothing for now. Raises as `send` does, and what it raises.
        """
        async with self._sending:
            with self._may_be_lost():
                await self._send_stream(more)

    @contextmanager
    def _may_be_lost(self) -> Iterator[None]:
        if self._connection.state is State.CLOSED:
            # A peer may go at any time, also while it is being answered: no fault of ours.
            raise LinkLost("the peer has ended the session")
        try:
            yield
        except trio.TooSlowError as error:
            raise LinkLost("the peer takes no more data") from error
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(error) from error

    async def _send_stream(self, more: Callable[[float], Sequence[Event] | None]) -> None:
        assert self._writer is not None

        def encoded(seconds: float) -> list[memoryview] | None:
            events = more(seconds)
            if events is None:
                return None
            return [memoryview(b) for event in events for b in self._connection.send(event)]

        left: list[memoryview] = []
        with self._patience() as patience:
            while True:
                # What was begun is sent, and no more.
                following = _no_more if left else encoded
                done, left = await self._writer.stream(left, following)
                if done:
                    self._took(done)
                    patience.deadline = trio.current_time() + self.silence_seconds_max
                if not left:
                    return
                self._wait_on()

    def _took(self, count: int) -> None:
        """Called when the peer's host took so many bytes of what `stream` sends."""
        self.on_moved()

    def _wait_on(self) -> None:
        """Called when it does not take all of it at once."""

    def _going(self, events: Sequence[Event]) -> None:
        """Called as the bytes of events begin to go out."""

    async def _write(self, buffers: Sequence[Buffer]) -> None:
        await self._put(buffers)

    async def _put(self, buffers: Sequence[Buffer]) -> None:
        # A peer whose network went away silently takes nothing and closes nothing.
        if self._writer is not None:
            await self._put_on_socket(self._writer, buffers)
            return
        for buffer in buffers:
            for at in range(0, len(buffer), _WRITE_BYTES):
                with self._patience():
                    await self._stream.send_all(buffer[at : at + _WRITE_BYTES])
                self.on_moved()

    async def _put_on_socket(self, writer: SocketWriter, buffers: Sequence[Buffer]) -> None:
        left = [memoryview(buffer) for buffer in buffers]
        on_thread = sum(map(len, left)) >= _THREAD_BYTES_MIN
        with self._patience() as patience:
            while left:
                done = await (writer.write_on_thread(left) if on_thread else writer.write(left))
                if done:
                    self.on_moved()
                    patience.deadline = trio.current_time() + self.silence_seconds_max
                left = after(left, done)

    @contextmanager
    def _patience(self) -> Iterator[trio.CancelScope]:
        """Raises TooSlowError where the peer neither takes what is put nor says anything."""
        with trio.fail_after(self.silence_seconds_max) as scope:
            self._put_scope = scope
            yield scope

    async def receive(self) -> Event:
        """The next event. Raises LinkLost at the end, RemoteProtocolError on a broken rule."""
        while True:
            buffer = self._connection.get_buffer()
            if not self._waiting:
                await self._receive(buffer)
            if events := self._connection.received(self._placed(buffer)):
                return events[0]

    def _placed(self, buffer: memoryview) -> int:
        """How many bytes the buffer has by now: of what was received, or of what waited."""
        if self._received:
            count = min(self._received, len(buffer))
            self._waiting = self._ahead[: self._received - count]
            self._received = 0
        else:
            count = min(len(buffer), len(self._waiting))
            buffer[:count] = self._waiting[:count]
            self._waiting = self._waiting[count:]
        return count

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Entered by whoever reads, for as long as it has something else to do."""
        self._read_by_somebody = trio.Event()
        try:
            yield
        finally:
            self._read_by_somebody.set()

    async def being_read(self) -> None:
        """Wait until whoever reads is at it: no peer is silent before that."""
        await self._read_by_somebody.wait()

    async def take_transfers(
        self, first: Data | Zero, store: Callable[[Sequence[Data | Zero]], None]
    ) -> Event | None:
        """Hand one transfer and those that follow to `store`, on a thread, some MiB at a time.

        Their buffers are used again afterwards. Returns the next event that is none, or None when
        nothing comes or after a quarter of a second. Raises as `receive`, and what `store` raises.
        """
        assert self._reader is not None
        before = self.received_bytes
        try:
            event = await self._reader.on_thread(lambda: self._take_transfers(first, store))
        except trio.ClosedResourceError as error:
            raise _lost(error) from error
        if self.received_bytes > before:
            self._heard()
        return event

    def _take_transfers(
        self, first: Data | Zero, store: Callable[[Sequence[Data | Zero]], None]
    ) -> Event | None:
        assert self._reader is not None
        until = time.monotonic() + _TAKING_SECONDS
        event: Event | None = first
        while isinstance(event, Data | Zero):
            taken, held = [], 0
            while isinstance(event, Data | Zero):
                taken.append(event)
                held += event.held_bytes if isinstance(event, Data) else 0
                if held >= _TAKEN_BYTES_MAX or len(taken) >= _TAKEN_MAX:
                    event = None
                else:
                    # What is there is stored before more is waited for.
                    event = self._receive_now(0.0)
            store(taken)
            for one in taken:
                if isinstance(one, Data):
                    self.recycle(one.data)
            if self._reader.interrupted or time.monotonic() >= until:
                return event
            if event is None:
                event = self._receive_now(until)
        return event

    def _receive_now(self, until: float) -> Event | None:
        """On a thread, the next event; None where it is not there up to a time."""
        assert self._reader is not None
        while True:
            buffer = self._connection.get_buffer()
            if not self._waiting:
                try:
                    count = self._reader.receive_now(buffer, self._ahead, until)
                except OSError as error:
                    raise _lost(error) from error
                if count is None:
                    return None
                self._count(count)
            if events := self._connection.received(self._placed(buffer)):
                return events[0]

    async def _receive(self, buffer: memoryview) -> None:
        try:
            received = await self._receive_into(buffer, self._ahead)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(error) from error
        self._count(received)
        self._heard()

    def _count(self, received: int) -> None:
        if received == 0:
            # Inside a frame or not: the network may cut anywhere, and no rule was broken.
            raise LinkLost("the peer closed the connection")
        self._received = received
        self.received_bytes += received

    def _heard(self) -> None:
        if self._put_scope is not None:
            # A peer that is busy for long takes nothing, but says that it lives.
            self._put_scope.deadline = trio.current_time() + self.silence_seconds_max

    def recycle(self, data: memoryview) -> None:
        """Use the buffer of a Data's bytes again, which nobody may look at any more."""
        self._connection.recycle(data)

    async def receive_soon(self) -> Event:
        """The next event of a peer that has something to say. Raises as `receive` does."""
        while True:
            unsent = self._unsent()
            with trio.move_on_after(self.silence_seconds_max):
                return await self.receive()
            # What the kernel still holds of ours comes before any answer: over a slow link a peer
            # that takes some of it is there.
            if not self._unsent() < unsent:
                raise LinkLost(f"the peer has been silent for {self.silence_seconds_max:g} s")

    def _unsent(self) -> int:
        """Bytes that were written and that have not left for the peer, where that is known."""
        return unsent_bytes(self._stream)

    async def expect(self, kind: type[Expected]) -> Expected:
        """The next event other than a Pong, which must be a ``kind``.

        Raises LinkLost, Refused or RemoteProtocolError.
        """
        while True:
            event = await self.receive_soon()
            if isinstance(event, Failed):
                raise_failed(event)
            if isinstance(event, kind):
                return event
            if isinstance(event, Bye):
                raise LinkLost("the receiver is shutting down")
            if not isinstance(event, Pong):
                raise RemoteProtocolError(f"peer sent {type(event).__name__} out of turn")

    async def send_alert(self, alert: bytes) -> None:
        """Send a last word of another protocol's, to a peer that speaks that one."""
        with trio.move_on_after(1, shield=True):
            try:
                await self._stream.send_all(alert)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
        await self.drain()

    async def drain(self) -> None:
        """Let the peer read our last word: to close over unread input would reset the connection.

        Takes a second at most, and keeps nothing of what still comes.
        """
        with trio.move_on_after(1, shield=True):
            try:
                if isinstance(self._stream, trio.abc.HalfCloseableStream):
                    await self._stream.send_eof()
                while await self._stream.receive_some(1 << 16):
                    pass
            except (OSError, FuseDiskError, trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def close(self) -> None:
        """Close the stream, whatever state the conversation is in."""
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None:
            self._reader.close()
        await trio.aclose_forcefully(self._stream)


def _no_more(_seconds: float) -> None:
    return None


def _lost(error: Exception) -> LinkLost:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror and str(cause) in str(error):
        # trio's sockets quote the whole exception.
        return LinkLost(f"the connection was lost: {cause.strerror.lower()}")
    # A stream of ours says in its error what became of it; others say nothing of use.
    return LinkLost(str(error) or "the connection was lost")


def _receiver_into(
    stream: trio.abc.Stream,
) -> Callable[[memoryview, memoryview], Awaitable[int]]:
    """How to receive into one buffer and what is too much for it into another."""

    async def receive_into(buffer: memoryview, ahead: memoryview) -> int:
        data = memoryview(await stream.receive_some(len(buffer) + len(ahead)))
        here = min(len(data), len(buffer))
        buffer[:here] = data[:here]
        ahead[: len(data) - here] = data[here:]
        return len(data)

    return receive_into


async def say_last(link: Link, event: Event) -> None:
    """Try for a moment to send a last word; a peer that is gone misses nothing."""
    with trio.move_on_after(1, shield=True):
        try:
            await link.send(event)
        except (LinkLost, FuseDiskError, LocalProtocolError, RemoteProtocolError):
            return


class TargetFailed(LinkLost):
    """The target's disk is full or fails; it may be mended."""


class Refused(FuseDiskError):
    """The peer refused; trying again would be refused again."""


class Unequal(Refused):
    """The peer found that the replica is not what was sent."""


def raise_failed(event: Failed) -> None:
    """Turn the peer's last word into an error: Refused, or LinkLost where a retry may help."""
    text = "".join(c if c.isprintable() else " " for c in event.message)
    if event.code == "refused":
        raise Refused(text)
    if event.code == "differs":
        raise Unequal(text)
    kind = TargetFailed if event.code in ("full", "io") else LinkLost
    raise kind(f"the receiver failed: {text}")
