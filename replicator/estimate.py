"""How long the last pass of a cutover will take, from what earlier ones took. No I/O, no clock.

The seconds of a pass are taken to be ``fixed + bytes * slope``: round trips and syncs that any pass
costs, and what each byte costs on the wire, in the target's journal and in its images. Both come
from a least-squares fit over the last passes; where those were too alike in size to tell the two
parts apart, larger passes are taken to be in proportion, and smaller ones to cost as much.
"""

import math
from collections import deque
from typing import NamedTuple

_PASSES = 8
_MARGIN_SPREADS = 2.0
"""How many times the spread of the passes about the fit is added."""
_ALIKE = 0.2
"""Sizes whose spread is below this part of their mean say nothing about the slope."""
_DIRTY_SMOOTHING = 0.5
_OUTRUN = 0.9
"""From this part of the send rate on passes do not get shorter: a guest that rewrites its whole
disk during each pass cannot make more of it dirty than was sent."""


class _Pass(NamedTuple):
    bytes: int
    seconds: float


class Estimate:
    """What was measured of a link, a target and a guest: bytes, seconds, bytes a second."""

    def __init__(self) -> None:
        self._passes: deque[_Pass] = deque(maxlen=_PASSES)
        self._tail_seconds: deque[float] = deque(maxlen=_PASSES)
        self.dirty_rate: float | None = None
        """What the guest adds to the next pass in a second, rounded up to chunks."""

    def note_pass(self, count: int, seconds: float, commit_seconds: float) -> None:
        """A pass of ``count`` bytes took so long until applied, of which the target's answer to the
        commit took ``commit_seconds``."""
        self._passes.append(_Pass(count, seconds))
        self._tail_seconds.append(commit_seconds)

    def note_dirty(self, count: int, seconds: float) -> None:
        """Within so many seconds after an epoch was closed the guest changed ``count`` bytes."""
        if seconds <= 0:
            return
        rate, before = count / seconds, self.dirty_rate
        self.dirty_rate = rate if before is None else before + _DIRTY_SMOOTHING * (rate - before)

    @property
    def send_rate(self) -> float | None:
        """Bytes of disk a second over the last passes, all costs included; None before one."""
        seconds = sum(p.seconds for p in self._passes)
        sent = sum(p.bytes for p in self._passes)
        return sent / seconds if seconds > 0 and sent else None

    @property
    def outrun(self) -> bool:
        """Whether the guest changes more than the passes carry."""
        return (
            self.dirty_rate is not None
            and self.send_rate is not None
            and self.dirty_rate >= _OUTRUN * self.send_rate
        )

    def seconds(self, count: int) -> float | None:
        """What a last pass of ``count`` bytes and the promotion should take; None before a pass.

        The promotion is two more records to sync, one at each end; a commit is the measure of it.
        """
        if not self._passes:
            return None
        passes = list(self._passes)
        mean_bytes = sum(p.bytes for p in passes) / len(passes)
        mean_seconds = sum(p.seconds for p in passes) / len(passes)
        promotion = 2 * sum(self._tail_seconds) / len(self._tail_seconds)
        variance = sum((p.bytes - mean_bytes) ** 2 for p in passes) / len(passes)
        if mean_bytes == 0 or math.sqrt(variance) < _ALIKE * mean_bytes:
            slowest = max(p.seconds for p in passes)
            return promotion + slowest * max(1.0, count / mean_bytes if mean_bytes else 1.0)
        covariance = sum((p.bytes - mean_bytes) * (p.seconds - mean_seconds) for p in passes) / len(
            passes
        )
        # Neither part can be negative, whatever the noise says.
        slope = min(max(covariance / variance, 0.0), mean_seconds / mean_bytes)
        fixed = mean_seconds - slope * mean_bytes
        spread = math.sqrt(
            sum((p.seconds - fixed - slope * p.bytes) ** 2 for p in passes) / len(passes)
        )
        return promotion + fixed + slope * count + _MARGIN_SPREADS * spread

    def report(self, count: int) -> dict[str, float | None]:
        """For the status: bytes a second, and milliseconds for ``count`` bytes; null is unknown."""
        seconds = self.seconds(count)
        return {
            "dirty_rate": self.dirty_rate,
            "send_rate": self.send_rate,
            "estimate_ms": None if seconds is None else 1000 * seconds,
        }
