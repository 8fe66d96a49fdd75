"""A token bucket: when may the next bytes go? No I/O, and the clock is given.

Tokens are bytes. They come in at the rate, up to a small store, and spending may go below zero
once: what is owed is waited for before more is spent, so the average keeps to the rate.
"""

import math
from collections.abc import Callable

BURST_SECONDS = 0.1
"""How much of a pause may be made good at once."""
SLICE_SECONDS = 0.05
"""How much is spent in one piece, so that a large frame does not come all at once."""
SLICE_BYTES_MIN = 1024
RATE_MIN = 4096
"""Bytes a second; slower than that a single frame of 1 MiB would take minutes."""


class TokenBucket:
    """Bytes a second; None is unlimited. Nothing here waits."""

    def __init__(self, rate: int | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rate = rate
        self._tokens = 0.0
        self._at = clock()

    @property
    def rate(self) -> int | None:
        """Bytes a second, None where it is unlimited."""
        return self._rate

    def set_rate(self, rate: int | None) -> None:
        """Change the rate from now on; what is owed is paid at the new one."""
        self._fill()
        self._rate = rate

    @property
    def slice_bytes(self) -> int:
        """The largest piece to spend at once."""
        if self._rate is None:
            return 1 << 62
        return max(SLICE_BYTES_MIN, int(self._rate * SLICE_SECONDS))

    def delay(self) -> float:
        """Seconds until bytes may be spent, 0 when they may be now."""
        self._fill()
        if self._rate is None or self._tokens >= 0:
            return 0.0
        # Rounded up, so that waiting that long is enough for a clock of microseconds.
        return math.ceil(-self._tokens / self._rate * 1e6) / 1e6

    def spend(self, count: int) -> None:
        """Take note of ``count`` bytes sent."""
        self._fill()
        if self._rate is not None:
            self._tokens -= count

    def _fill(self) -> None:
        now = self._clock()
        if self._rate is None:
            self._tokens = 0.0
        else:
            most = self._rate * BURST_SECONDS
            self._tokens = min(most, self._tokens + (now - self._at) * self._rate)
        self._at = now
