"""What is asked of QEMU to pause a guest, to move its memory, and to take either back.

The states of a migration, as QEMU's documentation of ``MigrationStatus`` has them::

    setup -> active -> pre-switchover -> device -> completed
                \\__________\\______________\\____-> failed, cancelling -> cancelled

With the capability ``pause-before-switchover`` QEMU pauses the guest, drains and flushes its disks
and stays in *pre-switchover* until ``migrate-continue``. With ``return-path`` *completed* means
that the other side has loaded everything and runs the guest, else only that it was all written.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from replicator.qmp import GuestError, Monitor

# States in which QEMU may hand the guest over by itself, so that it has to be stopped from it.
_UNDER_WAY = ("setup", "active", "postcopy-active", "wait-unplug", "pre-switchover", "device")
_ENDED_HERE = ("none", "failed", "cancelled")
_CAPABILITIES = {"events": True, "pause-before-switchover": True, "return-path": True}
_POLL_SECONDS, _POLL_SECONDS_PAUSED = 0.1, 0.02
_UNDO_SECONDS_MAX = 30.0
_SWITCH_SECONDS_MAX = 300.0

Report = Callable[[dict[str, Any]], None]


async def pause(monitor: Monitor) -> float:
    """Stop the guest; the time of CLOCK_MONOTONIC before it stood still."""
    before = time.monotonic()
    await monitor.execute("stop")
    return before


async def move_until_paused(
    monitor: Monitor, uri: str, downtime_ms: int, report: Report
) -> tuple[float, dict[str, Any]]:
    """Send the guest's memory until only a rest of it is left and the guest is paused.

    Returns the time of CLOCK_MONOTONIC before it stood still, and the last report. Reports carry
    bytes: ``total``, ``done``, ``rate`` a second. Raises GuestError when QEMU gave up.
    """
    await _set_capabilities(monitor, _CAPABILITIES)
    await monitor.execute("migrate-set-parameters", {"downtime-limit": downtime_ms})
    await monitor.execute("migrate", {"uri": uri})
    before = time.monotonic()
    while True:
        asked = time.monotonic()
        info = await monitor.execute("query-migrate")
        seen = memory(info)
        report(seen)
        if info["status"] == "pre-switchover":
            return before, seen
        if info["status"] not in _UNDER_WAY:
            raise GuestError(f"QEMU cannot move the guest to {uri}: {_why(info)}")
        before = asked
        # Towards its end every moment counts: the guest may stand still already.
        left = seen["total"] - seen["done"]
        near = seen["rate"] * 2 * _POLL_SECONDS > left or not seen["rate"]
        await asyncio.sleep(_POLL_SECONDS_PAUSED if near else _POLL_SECONDS)


def memory(info: dict[str, Any]) -> dict[str, Any]:
    """Progress of the memory, from an answer to query-migrate."""
    ram = info.get("ram", {})
    remaining, total = int(ram.get("remaining", 0)), int(ram.get("total", 0))
    rate = float(ram.get("mbps", 0.0)) * 1e6 / 8
    return {"total": total, "done": max(0, total - remaining), "rate": rate}


async def go_on_there(monitor: Monitor) -> None:
    """Let the guest, paused in *pre-switchover*, go on at the other side, and wait for it.

    Where that fails the guest is stopped here: its disks are no longer ours. Raises GuestError.
    """
    if (await monitor.execute("query-migrate")).get("status") == "pre-switchover":
        await monitor.execute("migrate-continue", {"state": "pre-switchover"})
    try:
        async with asyncio.timeout(_SWITCH_SECONDS_MAX):
            while (info := await monitor.execute("query-migrate")).get("status") in _UNDER_WAY:
                await asyncio.sleep(_POLL_SECONDS_PAUSED)
    except TimeoutError:
        raise GuestError(f"QEMU has not handed over within {_SWITCH_SECONDS_MAX:g} s") from None
    if info.get("status") != "completed":
        # QEMU lets the guest go on when a migration fails. It can no longer write here.
        await monitor.execute("stop")
        raise GuestError(f"QEMU could not hand over the memory: {_why(info)}")


async def go_on_here(monitor: Monitor, *, run: bool) -> None:
    """Take everything back; where ``run``, the guest runs afterwards. Asked twice it does no harm.

    Raises GuestError where another try may help, else FuseDiskError.
    """
    info = await monitor.execute("query-migrate")
    if info.get("status") in _UNDER_WAY:
        await monitor.execute("migrate_cancel")
    deadline = time.monotonic() + _UNDO_SECONDS_MAX
    while (status := info.get("status", "none")) not in _ENDED_HERE:
        # Invariant: a guest that may run elsewhere is never let run here.
        if status == "completed":
            raise FuseDiskError("QEMU has handed the guest over already; it was not resumed here")
        if time.monotonic() > deadline:
            raise GuestError(f"QEMU did not take the migration back, it is {status}")
        await asyncio.sleep(_POLL_SECONDS_PAUSED)
        info = await monitor.execute("query-migrate")
    while await monitor.status() == "finish-migrate":
        # QEMU is about to resume it by itself.
        if time.monotonic() > deadline:
            raise GuestError("QEMU did not take the migration back")
        await asyncio.sleep(_POLL_SECONDS_PAUSED)
    if status != "none":
        await _set_capabilities(monitor, dict.fromkeys(_CAPABILITIES, False))
    if run and await monitor.status() != "running":
        await monitor.execute("cont")


async def conclude(path: Path, images: list[Path]) -> None:
    """Bring a guest that a cutover left paused to where its disks are. Raises FuseDiskError.

    One whose memory was not moving stays paused where the replica was promoted.
    """
    monitor = Monitor(path)
    await monitor.connect()
    try:
        # Only now: another may have had the monitor until a moment ago, for a promotion.
        if read_fence(images) is None:
            await go_on_here(monitor, run=True)
        elif (await monitor.execute("query-migrate")).get("status") == "pre-switchover":
            await go_on_there(monitor)
    finally:
        await monitor.close()


async def _set_capabilities(monitor: Monitor, wanted: dict[str, bool]) -> None:
    states = [{"capability": name, "state": state} for name, state in wanted.items()]
    await monitor.execute("migrate-set-capabilities", {"capabilities": states})


def _why(info: dict[str, Any]) -> str:
    return str(info.get("error-desc") or f"the migration is {info.get('status', 'gone')}")
