"""A cutover that was asked for: one at a time, made by the task that converses, answered once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import trio

from fusedisk.errors import FuseDiskError
from replicator.cutover import Cutover, CutoverOptions
from replicator.handover import AnotherCutover, NotConverged

Outcome: TypeAlias = dict[str, Any] | FuseDiskError


class Requested:
    """The one under way, if any. ``attempt`` is what is being made of it, once it has begun."""

    def __init__(self) -> None:
        self.options: CutoverOptions | None = None
        """What the one who asks wants; None where nobody does."""
        self.attempt: Cutover | None = None
        self._answer: trio.MemorySendChannel[Outcome] | None = None

    def require_none(self) -> None:
        """Raise AnotherCutover while there is one."""
        if self.options is not None:
            raise AnotherCutover("another cutover is under way; wait until it has ended")

    async def outcome(self, options: CutoverOptions, state: Callable[[], str]) -> dict[str, Any]:
        """Ask for it and wait for its end; see replicator.cutover.Cutover for errors.

        Raises NotConverged where it has not begun in time; ``state`` is what is said of why.
        """
        self.require_none()
        answer, answers = trio.open_memory_channel[Outcome](1)
        self.options, self._answer = options, answer
        try:
            outcome: Outcome | None = None
            with trio.move_on_after(options.timeout_seconds):
                outcome = await answers.receive()
            if outcome is None:
                # Invariant: what has begun keeps its own bounds, whatever the state says meanwhile,
                # and nobody is told how it ended before it has.
                if self.attempt is None and not answers.statistics().current_buffer_used:
                    raise NotConverged(
                        f"the replica is still {state()} after {options.timeout_seconds:g} s; "
                        "the guest goes on at the source"
                    )
                outcome = await answers.receive()
        finally:
            if self._answer is answer:
                self.options = None
        if isinstance(outcome, FuseDiskError):
            raise outcome
        return outcome

    def answer(self, outcome: Outcome) -> None:
        """Tell the one who asked."""
        assert self._answer is not None
        self._answer.send_nowait(outcome)

    def rolled_back(self, outcome: Outcome) -> None:
        """Tell the one who asked, with nothing under way any more."""
        self.answer(outcome)
        self.options = self.attempt = None
