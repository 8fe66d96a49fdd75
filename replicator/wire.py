"""The replication protocol without I/O: events to bytes, bytes to events, and what may follow what.

The bytes themselves are described in `replicator.frames`, the events in `replicator.messages`.

The state is one for the connection, not one for each side: the protocol is a conversation in which
only one side at a time can move it on. A request in flight therefore pins the state, and the sender
must have its `Hashes` before it sends `Commit` or `Promote`.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from replicator import messages as m
from replicator.frames import MAGIC, Buffer, Reader, encode
from replicator.messages import Data, Event, LocalProtocolError, RemoteProtocolError, Zero

__all__ = [
    "MAGIC",
    "TRANSITIONS",
    "Connection",
    "LocalProtocolError",
    "RemoteProtocolError",
    "State",
]

Role: TypeAlias = Literal["sender", "receiver"]


class State(enum.Enum):
    """Where the conversation is."""

    IDLE = "idle"
    GREETING = "greeting"
    GREETED = "greeted"
    OPENING = "opening"
    READY = "ready"
    PASSING = "passing"
    COMMITTING = "committing"
    PROMOTING = "promoting"
    PROMOTED = "promoted"
    ABORTING = "aborting"
    RESOLVING = "resolving"
    LOCATING = "locating"
    RESTORING = "restoring"
    CLOSED = "closed"


Rules: TypeAlias = Mapping[type[Event], tuple[frozenset[Role], State]]

_SENDER: Final[frozenset[Role]] = frozenset({"sender"})
_RECEIVER: Final[frozenset[Role]] = frozenset({"receiver"})
_EITHER: Final = _SENDER | _RECEIVER
_LAST_WORDS: Final = (m.Failed, m.Bye)


def _ending() -> Rules:
    return {kind: (_EITHER, State.CLOSED) for kind in _LAST_WORDS}


def _common(here: State) -> Rules:
    return {m.Ping: (_EITHER, here), m.Pong: (_EITHER, here), **_ending()}


TRANSITIONS: Final[Mapping[State, Rules]] = {
    State.IDLE: {m.Hello: (_SENDER, State.GREETING)},
    State.GREETING: {m.Welcome: (_RECEIVER, State.GREETED), **_ending()},
    State.GREETED: {
        m.Open: (_SENDER, State.OPENING),
        m.Resolve: (_SENDER, State.RESOLVING),
        m.Restore: (_SENDER, State.LOCATING),
        **_common(State.GREETED),
    },
    State.OPENING: {m.Opened: (_RECEIVER, State.READY), **_common(State.OPENING)},
    State.READY: {
        m.Begin: (_SENDER, State.PASSING),
        m.HashRequest: (_SENDER, State.READY),
        m.Hashes: (_RECEIVER, State.READY),
        m.Promote: (_SENDER, State.PROMOTING),
        m.Abort: (_SENDER, State.ABORTING),
        **_common(State.READY),
    },
    State.PASSING: {
        # It is begun anew, without what was sent of it.
        m.Begin: (_SENDER, State.PASSING),
        Data: (_SENDER, State.PASSING),
        Zero: (_SENDER, State.PASSING),
        m.HashRequest: (_SENDER, State.PASSING),
        m.Hashes: (_RECEIVER, State.PASSING),
        m.Checkpoint: (_SENDER, State.PASSING),
        m.Commit: (_SENDER, State.COMMITTING),
        **_common(State.PASSING),
    },
    State.COMMITTING: {m.Committed: (_RECEIVER, State.READY), **_common(State.COMMITTING)},
    State.PROMOTING: {m.Promoted: (_RECEIVER, State.PROMOTED), **_common(State.PROMOTING)},
    State.PROMOTED: _common(State.PROMOTED),
    State.ABORTING: {m.Aborted: (_RECEIVER, State.READY), **_common(State.ABORTING)},
    State.RESOLVING: {
        m.Promoted: (_RECEIVER, State.PROMOTED),
        m.Aborted: (_RECEIVER, State.GREETED),
        **_common(State.RESOLVING),
    },
    State.LOCATING: {m.Restorable: (_RECEIVER, State.RESTORING), **_common(State.LOCATING)},
    State.RESTORING: {
        m.ReadRequest: (_SENDER, State.RESTORING),
        Data: (_RECEIVER, State.RESTORING),
        Zero: (_RECEIVER, State.RESTORING),
        m.HashRequest: (_SENDER, State.RESTORING),
        m.Hashes: (_RECEIVER, State.RESTORING),
        **_common(State.RESTORING),
    },
    State.CLOSED: {},
}
"""For each state: which events may come, from which side, and the state each leads to."""


class Connection:
    """One side of a conversation.

    One thread may send while another receives. Nothing here waits, so tasks of one event loop may
    share it; the buffers `send` returns must reach the stream in the order of the calls.
    """

    def __init__(self, role: Role) -> None:
        """Start in `State.IDLE`, as the side that holds the source or the one with the replica."""
        self._local: Role = role
        self._remote: Role = "receiver" if role == "sender" else "sender"
        self._state = State.IDLE
        self._versions: frozenset[int] = frozenset()
        self._draining = False
        self._error: str | None = None
        self._reader = Reader()
        # What is sent and what is received both move the state.
        self._mutex = threading.Lock()

    @property
    def state(self) -> State:
        """Where the conversation is, counting everything sent and received so far."""
        return self._state

    def send(self, event: Event) -> list[bytes | memoryview]:
        """Return the buffers to write for an event; bulk data is passed on, not copied.

        Raises:
            LocalProtocolError: the event may not be sent now, or a value in it is out of bounds.
                The connection is as it was.
            RemoteProtocolError: the peer broke the rules earlier.
        """
        with self._mutex:
            self._raise_if_dead()
            following = self._following(type(event), self._local)
            if following is None:
                raise LocalProtocolError(self._refusal("this side", self._local, type(event)))
            if not self._version_agrees(event):
                raise LocalProtocolError("the version chosen was not offered")
            buffers = encode(event)
            self._move(event, following)
            # Frames already on their way when we said our last word are no fault of the peer's.
            self._draining = isinstance(event, _LAST_WORDS)
            return buffers

    def get_buffer(self) -> memoryview:
        """Return where the next bytes from the stream belong; never empty.

        It ends where the frame's part ends, so that bulk data lands in its own buffer at once.

        Raises:
            RemoteProtocolError: the peer broke the rules earlier.
        """
        self._raise_if_dead()
        return self._reader.vacant()

    def received(self, count: int) -> list[Event]:
        """Take note of bytes placed in `get_buffer()`; return the events they complete.

        Once this side has said `Bye` or `Failed`, only the peer's last word is still reported.

        Raises:
            LocalProtocolError: the count is not from 1 to the length of the buffer.
            RemoteProtocolError: the peer broke the rules; the connection is dead.
        """
        with self._mutex:
            if not 1 <= count <= len(self.get_buffer()):
                raise LocalProtocolError(f"{count} bytes cannot have been received")
            try:
                if self._state is State.CLOSED and not self._draining:
                    raise RemoteProtocolError("peer sent more after its last word")
                event = self._reader.advance(count, self._check_remote)
                return [] if event is None else self._accept(event)
            except RemoteProtocolError as error:
                self._error = str(error)
                raise

    def recycle(self, data: memoryview) -> None:
        """Use the buffer of a Data's bytes again, which nobody may look at any more."""
        self._reader.recycle(data)

    def receive_data(self, data: Buffer) -> list[Event]:
        """Copy bytes in, however they are split, and return the events they complete.

        Raises:
            RemoteProtocolError: the peer broke the rules; events before it in `data` are lost.
        """
        events: list[Event] = []
        rest = memoryview(data).cast("B")
        while rest:
            buffer = self.get_buffer()
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            events += self.received(count)
            rest = rest[count:]
        return events

    def eof(self) -> None:
        """The stream has ended. Whether it should have by now is for the session to judge.

        Raises:
            RemoteProtocolError: it ended inside a frame, or the peer broke the rules earlier.
        """
        self._raise_if_dead()
        if self._reader.inside_frame:
            self._error = "connection ended inside a frame"
            raise RemoteProtocolError(self._error)

    def _accept(self, event: Event) -> list[Event]:
        if self._draining:
            if not isinstance(event, _LAST_WORDS):
                return []
            self._draining = False
            return [event]
        following = self._following(type(event), self._remote)
        if following is None:
            raise RemoteProtocolError(self._refusal("peer", self._remote, type(event)))
        if not self._version_agrees(event):
            raise RemoteProtocolError("peer chose a version that was not offered")
        self._move(event, following)
        return [event]

    def _check_remote(self, kind: type[Event]) -> None:
        # As soon as the header is there, so that a frame out of turn costs no payload buffer.
        if not self._draining and self._following(kind, self._remote) is None:
            raise RemoteProtocolError(self._refusal("peer", self._remote, kind))

    def _following(self, kind: type[Event], role: Role) -> State | None:
        roles, following = TRANSITIONS[self._state].get(kind, (frozenset(), self._state))
        return following if role in roles else None

    def _refusal(self, who: str, role: Role, kind: type) -> str:
        return f"{who} ({role}) may not send {kind.__name__} in state {self._state.value}"

    def _version_agrees(self, event: Event) -> bool:
        return not isinstance(event, m.Welcome) or event.version in self._versions

    def _move(self, event: Event, following: State) -> None:
        if isinstance(event, m.Hello):
            self._versions = frozenset(event.versions)
        self._state = following

    def _raise_if_dead(self) -> None:
        if self._error is not None:
            raise RemoteProtocolError(self._error)
