"""The disk server: answers the kernel's requests until the mount is gone, then records it clean.

Data path threads answer what concerns data (fusedisk.datapath), pyfuse3 the rest. A server that
died is followed by another one, which goes on with the requests that were not answered.
"""

import argparse
import ctypes
import functools
import logging
import logging.handlers
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyfuse3
import trio

from fusedisk.activityfile import first_regions
from fusedisk.capture import end_abandoned, open_spills
from fusedisk.changemap import ChangeMap, Control
from fusedisk.checkpoint import keep_checkpoints, open_log, try_to_give_up
from fusedisk.datapath import DataPath
from fusedisk.direct import alignment
from fusedisk.disk import Disk
from fusedisk.filesystem import DiskFilesystem, NamedDisk
from fusedisk.keeper import DRAINED, FLUSH_FAILED, SIGNALS
from fusedisk.memory import bound_page_tables
from fusedisk.relay import Relay
from fusedisk.standby import GateKeeper
from fusedisk.state import read_mount_record, record_clean
from fusedisk.witness import failed_unseen

log = logging.getLogger("fusedisk.server")

T = TypeVar("T")

# What is cached two would serve as fast; of all else they are the depth that the disk sees. Six of
# their buffers fit into what any user may lock into memory (8 MiB).
_THREADS = 4
_DIRECT_THREADS = 6
# For flushes and whatever else waits for a disk, while the former go on serving.
_LASTING_THREADS = 4
_SESSION_TASKS_MAX = 16
_CAPTURE_SECONDS = 1.0
_STANDBY_SECONDS = 0.5
_PR_SET_IO_FLUSHER = 57


async def _serve(arguments: argparse.Namespace, resume: bool) -> int:
    state: Path = arguments.state
    record = read_mount_record(state)
    control = Control(state / "control", True)
    # Invariant: the keeper has reaped the server before us, so nobody that announced is left.
    control.clear_announcements()
    if resume and failed_unseen(arguments.witnesses):
        log.error("writeback of an image failed, so there will be no clean mark")
        control.set_doubt()
    maps = [ChangeMap(state / f"{i}.map", True) for i in range(len(record.disks))]
    fds: list[int] = arguments.images
    activity = open_log(state, record)
    firsts = first_regions([disk.size for disk in record.disks])
    writeback = os.eventfd(0)
    spills = open_spills(str(state))
    gate = GateKeeper(state, record, control, fds)
    relay = Relay(arguments.device, functools.partial(_keep, state / "init"), arguments.told)
    count = _DIRECT_THREADS if any(map(alignment, fds)) else _THREADS
    path = DataPath(
        relay,
        [
            Disk(
                control,
                changes,
                fd,
                read_only=record.read_only,
                writeback=writeback,
                index=index,
                spills=spills,
                activity=activity,
                first_region=firsts[index],
            )
            for index, (fd, changes) in enumerate(zip(fds, maps, strict=True))
        ],
        writeback=writeback,
        check_lease=gate.check,
        may_rest=max(0, count - max(2, len(os.sched_getaffinity(0)))),
    )
    operations = DiskFilesystem(
        [NamedDisk(disk.name, fd, disk.size) for disk, fd in zip(record.disks, fds, strict=True)],
        arguments.uid,
        arguments.gid,
        arguments.mode,
        lambda: gate.standing_by,
    )
    # libfuse 3.3 and later takes a descriptor that speaks FUSE in place of a mountpoint.
    pyfuse3.init(operations, f"/dev/fd/{relay.session.detach()}", set())
    checkpointing = trio.Lock()
    try:
        async with trio.open_nursery() as background:
            if activity is not None and not record.read_only:
                background.start_soon(
                    keep_checkpoints, activity, state, control, fds, checkpointing
                )
            background.start_soon(_watch_promotion, gate)
            unmounted = await _run(path, count, relay, arguments, control, resume, checkpointing)
            background.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)
    if not unmounted:
        log.info("drained, for the next server")
        return DRAINED
    # The kernel has let go of the device: nobody can write any more.
    if control.doubtful:
        log.error("a flush failed while it was mounted, so there is no clean mark")
        # Invariant: nor does the next mount take it for a crash, which costs what is on record.
        await trio.to_thread.run_sync(try_to_give_up, state)
        return FLUSH_FAILED
    # Invariant: the kernel reports a failed flush once. A server that follows on one killed right
    # after that must not take its own, which succeeds, for the truth.
    control.set_doubt()
    try:
        await trio.to_thread.run_sync(record_clean, state, fds, control, maps)
    except OSError:
        log.exception("the last flush failed, so there is no clean mark")
        await trio.to_thread.run_sync(try_to_give_up, state)
        return FLUSH_FAILED
    log.info("unmounted, clean")
    return 0


