"""The gate as its holder has it: closed for as long as this process lives and the bound allows.

The disk server lets it go when it is not renewed in time (fusedisk.gateword): this process may have
been stopped, or may wait for a disk that does not answer. It notices by `Gate.begin_promotion`.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fusedisk.changemap import Control
from fusedisk.gate import open_gate, take_lease
from fusedisk.gateword import begin_promotion, close_gate, forget_time, keep_closed
from replicator.handover import AnotherCutover, require_settled
from replicator.running import one_error
from replicator.source import Copy, Source

_LEASE_SECONDS = 5.0
_RENEW_SECONDS = 1.0
# So that a sender that lives opens the gate itself, and says why.
_GRACE_SECONDS = 1.0


class Gate:
    """The closed gate of one cutover, under a lease."""

    def __init__(self, control: Control, lease: int, until: float) -> None:
        self._control, self._lease, self._until = control, lease, until
        self._withdrawn = False
        close_gate(control, max(self._seconds(), _GRACE_SECONDS))

    def begin_promotion(self, seconds: float) -> bool:
        """Make it one that opens only behind the fence, for so many seconds at most.

        False where it was let go: the guest has gone on, and nothing may be promoted.
        """
        if not begin_promotion(self._control):
            return False
        self._until = trio.current_time() + seconds
        self._renew()
        return True

    async def work(self, until: float, work: Callable[..., None], *arguments: object) -> bool:
        """Do file work in a thread; False where ``until`` has come and it is left behind.

        Invariant: the lease lasts as long as the work. Else it could change the record of a
        cutover that begins meanwhile. Raises what the work raises.
        """

        def under_lease(lease: Copy) -> None:
            try:
                work(*arguments)
            finally:
                lease.close()

        with trio.move_on_at(until):
            lease = Copy(self._lease)
            await trio.to_thread.run_sync(under_lease, lease, abandon_on_cancel=True)
            return True
        return False

    def withdraw(self) -> None:
        """Nothing is promoted, whatever is on record: the guest goes on, behind no fence."""
        assert not self._withdrawn
        self._withdrawn = True

    def open(self, images: list[Path]) -> None:
        """Let writers through, or refuse them where a promotion is on record."""
        if not self._withdrawn:
            open_gate(self._control, images)
            return
        # Invariant: PROMOTE was not sent, and is not under the token of a record that comes yet.
        self._control.set_gate(False)
        forget_time(self._control)

    def _seconds(self) -> float:
        return min(_LEASE_SECONDS, self._until - trio.current_time())

    def _renew(self) -> None:
        seconds = self._seconds()
        if seconds > 0:
            keep_closed(self._control, seconds)

    async def keep(self, scope: trio.CancelScope) -> None:
        """Renew it until ``scope`` is cancelled, and by nothing else: the hand-over is shielded."""
        with scope:
            while True:
                await trio.sleep(_RENEW_SECONDS)
                self._renew()


@asynccontextmanager
async def held_gate(source: Source, deadline: float) -> AsyncIterator[Gate]:
    """Hold writes, until ``deadline`` if no promotion is begun by then.

    Raises AnotherCutover where one is under way.
    """
    try:
        lease = take_lease(source.state)
    except BlockingIOError:
        raise AnotherCutover("another cutover of this mount is under way") from None
    try:
        # Once more: a cutover to another replica may have come first since this one began.
        require_settled(source)
        keeping = trio.CancelScope(shield=True)
        gate = Gate(source.control, lease, deadline + _GRACE_SECONDS)
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(gate.keep, keeping)
                    try:
                        yield gate
                    finally:
                        keeping.cancel()
        finally:
            gate.open([Path(disk.path) for disk in source.record.disks])
    finally:
        os.close(lease)
