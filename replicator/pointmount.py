"""Mounting a recovery point, serving it until it is unmounted, and unmounting it.

The point is pinned by a lock of the process that serves it. So one that is killed leaves a mount
that answers nothing, until it is unmounted, but no point that is kept for ever, and nothing of
what was written to the view.
"""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from fusedisk.errors import FuseDiskError
from fusedisk.keeper import MountFailed
from fusedisk.keeper import mount as fusermount
from fusedisk.keeper import unmount as fuserumount
from fusedisk.mounting import mounted_sources
from replicator.livepoint import LivePoint
from replicator.pointfs import PointDisks, PointFilesystem
from replicator.store import Store

log = logging.getLogger("replicator.mount")
_TYPE = "fusedisk-point"
_END_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class ViewOptions:
    """How a point is to be mounted; ``room`` in bytes is what may be written, None read-only."""

    point: int | None = None
    room: int | None = None
    scratch: Path | None = None
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None


def log_path(replica: Path) -> Path:
    """The log of whoever serves points of a replica; its folder is made. Raises FuseDiskError."""
    folder = replica.parent / ".mounts"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FuseDiskError(f"cannot write to store {replica.parent}: {error.strerror}") from error
    return folder / f"{replica.name}.log"


def check_mountpoint(mountpoint: Path) -> None:
    """Raises FuseDiskError unless it is an empty directory."""
    try:
        content = os.listdir(mountpoint)
    except OSError as error:
        raise FuseDiskError(f"cannot mount on {mountpoint}: {error.strerror}") from None
    if content or mountpoint.is_mount():
        raise FuseDiskError(f"mountpoint {mountpoint} is not an empty directory; choose another")


def serve(replica: Path, mountpoint: Path, options: ViewOptions, ready: Callable[[], None]) -> None:
    """Mount a point, call ``ready``, and serve it until it is unmounted. Raises FuseDiskError."""
    with Store(replica.parent) as store:
        try:
            point = LivePoint(store, replica.name, options.point)
        except OSError as error:
            raise FuseDiskError(f"cannot read replica {replica}: {error.strerror}") from error
        try:
            disks = PointDisks(point, _folder(options), options.room or 0)
        except OSError as error:
            point.close()
            raise FuseDiskError(
                f"cannot make a file for what is written in {_folder(options)}: {error.strerror}"
            ) from error
        try:
            _mount(replica, mountpoint, options, disks, ready)
        finally:
            disks.close()


def _folder(options: ViewOptions) -> Path | None:
    if options.room is None:
        return None
    return options.scratch or Path(tempfile.gettempdir())


def _mount(
    replica: Path,
    mountpoint: Path,
    options: ViewOptions,
    disks: PointDisks,
    ready: Callable[[], None],
) -> None:
    point = disks.point.point
    # Who unmounts finds the process by it.
    source = f"{os.getpid()}:{replica.absolute()}@{point.id}"
    source = source.replace("\\", "\\\\").replace(",", "\\,")
    asked = [f"fsname={source}", f"subtype={_TYPE}", "nosuid", "nodev", "default_permissions"]
    asked += ["ro"] if options.room is None else ["rw"]
    asked += ["allow_other"] if options.allow_other else []
    try:
        device = fusermount(str(mountpoint), asked)
    except (MountFailed, OSError) as error:
        raise FuseDiskError(f"cannot mount: {error}") from error
    operations = PointFilesystem(
        disks,
        os.getuid() if options.uid is None else options.uid,
        os.getgid() if options.gid is None else options.gid,
    )
    log.info("point %d (epoch %d) is mounted on %s", point.id, point.epoch, mountpoint)
    trio.run(_session, operations, device, mountpoint, ready)
    log.info("%s is unmounted", mountpoint)


async def _session(
    operations: PointFilesystem, device: int, mountpoint: Path, ready: Callable[[], None]
) -> None:
    pyfuse3.init(operations, f"/dev/fd/{device}", set())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_unmount_on_signal, mountpoint)
            ready()
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


async def _unmount_on_signal(mountpoint: Path) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            # The session ends with the mount. One that is in use goes on.
            failure = await trio.to_thread.run_sync(fuserumount, str(mountpoint))
            if failure is not None:
                log.warning("told to stop, but not unmounted: %s", failure)


def unmount(mountpoint: Path) -> None:
    """Unmount a point, also one whose process was killed; return when that process is gone.

    Raises FuseDiskError where it is none, or in use.
    """
    path = os.path.abspath(mountpoint)
    where = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    source = mounted_sources(_TYPE).get(where)
    if source is None:
        raise FuseDiskError(f"{mountpoint} is no mounted recovery point")
    match = re.match(r"(\d+):", source)
    process = _process(int(match[1])) if match else -1
    try:
        failure = fuserumount(where, lazy=process < 0)
        if failure is not None:
            raise FuseDiskError(f"not unmounted: {failure}; close what uses the disks")
        if process >= 0 and not select.select([process], [], [], _END_SECONDS_MAX)[0]:
            raise FuseDiskError("unmounted, but the process that served it goes on; see its log")
    finally:
        if process >= 0:
            os.close(process)


def _process(pid: int) -> int:
    """A descriptor of the process that serves a point, or -1 if it is gone."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return -1
    try:
        # The id may by now be anybody's.
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    if b"mount" in words:
        return process
    os.close(process)
    return -1