async def _run(
    path: DataPath,
    count: int,
    relay: Relay,
    arguments: argparse.Namespace,
    control: Control,
    resume: bool,
    checkpointing: trio.Lock,
) -> bool:
    """Serve by so many threads; true at the mount's end, false to make room for another server."""
    limiter = trio.CapacityLimiter(math.inf)
    unmounted, ending = True, False

    async def native(loop: Callable[..., T], *args: object) -> T:
        try:
            return await trio.to_thread.run_sync(loop, *args, limiter=limiter)
        except Exception:
            log.exception("a thread of the data path failed")
            # The other threads cannot be cancelled, and half a server would let requests wait for
            # ever. The next one goes on with what is not answered.
            os._exit(1)

    async def session() -> None:
        try:
            await pyfuse3.main(1, _SESSION_TASKS_MAX)
        except Exception:
            log.exception("the pyfuse3 session failed")
        if not ending:
            log.error("the pyfuse3 session ended by itself")
            os._exit(1)

    async with trio.open_nursery() as everything:
        everything.start_soon(session)
        try:
            if resume:
                await native(relay.resume, (arguments.state / "init").read_bytes())
            everything.start_soon(native, relay.relay_replies)
            everything.start_soon(_watch_captures, str(arguments.state), control)
            everything.start_soon(bound_page_tables, path)
            os.write(arguments.ready, b"ready\n")
            os.close(arguments.ready)
            async with trio.open_nursery() as helpers:
                helpers.start_soon(native, path.release_parked, count)
                for slot in range(_LASTING_THREADS):
                    helpers.start_soon(native, path.work_off, count + 1 + slot)
                helpers.start_soon(native, path.write_back)
                async with trio.open_nursery() as threads:
                    signals = await threads.start(_drain_on_signal, path, checkpointing)

                    async def serve(slot: int) -> None:
                        nonlocal unmounted
                        unmounted = await native(path.serve, slot)

                    async with trio.open_nursery() as serving:
                        for slot in range(count):
                            serving.start_soon(serve, slot)
                    signals.cancel()
                path.stop()
            while not unmounted and relay.outstanding:
                await trio.sleep(0.001)
        finally:
            ending = True
            path.stop()
            relay.close()
        everything.cancel_scope.cancel()
    return unmounted


async def _drain_on_signal(
    path: DataPath,
    checkpointing: trio.Lock,
    task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.CancelScope() as scope, trio.open_signal_receiver(signal.SIGUSR1) as signals:
        # What came before waits until here (see main).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        task_status.started(scope)
        await anext(signals)
        # Served until then: while a checkpoint syncs, this process cannot make room.
        async with checkpointing:
            while True:
                path.stop()
                await trio.sleep(0.005)


async def _watch_promotion(gate: GateKeeper) -> None:
    """Of a mount that stands by: find out also where nobody writes, for `status` and senders."""
    while gate.standing_by:
        await trio.sleep(_STANDBY_SECONDS)
        await trio.to_thread.run_sync(gate.check)


async def _watch_captures(state: str, control: Control) -> None:
    """Take captures away from readers that died: the guest makes copies for nobody."""
    while True:
        await trio.sleep(_CAPTURE_SECONDS)
        # A thread's work: to free a large spill takes the filesystem a while.
        await trio.to_thread.run_sync(end_abandoned, state, control)


def _keep(file: Path, request: bytes) -> None:
    """Put the kernel's INIT where the next server of this mount finds it."""
    scratch = file.with_name(file.name + ".new")
    try:
        scratch.write_bytes(request)
        scratch.rename(file)
    except OSError as error:
        log.error("cannot write down how the mount began: %s", error)
        # Unanswered, it would let whoever looks at the mount wait for ever. Without a server the
        # keeper takes the mount away again.
        os._exit(1)


def _flush_without_deadlock() -> None:
    """Let writeback of a loop device over this mount make progress when memory is short.

    Without it the kernel may wait for us to answer writes while we wait for memory that those
    writes would free (kernel: PR_SET_IO_FLUSHER). Needs CAP_SYS_RESOURCE; others do without.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def _descriptors(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    """Entry point; started by the keeper with everything opened and locked."""
    parser = argparse.ArgumentParser(prog="fusedisk.server")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--ready", type=int, required=True)
    parser.add_argument("--told", type=int, required=True)
    parser.add_argument("--go", type=int, required=True)
    parser.add_argument("--images", type=_descriptors, required=True)
    # A keeper that is older than this server has none.
    parser.add_argument("--witnesses", type=_descriptors, default=[])
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--mode", type=lambda s: int(s, 8), required=True)
    arguments = parser.parse_args()
    handler = logging.handlers.RotatingFileHandler(
        arguments.state / "server.log", maxBytes=1 << 20, backupCount=3
    )
    logging.basicConfig(
        level=logging.INFO, handlers=[handler], format="%(asctime)s %(levelname)s %(message)s"
    )
    _flush_without_deadlock()
    # Only to interrupt a thread that waits for the kernel.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    # To make room is for a server that serves: until then the signal waits, and once the mount is
    # gone it is ignored. Invariant: it ends no process that is about to record a clean mount.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS - {signal.SIGUSR1})
    os.write(arguments.told, b"l")
    word = os.read(arguments.go, 16)
    if not word:
        # The keeper is gone, or needs no spare any more.
        return 0
    try:
        return trio.run(_serve, arguments, word == b"resume")
    except Exception:
        log.exception("the disk server failed")
        return 1


if __name__ == "__main__":
    sys.exit(main())
