"""Progress of one phase, summed over all disks and kept for each. No clock of its own."""

from collections import deque
from dataclasses import dataclass, field

_RATE_WINDOW_SECONDS = 10.0


@dataclass
class Progress:
    """Bytes done and to do. ``total`` only grows within a phase, ``done`` never exceeds it."""

    phase: str = "connecting"
    totals: list[int] = field(default_factory=list)
    dones: list[int] = field(default_factory=list)
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self, phase: str, totals: list[int]) -> None:
        """Start a phase with what each disk has to do, in bytes."""
        self.phase, self.totals, self.dones = phase, list(totals), [0] * len(totals)
        self._samples.clear()

    def advance(self, disk: int, count: int, now: float) -> None:
        """Note ``count`` bytes done; work that was not foreseen raises the total."""
        self.dones[disk] += count
        self.totals[disk] = max(self.totals[disk], self.dones[disk])
        self._samples.append((now, self.done))
        while self._samples[0][0] < now - _RATE_WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def done(self) -> int:
        """Bytes done over all disks."""
        return sum(self.dones)

    @property
    def total(self) -> int:
        """Bytes to do over all disks."""
        return sum(self.totals)

    @property
    def rate(self) -> float:
        """Bytes a second over the last seconds."""
        if len(self._samples) < 2:
            return 0.0
        (t0, d0), (t1, d1) = self._samples[0], self._samples[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0

    def report(self) -> dict[str, float | None]:
        """The ``progress`` object of the status: bytes, bytes a second, seconds."""
        total, done, rate = self.total, self.done, self.rate
        return {
            "total": total,
            "done": done,
            "percent": 100.0 * done / total if total else 100.0,
            "rate": rate,
            "eta": (total - done) / rate if rate else (0.0 if done >= total else None),
        }
