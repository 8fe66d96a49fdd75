"""How fast a guest writes against how fast a replica takes it. No clock, no I/O.

Both rates are in bytes of disk a second, counted in whole chunks: a chunk that is written ten times
before the next pass counts once. Older measurements fade by half every 20 s, so that a rate is
steady enough to act on and yet follows a change within a minute.
"""

import math
from typing import Any

import msgspec

_HALF_LIFE_SECONDS = 20.0
_MIB = 1 << 20


class FadingRate:
    """Bytes a second, of bytes and the seconds that they took."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        """Take in ``count`` bytes that took ``seconds``."""
        fade = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._bytes = self._bytes * fade + count
        self._seconds = self._seconds * fade + seconds

    @property
    def value(self) -> float | None:
        """Bytes a second, None before anything was measured."""
        return self._bytes / self._seconds if self._seconds > 0 else None


class Forecast(msgspec.Struct, frozen=True):
    """The ``forecast`` of the status; ``caught_up_seconds`` is None where ``reason`` says why."""

    dirty_rate: float | None
    send_rate: float | None
    caught_up_seconds: float | None
    reason: str | None


class Rates:
    """Dirty rate and send rate of one replica.

    Only time in which something is sent counts for the send rate: a rest between passes is no
    slowness.
    """

    def __init__(self) -> None:
        self._dirty, self._send = FadingRate(), FadingRate()
        self._seen: tuple[int, int, float] | None = None

    @property
    def dirty_rate(self) -> float | None:
        """Bytes a second by which what the next pass has to send grows."""
        return self._dirty.value

    @property
    def send_rate(self) -> float | None:
        """Bytes of disk a second that a pass gets through, its commit included."""
        return self._send.value

    def sent(self, count: int, seconds: float) -> None:
        """A pass got ``count`` bytes of disk further in ``seconds``."""
        self._send.add(count, seconds)

    def lag(self, since: int, count: int, now: float) -> None:
        """At ``now`` there are ``count`` bytes written after epoch ``since``, the last closed."""
        if self._seen is not None:
            epoch, before, at = self._seen
            if now <= at:
                return
            # After another epoch was closed, all of it is new.
            self._dirty.add(max(0, count - before) if since == epoch else count, now - at)
        self._seen = since, count, now

    def forecast(self, left: int, *, standing: str | None = None) -> Forecast:
        """When ``left`` bytes will be sent; ``standing`` says why nothing is being sent."""
        dirty, send = self.dirty_rate, self.send_rate
        seconds: float | None = None
        reason = standing
        if reason is None and left == 0:
            seconds = 0.0
        elif reason is None and (dirty is None or send is None):
            reason = "not enough was sent yet to tell"
        elif reason is None and dirty is not None and send is not None:
            if send > dirty:
                seconds = left / (send - dirty)
            else:
                reason = (
                    f"never: the guest writes {dirty / _MIB:.1f} MiB/s and {send / _MIB:.1f} MiB/s "
                    "are sent"
                )
        if seconds is not None and not math.isfinite(seconds):
            seconds, reason = None, "not enough was sent yet to tell"
        return Forecast(dirty, send, seconds, reason)

    def report(self, left: int, state: str) -> dict[str, Any]:
        """The forecast as the status has it, of a sender in that state."""
        standing = state if state == "paused" else f"nothing is sent while {state}"
        sending = state in ("filling", "comparing", "following", "cutover")
        found: dict[str, Any] = msgspec.to_builtins(
            self.forecast(left, standing=None if sending else standing)
        )
        return found
