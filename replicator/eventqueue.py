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

    async def put(self, event: Event) -> None:
        """Add an event, once there is room."""
        while self._bytes >= QUEUED_BYTES_MAX or len(self._events) >= _QUEUED_EVENTS_MAX:
            await self._changed.wait()
        self._events.append(event)
        self._bytes += _size(event)
        self._wake()

    async def take(self) -> Event | list[Data | Zero]:
        """Wait for the next event; where it is a Data or Zero, all that follow it and are there."""
        while not self._events:
            await self._changed.wait()
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
        self._wake()
        return event

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _size(event: Event) -> int:
    return event.held_bytes if isinstance(event, Data) else 0
