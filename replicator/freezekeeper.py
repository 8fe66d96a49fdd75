"""The process that freezes and thaws: ``python -m replicator.freezekeeper``.

Invariant: whatever was frozen, or may have been, is thawed: when the sender says so, when it dies,
and when it says nothing for too long.
"""

import asyncio
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusedisk.errors import FuseDiskError
from replicator.attending import Note, attend
from replicator.guestagent import AgentError, AgentGone, GuestAgent

log = logging.getLogger("replicator.freezekeeper")

_FROZEN_SECONDS_MAX = 5.0
_COMMAND_SECONDS_MAX = 30.0
_RETRY_SECONDS_MIN, _RETRY_SECONDS_MAX = 0.5, 30.0
# A QEMU that has not listened for so long has ended, and its guest with it.
_GONE_SECONDS = 600.0


class AgentFreezing:
    """Through the guest agent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._agent: GuestAgent | None = None

    async def prepare(self) -> None:
        """What can fail with nothing frozen. Raises AgentError."""
        self._agent = await GuestAgent.connect(self._path)

    async def freeze(self) -> None:
        """Raises AgentError."""
        agent, self._agent = self._agent, None
        assert agent is not None
        try:
            count = await agent.freeze()
        except BaseException:
            agent.close()
            raise
        self._agent = agent
        if count == 0:
            raise AgentError("the guest agent found no file system to freeze")

    async def thaw(self) -> None:
        """Raises AgentError."""
        agent, self._agent = self._agent, None
        if agent is None:
            # The agent works in order: a freeze that was under way is done before this.
            agent = await GuestAgent.connect(self._path)
        try:
            await agent.thaw()
        finally:
            agent.close()


class CommandFreezing:
    """Through two commands."""

    def __init__(self, freeze: str, thaw: str) -> None:
        self._freeze, self._thaw = freeze, thaw

    async def prepare(self) -> None:
        """Nothing."""

    async def freeze(self) -> None:
        """Raises FuseDiskError."""
        await _run("--freeze-cmd", self._freeze)

    async def thaw(self) -> None:
        """Raises FuseDiskError."""
        await _run("--thaw-cmd", self._thaw)


async def _run(option: str, command: str) -> None:
    process = await asyncio.create_subprocess_shell(
        command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_COMMAND_SECONDS_MAX):
            status = await process.wait()
    except TimeoutError:
        raise FuseDiskError(f"{option} took longer than {_COMMAND_SECONDS_MAX:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        raise FuseDiskError(f"{option} ended with status {status}")


class FreezeKeeper:
    """Carries out what `replicator.freeze` asks."""

    # It has a limit for what is frozen.
    silence_seconds_max = None

    def __init__(self) -> None:
        self._means: AgentFreezing | CommandFreezing | None = None
        self._frozen = False
        self._thawing: asyncio.Task[None] | None = None
        self._limit: asyncio.Task[None] | None = None

    async def handle(self, request: dict[str, Any], note: Note) -> dict[str, Any]:
        """use, freeze, thaw. Raises FuseDiskError."""
        if request["do"] == "use":
            if request["agent"] is not None:
                self._means = AgentFreezing(Path(request["agent"]))
            else:
                self._means = CommandFreezing(request["freeze"], request["thaw"])
            # What a killed one before us did is not known.
            self._frozen = request["maybe_frozen"]
            return {}
        if request["do"] == "freeze" and self._means is not None:
            await self._freeze(self._means)
            return {}
        if request["do"] == "thaw":
            # False: too late, it was thawed already.
            frozen = self._frozen
            await asyncio.shield(self._thaw())
            return {"frozen": frozen}
        raise FuseDiskError(f"not a request: {request['do']}")

    async def abandoned(self) -> None:
        """The sender died."""
        await self._thaw()

    async def _freeze(self, means: AgentFreezing | CommandFreezing) -> None:
        if self._frozen:
            raise FuseDiskError("the guest could not be thawed yet")
        await means.prepare()
        # Invariant: noted before it is asked for; the answer may be lost.
        self._frozen = True
        try:
            await means.freeze()
        except FuseDiskError:
            self._thaw()
            raise
        self._limit = asyncio.create_task(self._thaw_late())

    async def _thaw_late(self) -> None:
        await asyncio.sleep(_FROZEN_SECONDS_MAX)
        log.warning("the sender says nothing; thawing")
        await self._thaw()

    def _thaw(self) -> asyncio.Task[None]:
        """The one task that thaws; it goes on, whoever waits for it."""
        if self._limit is not None and self._limit is not asyncio.current_task():
            self._limit.cancel()
        self._limit = None
        if self._thawing is None or self._thawing.done():
            self._thawing = asyncio.create_task(self._thaw_at_last())
        return self._thawing

    async def _thaw_at_last(self) -> None:
        delay, reached = _RETRY_SECONDS_MIN, time.monotonic()
        while self._frozen and self._means is not None:
            try:
                await self._means.thaw()
                self._frozen = False
            except FuseDiskError as error:
                if not isinstance(error, AgentGone):
                    reached = time.monotonic()
                elif time.monotonic() > reached + _GONE_SECONDS:
                    log.error("%s; its guest is gone", error)
                    self._frozen = False
                    return
                # Invariant: tried for as long as the guest may be frozen, however long that is.
                log.error("cannot thaw: %s; trying again in %g s", error, delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, _RETRY_SECONDS_MAX)


if __name__ == "__main__":
    attend(FreezeKeeper())
