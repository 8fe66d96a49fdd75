"""What ``replicator status --json`` says of a sender."""

import dataclasses
import os
import time
from typing import Any

import msgspec
import trio

from fusedisk.replicas import Lag
from replicator.cutover import Cutover
from replicator.following import Follower


async def report(follower: Follower) -> dict[str, Any]:
    """A replica's entry."""
    source, session, attempt = follower.source, follower.session, follower.cutover.attempt
    # In a thread: the maps of large disks are a GiB and more.
    lag, newer, left = await trio.to_thread.run_sync(_lags, follower, attempt)
    now = trio.current_time()
    changed = lag.chunks or follower.committed is None
    error = follower.error
    if error and (at := follower.standing.retry_at) is not None:
        error = f"{error}; trying again in {max(0.0, at - now):.0f} s"
    progress = follower.progress
    if follower.verifier.progress is not None and follower.state == "following":
        progress = follower.verifier.progress
    if attempt is not None and attempt.progress is not None:
        progress = attempt.progress
    return {
        "name": follower.name,
        "address": str(follower.address),
        "state": follower.state,
        "progress": {"phase": progress.phase, **progress.report(now)},
        "disks": progress.disks([disk.name for disk in source.record.disks]),
        "lag": {
            "bytes": lag.bytes,
            "chunks": lag.chunks,
            "seconds": max(0.0, time.time() - follower.closed_at) if changed else 0.0,
        },
        "rpo": follower.cadence.report(now),
        "verify": {
            "every": follower.settings.verify_every,
            "last": msgspec.to_builtins(follower.verifier.last),
        },
        "epoch": {"current": source.control.epoch, "committed": follower.committed},
        "sent": msgspec.to_builtins(follower.sent),
        "cause": session.cause if session and follower.progress.whole else None,
        "forecast": _forecast(follower, lag.bytes, newer),
        "cutover": None if attempt is None else attempt.report(left),
        "freeze": follower.freezer.report(),
        "capture": session and session.captured and session.captured.report(),
        "given_up": dataclasses.asdict(follower.given_up),
        "error": error,
        "sender": {"pid": os.getpid()},
    }


def _lags(follower: Follower, attempt: Cutover | None) -> tuple[Lag, int, int]:
    """What the replica lacks; what was written since all of it is being sent; and what a
    cutover has left."""
    source = follower.source
    lag = source.lag(follower.committed or 0)
    left = 0 if attempt is None else attempt.left()
    if not follower.progress.whole:
        return lag, 0, left
    return lag, source.lag(source.control.epoch - 1).bytes, left


def _forecast(follower: Follower, left: int, newer: int) -> dict[str, Any]:
    if follower.progress.whole:
        # What is written meanwhile is for the pass that follows.
        left = sum(follower.progress.left) + newer
    return follower.rates.report(left, "paused" if follower.paused else follower.state)
