"""A stream that speaks the protocol: events in, events out."""

import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias, TypeVar

import trio

from fusedisk.errors import FuseDiskError
from replicator.messages import (
    Bye,
    Event,
    Failed,
    LocalProtocolError,
    Pong,
    RemoteProtocolError,
)
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
# Of a part of a frame that is at least so long, so much is waited for, but no longer than that.
_WAKE_BYTES_MIN, _WAKE_BYTES_MAX = 64 << 10, 512 << 10
_WAKE_SECONDS_MAX = 0.1
# What is there already is taken without a look at the other tasks, up to so much at a time.
_AT_ONCE_BYTES = 4 << 20

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
        self._receive_into = _receiver_into(stream)
        self.silence_seconds_max = silence_seconds_max
        self.on_moved: Callable[[], object] = lambda: None
        """Called whenever the stream took some bytes."""
        self._connection = Connection(role)
        # Invariant: buffers reach the stream in the order in which the protocol saw the events.
        self._sending = trio.Lock()
        self._put_scope: trio.CancelScope | None = None
        self.received_bytes = self._received = 0
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._waiting = self._ahead[:0]

    async def send(self, *events: Event) -> None:
        """Send events with as few system calls as can be.

        Raises LinkLost, or LocalProtocolError for an event out of turn.
        """
        async with self._sending:
            if self._connection.state is State.CLOSED:
                # A peer may go at any time, also while it is being answered: no fault of ours.
                raise LinkLost("the peer has ended the session")
            try:
                buffers = [b for event in events for b in self._connection.send(event)]
                self._going(events)
                await self._write(buffers)
            except trio.TooSlowError as error:
                raise LinkLost("the peer takes no more data") from error
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise _lost(error) from error

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
                count = min(self._received, len(buffer))
                self._waiting = self._ahead[: self._received - count]
            else:
                count = min(len(buffer), len(self._waiting))
                buffer[:count] = self._waiting[:count]
                self._waiting = self._waiting[count:]
            if events := self._connection.received(count):
                return events[0]

    async def _receive(self, buffer: memoryview) -> None:
        try:
            self._received = await self._receive_into(buffer, self._ahead)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(error) from error
        if self._received == 0:
            # Inside a frame or not: the network may cut anywhere, and no rule was broken.
            raise LinkLost("the peer closed the connection")
        self.received_bytes += self._received
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
        await trio.aclose_forcefully(self._stream)


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
    if isinstance(stream, trio.SocketStream):
        return _SocketReceiver(stream.socket).receive

    async def receive_into(buffer: memoryview, ahead: memoryview) -> int:
        data = memoryview(await stream.receive_some(len(buffer) + len(ahead)))
        here = min(len(data), len(buffer))
        buffer[:here] = data[:here]
        ahead[: len(data) - here] = data[here:]
        return len(data)

    return receive_into


class _SocketReceiver:
    """Takes from a socket, and is woken for bulk data only once a good part of it is there.

    To wake a task takes as long as to copy what a socket delivers at a time.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._wake_bytes = 1
        self._at_once = 0

    async def receive(self, buffer: memoryview, ahead: memoryview) -> int:
        """As `_receiver_into` says. Raises OSError, or ClosedResourceError after `close`."""
        if self._at_once > 0 and self._socket.fileno() >= 0:
            with suppress(BlockingIOError):
                return self._take(buffer, ahead)
        self._at_once = _AT_ONCE_BYTES
        # Never more than is left of the frame, which is all that the peer owes us.
        self._wake_at(min(len(buffer), _WAKE_BYTES_MAX) if len(buffer) >= _WAKE_BYTES_MIN else 1)
        while True:
            # Invariant: what a slow peer sends is counted soon; else it would be taken for dead.
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError
            seconds = _WAKE_SECONDS_MAX if self._wake_bytes > 1 else math.inf
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(self._socket)
            with suppress(BlockingIOError):
                return self._take(buffer, ahead)
            self._wake_at(1)

    def _take(self, buffer: memoryview, ahead: memoryview) -> int:
        count = os.readv(self._socket.fileno(), [buffer, ahead])
        self._at_once -= count
        return count

    def _wake_at(self, count: int) -> None:
        if count != self._wake_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wake_bytes = count


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
