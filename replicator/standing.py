"""How a sender stands: what it is doing, what is wrong, and how long it waits before the next try.

What a target's disk refused stands until the replica got further, and not only until the next link
is open: a target that is full lets every sender in, and refuses what it is sent. A link that was
lost is past once there is another one. What waits for the next loss grows in both cases.
"""

import logging
from collections.abc import Callable

log = logging.getLogger("replicator.sender")

RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.5, 30.0
# Said by somebody, or the end: nothing that is wrong with the link hides them.
_BEGIN = -1, 0
_PLAIN = frozenset({"paused", "cutover", "promoted", "failed"})


class Standing:
    """Of one sender, over all its links. No clock of its own."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        """``on_change`` is called whenever something else is to be shown."""
        self._on_change = on_change
        self.doing = "connecting"
        """What the state is, or would be if nothing were wrong."""
        self.lost: str | None = None
        """What ended the last link, as long as it stands."""
        self._refused = False
        self.unread: str | None = None
        """What of the source cannot be read."""
        self._trouble: str | None = None
        self._retry_seconds = RETRY_SECONDS_MIN
        self._furthest = _BEGIN
        self.retry_at: float | None = None
        """When the next link is tried, while none is."""

    @property
    def state(self) -> str:
        """The ``state`` of the status."""
        held = self.lost is not None or self.unread is not None
        return "waiting" if held and self.doing not in _PLAIN else self.doing

    @property
    def error(self) -> str | None:
        """The ``error`` of the status, without when it is tried again."""
        return self.unread or self.lost or self._trouble

    def enter(self, doing: str) -> None:
        """Something else is being done now."""
        before, self.doing = self.state, doing
        if doing != "connecting" and doing not in _PLAIN and not self._refused:
            self.lost = None
        self._changed(before)

    def fail(self, error: str, *, refused: bool = False) -> None:
        """A link ended, or none came about; or the target's disk ``refused`` what was sent."""
        before, self.lost, self._refused = self.state, error, refused
        # Both were of the link.
        self.unread = self._trouble = None
        self._changed(before)

    def cannot_read(self, what: str | None) -> None:
        """Something of the source cannot be read, or, with None, all was."""
        before, self.unread = self.state, what
        self._changed(before)

    def hang(self, trouble: str | None) -> None:
        """Something hangs, or, with None, no longer; the state stays."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._on_change()

    def holds(self) -> None:
        """The link has held for longer than any wait: what ended the one before is past.

        What waits for the next one to be lost stays as it is: it may be the same again.
        """
        if self.lost is not None:
            before, self.lost = self.state, None
            self._changed(before)

    def progressed(self) -> None:
        """A point was committed, or the replica lacks nothing that is due."""
        self.begins_anew()
        self._retry_seconds = RETRY_SECONDS_MIN
        self.holds()

    def begins_anew(self) -> None:
        """What a fill or a comparison reached before is nothing to go by."""
        self._furthest = _BEGIN

    def reached(self, disk: int, offset: int) -> None:
        """A long pass is at a place now, in the order of all passes like it."""
        if (disk, offset) > self._furthest:
            self.progressed()
            self._furthest = disk, offset

    def wait(self, now: float, seconds_max: float) -> float:
        """How long to wait before the next try: twice as long each time."""
        delay = min(self._retry_seconds, seconds_max)
        self._retry_seconds = min(2 * self._retry_seconds, RETRY_SECONDS_MAX)
        self.retry_at = now + delay
        return delay

    def _changed(self, before: str) -> None:
        if self.state != before:
            log.info("%s", self.state)
        self._on_change()
