"""Freezing the guest's file systems for the moment in which an epoch is closed.

A child (`replicator.freezekeeper`) freezes and thaws, so that the death of the sender, or of the
child, leaves nothing frozen. A guest that cannot be frozen is replicated all the same.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from fusedisk.errors import FuseDiskError, UsageError
from replicator.attendant import Attendant, AttendantDied

log = logging.getLogger("replicator.freeze")

_START_SECONDS_MAX = 15.0
_FREEZE_SECONDS_MAX = 45.0
_THAW_SECONDS_MAX = 35.0
_SOON_SECONDS = 3.0

EVERY_SECONDS = 60.0
"""At most this often, where nothing else is said."""


class FreezeSettings(msgspec.Struct, frozen=True):
    """How to freeze: by the guest agent's socket, or by two commands."""

    agent: str | None
    freeze: str | None
    thaw: str | None
    every_seconds: float = EVERY_SECONDS


def freeze_settings(
    how: str | None, freeze: str | None, thaw: str | None, every_seconds: float
) -> FreezeSettings | None:
    """What options ask for, or None. Raises UsageError."""
    if how is not None:
        if freeze is not None or thaw is not None:
            raise UsageError("give either --freeze, or --freeze-cmd and --thaw-cmd")
        kind, _, path = how.partition(":")
        if kind != "qga" or not path:
            raise UsageError("--freeze takes qga:SOCKET, the socket of the guest agent's channel")
        return FreezeSettings(str(Path(path).absolute()), None, None, every_seconds)
    if freeze is None and thaw is None:
        return None
    if not freeze or not thaw:
        raise UsageError("--freeze-cmd and --thaw-cmd go together")
    return FreezeSettings(None, freeze, thaw, every_seconds)


@dataclass
class Instant:
    """Whether the guest was frozen when an epoch was closed."""

    frozen: bool = False


class Freezer:
    """Freezes at most once in ``every_seconds``. Made and used inside trio."""

    def __init__(self, settings: FreezeSettings | None, log_path: Path) -> None:
        """Without settings nothing is ever frozen."""
        self._settings = settings
        self._child = Attendant("replicator.freezekeeper", log_path)
        self._started = False
        self._last: float | None = None
        self.count = 0
        self.ms: float | None = None
        self.error: str | None = None

    @property
    def child_pid(self) -> int | None:
        """The process that freezes and thaws."""
        return self._child.pid

    def report(self) -> dict[str, Any] | None:
        """The ``freeze`` of the status: how often, how long the last took, and what went wrong."""
        if self._settings is None:
            return None
        return {"count": self.count, "ms": self.ms, "error": self.error}

    @asynccontextmanager
    async def frozen(self, *, skip: bool = False) -> AsyncIterator[Instant]:
        """The block runs with the guest frozen, if it is time for that and it can be.

        What it gets says after the block whether the guest was frozen throughout.

        During a cutover it has to be skipped: a guest that is paused cannot answer, and one behind
        a gate cannot flush.
        """
        settings, now = self._settings, trio.current_time()
        instant = Instant()
        if skip or settings is None or not self._due(settings, now):
            yield instant
            return
        self._last = now
        begun: float | None = None
        asked = False
        try:
            try:
                await self._start(settings, maybe_frozen=False)
                asked = True
                await self._child.ask("freeze", _FREEZE_SECONDS_MAX)
                begun, self.error = trio.current_time(), None
            except FuseDiskError as error:
                self._failed(error)
            yield instant
        finally:
            if asked:
                with trio.CancelScope(shield=True):
                    instant.frozen = await self._thaw(settings, begun)

    async def close(self) -> None:
        """End the child; nothing is frozen then."""
        await self._child.dismiss()
        self._started = False

    def _due(self, settings: FreezeSettings, now: float) -> bool:
        return self._last is None or now - self._last >= settings.every_seconds

    async def _start(self, settings: FreezeSettings, *, maybe_frozen: bool) -> None:
        if self._started:
            return
        await self._child.start()
        await self._child.ask(
            "use",
            _START_SECONDS_MAX,
            agent=settings.agent,
            freeze=settings.freeze,
            thaw=settings.thaw,
            maybe_frozen=maybe_frozen,
        )
        self._started = True

    async def _thaw(self, settings: FreezeSettings, begun: float | None) -> bool:
        """Whether the guest was frozen until now."""
        try:
            try:
                # Without a freeze there is hardly anything to wait for.
                seconds = _SOON_SECONDS if begun is None else _THAW_SECONDS_MAX
                answer = await self._child.ask("thaw", seconds)
            except AttendantDied:
                await self.close()
                await self._start(settings, maybe_frozen=True)
                answer = await self._child.ask("thaw", _THAW_SECONDS_MAX)
                begun = None
        except FuseDiskError as error:
            # The child goes on trying.
            self._failed(FuseDiskError(f"the guest may still be frozen: {error}"))
            return False
        if begun is None:
            return False
        if not answer["frozen"]:
            self._failed(FuseDiskError("it was thawed before the epoch was closed"))
            return False
        self.count += 1
        self.ms = 1000 * (trio.current_time() - begun)
        log.info("the guest was frozen for %.1f ms", self.ms)
        return True

    def _failed(self, error: FuseDiskError) -> None:
        self.error = str(error)
        log.warning("the epoch is closed without a freeze: %s", error)
