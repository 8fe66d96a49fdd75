"""Checkpoints: taking regions off the activity log once nothing of them can be lost any more.

A checkpoint is due when more than REGIONS_KEPT are on record and some of them were idle. It drops
those that were idle for the longest time, and a few more than it has to, so that the next one is
not due at once. It starts with an epoch of its own, so that it can wait for the writers that were
at work. The order:

    1. age(cool=…)                    who writes to a cooling region from now on keeps it
    2. next epoch, wait till quiet    every writer that saw it before is done
    3. sync images and change maps    so what they wrote is durable, with its marks
    4. drop()                         what is still cooling leaves the record
"""

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from fusedisk.activity import ActivityLog
from fusedisk.changemap import Control
from fusedisk.epochs import reserve
from fusedisk.state import MountRecord, sync_directory

log = logging.getLogger("fusedisk.checkpoint")

# 16 GiB: what a crash costs in traffic, unless more was written within seconds before it. A guest
# that works within it never has a checkpoint. Fewer would let one that writes slowly all over a
# large disk wait for a durable write again and again; DRBD keeps about as many (al-extents).
REGIONS_KEPT = 1024
_SECONDS = 10.0
_QUIET_POLL_SECONDS = 0.005


def open_log(state: Path, record: MountRecord) -> ActivityLog | None:
    """The log of this mount. Raises OSError where a damaged one cannot be given up."""
    try:
        return ActivityLog(state / "activity", record.generation)
    except (OSError, ValueError) as error:
        # Invariant: from here on changes are not recorded, so no log may say that there are none.
        log.error("no activity log (%s): after a crash replicas are compared in full", error)
        give_up(state)
        return None


def give_up(state: Path) -> None:
    """Have the next mount, should this one end in a crash, believe nothing. Raises OSError."""
    (state / "activity").unlink(missing_ok=True)
    sync_directory(state)


def try_to_give_up(state: Path) -> None:
    """Give the log up; one that cannot go stays true, since nothing leaves the record any more."""
    try:
        give_up(state)
    except OSError as error:
        log.error("the activity log cannot be removed: %s", error)


async def checkpoint(
    activity: ActivityLog, state: Path, control: Control, files: Sequence[int], *, kept: int
) -> int:
    """One checkpoint, if it is due; how many regions left the record.

    ``files`` are descriptors of images and change maps that nobody else uses: a writeback error
    is reported once for each. Raises OSError: then nothing may leave the record any more.
    """
    on_record = activity.count()
    if not activity.age(cool=on_record - kept * 7 // 8 if on_record > kept else 0):
        return 0
    await trio.to_thread.run_sync(reserve, state, control)
    epoch = control.advance()
    while not control.quiet(epoch):
        await trio.sleep(_QUIET_POLL_SECONDS)
    try:
        for fd in files:
            await trio.to_thread.run_sync(os.fdatasync, fd, abandon_on_cancel=True)
    except OSError:
        # The kernel reports it once for these descriptors; whoever comes later has to know.
        control.set_doubt()
        raise
    # Invariant: nothing leaves the record once a flush has failed, which no later sync would tell.
    if control.doubtful:
        raise OSError(errno.EIO, "a flush failed")
    return await trio.to_thread.run_sync(activity.drop)


async def keep_checkpoints(
    activity: ActivityLog, state: Path, control: Control, images: Sequence[int], working: trio.Lock
) -> None:
    """Checkpoints until cancelled or until one fails; the mount goes on without them.

    ``working`` is held during each. Whoever is to end the process soon takes it first: one that is
    cancelled leaves its sync in a thread, and until that returns the process does not end.
    """
    paths = [f"/proc/self/fd/{fd}" for fd in images]
    paths += [str(state / f"{index}.map") for index in range(len(images))]
    # Invariant: a guest's flush, and the last one, still meet the errors that we meet.
    files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
    while True:
        await trio.sleep(_SECONDS)
        if control.gated or control.fenced:
            continue
        async with working:
            try:
                await checkpoint(activity, state, control, files, kept=REGIONS_KEPT)
            except (OSError, OverflowError) as error:
                log.error("a checkpoint failed (%s): after a crash replicas are compared", error)
                await trio.to_thread.run_sync(try_to_give_up, state)
                return
