"""Progress of one phase, summed over all disks and kept for each. No clock of its own."""

from collections import deque
from dataclasses import dataclass, field

from fusedisk.replicas import disk_entry, progress_entry

_RATE_WINDOW_SECONDS = 10.0


@dataclass
class Progress:
    """Bytes done and to do. ``total`` only grows within a phase, ``done`` never exceeds it."""

    phase: str = "connecting"
    totals: list[int] = field(default_factory=list)
    dones: list[int] = field(default_factory=list)
    finished: bool = False
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self, phase: str, totals: list[int], dones: list[int] | None = None) -> None:
        """Start a phase with what each disk has to do, in bytes, and what was done before."""
        self.phase, self.totals = phase, list(totals)
        self.dones = list(dones or [0] * len(totals))
        self.finished = False
        self._samples.clear()

    def finish(self) -> None:
        """All of the phase is done and committed, also what proved to be no work."""
        self.dones = list(self.totals)
        self.finished = True
        self._samples.clear()

    def advance(self, disk: int, count: int, now: float) -> None:
        """Note ``count`` bytes done; work that was not foreseen raises the total."""
        if not self._samples:
            self._samples.append((now, self.done))
        self.dones[disk] += count
        self.totals[disk] = max(self.totals[disk], self.dones[disk])
        self._samples.append((now, self.done))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while len(self._samples) > 1 and self._samples[0][0] < now - _RATE_WINDOW_SECONDS:
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
    def whole(self) -> bool:
        """Whether a fill or a comparison is under way, not a pass of what changed."""
        return self.phase in ("fill", "compare") and not self.finished

    @property
    def left(self) -> list[int]:
        """Bytes that are left of each disk."""
        return [total - done for total, done in zip(self.totals, self.dones, strict=True)]

    def rate(self, now: float) -> float:
        """Bytes a second over the last seconds; it falls while nothing moves."""
        self._forget(now)
        if not self._samples:
            return 0.0
        t0, d0 = self._samples[0]
        return (self.done - d0) / (now - t0) if now > t0 else 0.0

    def report(self, now: float) -> dict[str, int | float | None]:
        """The ``progress`` object of the status: bytes, bytes a second, seconds."""
        return progress_entry(self.total, self.done, self.rate(now), finished=self.finished)

    def disks(self, names: list[str]) -> list[dict[str, str | int | float]]:
        """The ``disks`` of the status."""
        totals = self.totals or [0] * len(names)
        dones = self.dones or [0] * len(names)
        return [
            {"name": name, **disk_entry(total, done, finished=self.finished)}
            for name, total, done in zip(names, totals, dones, strict=True)
        ]
