"""Who holds a replica of a receiver, and when it ends for a newer session."""

import trio

from fusedisk.errors import FuseDiskError
from replicator import messages as m
from replicator.link import Link, LinkLost

_PROBE_SECONDS = 2.0
# So much of it may be counted at most where somebody stops reading meanwhile.
_STEP_SECONDS = 0.1


class Active:
    """A session that holds a replica, so that a newer one of the same source can take over."""

    def __init__(self, link: Link, opening: m.Open | m.Resolve) -> None:
        self.source_id = opening.source_id
        self.instance = opening.instance if isinstance(opening, m.Open) else None
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self._answered = trio.Event()
        self._link = link

    async def give_way(self, opening: m.Open | m.Resolve) -> None:
        """End for a newer session. Raises FuseDiskError where this one is to stay."""
        if self.source_id != opening.source_id:
            raise FuseDiskError(
                f"replica {opening.name} is receiving from another source; choose another name"
            )
        # One process has one link, so an older session of the same instance is half open.
        if isinstance(opening, m.Open) and self.instance != opening.instance and await self.alive():
            raise FuseDiskError(
                f"replica {opening.name} has another sender, which answers; stop that one, "
                "or choose another --name"
            )
        self.scope.cancel()
        await self.ended.wait()

    def pong(self) -> None:
        """The peer answered a Ping."""
        self._answered.set()

    async def alive(self) -> bool:
        """Whether the peer is still there: it answers a Ping, or goes on with a long frame."""
        self._answered = trio.Event()
        with trio.move_on_after(_PROBE_SECONDS / 2):
            try:
                await self._link.send(m.Ping(0))
            except (LinkLost, m.LocalProtocolError, m.RemoteProtocolError):
                return False
        await self._listen()
        # By now what a dead peer had left in the buffers has been read.
        heard = self._link.received_bytes
        await self._listen()
        return self._answered.is_set() or self._link.received_bytes > heard

    async def _listen(self) -> None:
        """Wait for the answer, for so long as the link is read."""
        left = _PROBE_SECONDS / 2
        while left > 0 and not self._answered.is_set():
            # Invariant: a peer is not silent while nobody listens. A target's disk may take longer
            # over what came last than any peer may take to answer.
            await self._link.being_read()
            begun = trio.current_time()
            with trio.move_on_after(min(left, _STEP_SECONDS)):
                await self._answered.wait()
            left -= trio.current_time() - begun
