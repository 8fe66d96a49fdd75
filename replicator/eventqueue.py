"""What was received and not yet worked on: in order, and bounded in bytes as well as in number.

What counts is the memory that an event keeps, not what it uses of it.

For one task that puts and one that takes. Data and Zero can be taken many at a time, since writing
them costs less than the change to a thread that writes.
"""

from collections import deque

import trio

from replicator.messages import Data, Event, Zero

QUEUED_BYTES_MAX = 8 << 20
_QUEUED_EVENTS_MAX = 512
_TAKEN_BYTES_MAX = 4 << 20


class EventQueue:
    """Events between the task that reads a link and the one that works."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0
        self._changed = trio.Event()
        self._others = 0
        self._working_on: Event | list[Data | Zero] | None = None

    @property
    def transfers_only(self) -> bool:
        """Whether all that is queued, and what was taken and is worked on, are transfers."""
        return not self._others and isinstance(self._working_on, list | None)

    async def idle(self) -> None:
        """Wait until all that was put is done: whoever takes waits for more."""
        while self._events or self._working_on is not None:
            await self._changed.wait()

    async def put(self, event: Event) -> None:
        """Add an event, once there is room."""
        while self._bytes >= QUEUED_BYTES_MAX or len(self._events) >= _QUEUED_EVENTS_MAX:
            await self._changed.wait()
        self._events.append(event)
        self._bytes += _size(event)
        self._others += not isinstance(event, Data | Zero)
        self._wake()

    async def take(self) -> Event | list[Data | Zero]:
        """Wait for the next event; where it is a Data or Zero, all that follow it and are there.

        What was taken before is done by that.
        """
        self._working_on = None
        self._wake()
        while not self._events:
            await self._changed.wait()
        self._working_on = self._take()
        return self._working_on

    def _take(self) -> Event | list[Data | Zero]:
        if not isinstance(self._events[0], Data | Zero):
            return self._pop()
        taken: list[Data | Zero] = []
        count = 0
        while self._events and count < _TAKEN_BYTES_MAX:
            transfer = self._events[0]
            if not isinstance(transfer, Data | Zero):
                break
            taken.append(transfer)
            count += _size(transfer)
            self._pop()
        return taken

    def _pop(self) -> Event:
        event = self._events.popleft()
        self._bytes -= _size(event)
        self._others -= not isinstance(event, Data | Zero)
        self._wake()
        return event

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _size(event: Event) -> int:
    return event.held_bytes if isinstance(event, Data) else 0
