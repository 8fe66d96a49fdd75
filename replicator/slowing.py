"""Slowing a guest, step by step, until its writes fit through the link; see fusedisk.slowing.

The guest is free again when the block ends, however it ends; when this process dies or stands
still, the lease runs out.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from fusedisk.changemap import Control
from fusedisk.errors import UsageError
from fusedisk.slowing import RATE_MAX, let_go, slow_down
from fusedisk.units import format_size, parse_rate
from replicator.running import first_error

log = logging.getLogger("replicator.cutover")

LEASE_SECONDS = 3.0
_RENEW_SECONDS = 0.5
_STEP = 0.5
_SHRINKING = 0.7
"""What is left of one pass for the next, at most, for the guest to be left at its speed."""


def check_floor(text: str) -> int:
    """Bytes a second from what was typed. Raises UsageError."""
    rate = parse_rate(text)
    if rate is None or rate > RATE_MAX:
        raise UsageError(f"--slow-floor {text}: a rate up to {format_size(RATE_MAX)} is needed")
    return rate


class Slowing:
    """How fast a guest may make its disks dirty; ``rate`` is None while it is free."""

    def __init__(self, control: Control, floor: int) -> None:
        self._control, self._floor = control, floor
        self._left: int | None = None
        self.rate: int | None = None

    def step(self, left: int, dirty_rate: float | None, send_rate: float | None) -> None:
        """A pass was sent and ``left`` bytes are too many still: slow it further, if need be.

        Not while each pass leaves clearly less to the next one: that converges as it is.
        """
        before, self._left = self._left, left
        if before is None or left < _SHRINKING * before or not dirty_rate or not send_rate:
            return
        now = min(dirty_rate, send_rate) if self.rate is None else self.rate
        rate = min(max(int(_STEP * now), self._floor), RATE_MAX)
        if rate == self.rate:
            return
        self.rate = rate
        log.info("the guest is slowed to %s/s", format_size(rate))
        self.renew()

    @property
    def at_floor(self) -> bool:
        """Whether it is not slowed any further."""
        return self.rate == self._floor

    def renew(self) -> None:
        """Keep it as it is for some seconds more."""
        if self.rate is not None:
            slow_down(self._control, self.rate, LEASE_SECONDS)

    def let_go(self) -> None:
        """Set it free, if we have slowed it."""
        if self.rate is not None:
            self.rate = None
            let_go(self._control)
            log.info("the guest is not slowed any more")


@asynccontextmanager
async def slowing(control: Control, floor: int) -> AsyncIterator[Slowing]:
    """A guest that may be slowed within the block, and is free afterwards."""
    held = Slowing(control, floor)

    async def renew() -> None:
        while True:
            await trio.sleep(_RENEW_SECONDS)
            held.renew()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(renew)
            try:
                yield held
            finally:
                held.let_go()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_error(group) from None
