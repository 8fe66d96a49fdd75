"""What a peer may cost before it has said what it wants, and how many there may be at all."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from replicator.link import LinkLost

OPENING_SECONDS_MAX = 10.0
"""From the connection to the request for a replica, the handshake of TLS included."""
OPENING_MAX = 128
CONNECTIONS_MAX = 512


class Admission:
    """Counts connections. For one trio loop; nothing here waits."""

    def __init__(
        self,
        opening_max: int = OPENING_MAX,
        connections_max: int = CONNECTIONS_MAX,
        opening_seconds_max: float = OPENING_SECONDS_MAX,
    ) -> None:
        self._opening_max, self._connections_max = opening_max, connections_max
        self._opening_seconds_max = opening_seconds_max
        # In the order of their arrival.
        self._opening: dict[trio.CancelScope, None] = {}
        self._connections = 0

    @contextmanager
    def connection(self) -> Iterator[None]:
        """One connection, while the block lasts. Raises LinkLost where there are too many."""
        if self._connections >= self._connections_max:
            raise LinkLost(f"there are {self._connections} connections already")
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Bound what is done until a peer has asked for a replica.

        Raises LinkLost when its time is over, or when newer ones need the place: an honest peer
        needs a moment, so the one that has been here longest is the least likely to be honest.
        """
        if len(self._opening) >= self._opening_max:
            oldest = next(iter(self._opening))
            del self._opening[oldest]
            oldest.cancel()
        with trio.move_on_after(self._opening_seconds_max) as scope:
            self._opening[scope] = None
            try:
                yield
            finally:
                self._opening.pop(scope, None)
        if scope.cancelled_caught:
            raise LinkLost("nothing was asked for in time")
