"""When passes begin, and how old the newest committed point is. No I/O, and the clock is given.

The age counts from the newest instant that the replica is known to be the disks of: when the
committed epoch was closed, or later, when somebody began to look and found that nothing had been
written since. Times are seconds of a clock that never jumps.

A pass begins as late as the target of the age allows, since what is written twice in an epoch is
sent once: when the age, and what the pass should take by then, come to most of the target. So a
growing backlog makes epochs shorter. Where passes take longer than the target, they follow each
other with a little rest, and epochs are as long as they. Where nothing was written there is none.
"""

from typing import Any

from replicator.estimate import Estimate

_PART_OF_TARGET = 0.8
_REST_PART = 0.05
"""Of the pass before: what is rested at least, so that a link or a disk has time for others."""
_POLLS = 20
_POLL_SECONDS_MIN, _POLL_SECONDS_MAX = 0.02, 1.0


class Cadence:
    """Of one replica, over all its links. ``target`` is the age wanted, in seconds."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.excesses = 0
        self._instant: float | None = None
        self._exceeded_at: float | None = None
        self._oldest = 0.0
        self._estimate = Estimate()
        self._rested_until = 0.0

    def unknown(self) -> None:
        """What the replica is, nobody knows any more."""
        self._instant = None

    def is_as_of(self, instant: float) -> None:
        """The replica is the disks as they were at an instant, or later."""
        self._instant = instant if self._instant is None else max(self._instant, instant)

    def note_pass(self, count: int, began: float, ended: float) -> None:
        """A pass of ``count`` bytes was committed, which were the disks just after ``began``."""
        self.is_as_of(began)
        self._estimate.note_pass(count, ended - began, 0.0)
        self._rested_until = ended + min(_REST_PART * (ended - began), self.target)

    def age(self, now: float) -> float | None:
        """Seconds; None where there is no committed instant."""
        return None if self._instant is None else max(0.0, now - self._instant)

    def is_due(self, count: int, now: float) -> bool:
        """Whether a pass of ``count`` bytes, all that is waiting, has to begin."""
        if count == 0 or now < self._rested_until:
            return False
        age, takes = self.age(now), self._estimate.seconds(count)
        if age is None or takes is None:
            return True
        return age + takes >= _PART_OF_TARGET * self.target

    @property
    def poll_seconds(self) -> float:
        """How long to rest until the next look."""
        return min(max(self.target / _POLLS, _POLL_SECONDS_MIN), _POLL_SECONDS_MAX)

    def watch(self, now: float) -> str | None:
        """What there is to say about the age, once when it exceeds the target and once after."""
        age = self.age(now)
        if age is None:
            return None
        if self._exceeded_at is not None:
            if age > self.target:
                self._oldest = max(self._oldest, age)
                return None
            self._exceeded_at = None
            return (
                f"the newest point is within --rpo {self.target:g} s again; it was "
                f"{self._oldest:.1f} s old at most"
            )
        if age <= self.target:
            return None
        self._exceeded_at, self._oldest = now, age
        self.excesses += 1
        return f"the newest point is {age:.1f} s old, more than --rpo {self.target:g} s"

    def report(self, now: float) -> dict[str, Any]:
        """The ``rpo`` object of the status; seconds."""
        age = self.age(now)
        return {
            "target": self.target,
            "age": age,
            "exceeded": age is not None and age > self.target,
            "excesses": self.excesses,
        }
