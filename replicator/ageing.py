"""Says in the log when the newest point is older than wanted, and when it no longer is."""

import logging
from collections.abc import Callable

import trio

from replicator.cadence import Cadence
from replicator.source import Source

log = logging.getLogger("replicator.sender")

_POLL_SECONDS = 0.5


async def watch_age(
    cadence: Cadence,
    source: Source,
    committed: Callable[[], int | None],
    why: Callable[[], str],
) -> None:
    """Watch until cancelled; ``committed`` is the epoch of the newest point, ``why`` is logged."""
    while True:
        await trio.sleep(_POLL_SECONDS)
        began, epoch = trio.current_time(), committed()
        lag = await trio.to_thread.run_sync(source.lag, epoch or 0)
        if epoch is not None and epoch == committed() and not lag.chunks:
            # A mark comes before its write is acknowledged.
            cadence.is_as_of(began)
        if (said := cadence.watch(trio.current_time())) is not None:
            log.warning("%s (%s)", said, why())
