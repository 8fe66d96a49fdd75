"""Whether the other side still answers: what was asked of it and when, and when it was last heard.

No I/O, and the clock is given. A link that is silent and a disk that hangs look alike at first, and
neither is an error before the link's timeout; but somebody may want to know within seconds.
"""

from collections.abc import Callable, Hashable

STALLED_SECONDS = 8.0
"""So long an answer may take before it is worth a word."""
_HEARD_SECONDS = 3.0


class Answers:
    """What one link waits for."""

    def __init__(self, clock: Callable[[], float], unsent: Callable[[], int]) -> None:
        """``unsent`` says how many bytes were taken and have not gone on."""
        self._clock, self._unsent = clock, unsent
        self._left = 0
        self._asked: dict[Hashable, float] = {}
        self._heard_at = self._moved_at = clock()
        self._writing = False

    def asked(self, question: Hashable) -> None:
        """What has to be answered is sent; asked again before that, it counts from now."""
        self._asked[question] = self._clock()

    def heard(self, question: Hashable = None) -> bool:
        """Something came; whether it answers the question."""
        self._heard_at = self._clock()
        return self._asked.pop(question, None) is not None

    def writing(self, writing: bool) -> None:
        """Whether bytes wait to be taken."""
        self._writing = writing
        self._moved_at = self._clock()

    def moved(self) -> None:
        """Some bytes were taken."""
        self._moved_at = self._clock()

    @property
    def outstanding(self) -> bool:
        """Whether anything waits for its answer."""
        return bool(self._asked)

    def trouble(self) -> str | None:
        """What a person should know, for as long as it lasts; to be asked every few seconds.

        Nothing as long as bytes move, be it only out of the kernel's buffers.
        """
        now = self._clock()
        left = self._unsent()
        if left < self._left:
            self._moved_at = now
        self._left = left
        # Over a slow link a question is behind all that goes before it.
        waits = [now - max(since, self._moved_at) for since in self._asked.values()]
        if self._writing:
            waits.append(now - self._moved_at)
        longest = max(waits, default=0.0)
        if longest < STALLED_SECONDS:
            return None
        if now - self._heard_at < _HEARD_SECONDS:
            return f"the target's disk has not answered for {longest:.0f} s"
        return f"the target has not answered for {longest:.0f} s: the link or its disk hangs"
