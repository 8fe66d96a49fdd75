"""The process that holds QEMU's monitor during a cutover: ``python -m replicator.guestkeeper``.

What becomes of a guest whose sender died, or hangs, is decided by the record beside the images. A
dead one cannot change that any more, and one that wakes up promotes nothing (replicator.guest):

none           nothing was promoted: the guest goes on here
*fenced*       the replica is the disk: a migration is completed, else the guest stays paused
*committing*   nobody knows: the guest stays paused until ``replicator resolve --qmp``
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from replicator import migration
from replicator.attending import SILENCE_SECONDS_MAX, Note, attend
from replicator.qmp import GuestError, Monitor

log = logging.getLogger("replicator.guestkeeper")

_RETRY_SECONDS = 1.0
_RETRIES_SECONDS_MAX = 120.0


class GuestKeeper:
    """Carries out what `replicator.guest` asks."""

    silence_seconds_max = SILENCE_SECONDS_MAX

    def __init__(self) -> None:
        self._monitor: Monitor | None = None
        self._path = Path()
        self._images: list[Path] = []
        self._moves = self._ran = False

    async def handle(self, request: dict[str, Any], note: Note) -> dict[str, Any]:
        """connect, pause, move, resume, switch. Raises FuseDiskError."""
        if request["do"] == "connect":
            self._path = Path(request["qmp"])
            self._images = [Path(image) for image in request["images"]]
            self._moves = request["moves"]
            await self._connect()
            assert self._monitor is not None
            self._ran = request["ran"]
            if self._ran is None:
                self._ran = await self._monitor.status() == "running"
            return {"ran": self._ran}
        if self._monitor is None:
            raise FuseDiskError("QEMU is not connected")
        if request["do"] == "pause":
            return {"paused_at": await migration.pause(self._monitor)}
        if request["do"] == "move":
            paused_at, memory = await migration.move_until_paused(
                self._monitor, request["uri"], request["downtime_ms"], note
            )
            return {"paused_at": paused_at, "memory": memory}
        if request["do"] == "resume":
            await self._again(lambda monitor: migration.go_on_here(monitor, run=self._ran))
            return {}
        if request["do"] == "switch":
            await migration.go_on_there(self._monitor)
            return {}
        raise FuseDiskError(f"not a request: {request['do']}")

    async def abandoned(self) -> None:
        """The sender died, or hangs: as the table above says."""
        if self._monitor is None:
            return
        try:
            record = read_fence(self._images)
            if record is None:
                log.info("nothing was promoted: the guest goes on here")
                await self._again(lambda monitor: migration.go_on_here(monitor, run=self._ran))
            elif record.state == "committing":
                log.warning("the outcome is unknown: the guest stays paused until it is resolved")
            elif self._moves:
                log.info("the replica was promoted: the guest goes on there")
                await migration.go_on_there(self._monitor)
        except FuseDiskError as error:
            log.error("%s", error)

    async def _connect(self) -> None:
        if self._monitor is not None:
            await self._monitor.close()
        self._monitor = Monitor(self._path)
        await self._monitor.connect()

    async def _again(self, step: Callable[[Monitor], Awaitable[None]]) -> None:
        """Do what may be done twice until QEMU has answered, over new connections if need be."""
        deadline = time.monotonic() + _RETRIES_SECONDS_MAX
        while True:
            assert self._monitor is not None
            try:
                await step(self._monitor)
                return
            except GuestError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("%s; trying again", error)
            await asyncio.sleep(_RETRY_SECONDS)
            try:
                await self._connect()
            except GuestError as error:
                log.warning("%s", error)


if __name__ == "__main__":
    attend(GuestKeeper())
