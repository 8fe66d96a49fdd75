"""Mounting and unmounting as the command line does it: check everything, then start the keeper."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusedisk.changemap import CHUNK_MAX, CHUNK_MIN, Control
from fusedisk.daemons import read_daemons
from fusedisk.datapath import DISKS_MAX
from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.fencing import read_fence
from fusedisk.image import Image, create_image, open_image
from fusedisk.keeper import survives_crashes
from fusedisk.keeper import unmount as fusermount
from fusedisk.lineage import promotion, read_base
from fusedisk.preparing import prepare
from fusedisk.signals import StopSignals
from fusedisk.standby import close_gate
from fusedisk.state import default_state_dir, lock_state, locked, read_mount_record
from fusedisk.unsettled import unsettled, unsettled_text

_BUSY_SECONDS = 1.0
_FLUSH_SECONDS_MAX = 600.0
_UPGRADE_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class MountOptions:
    """What ``fusedisk mount`` was asked for; sizes in bytes."""

    create_size: int | None = None
    chunk_size: int = 64 << 10
    state_dir: Path | None = None
    read_only: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int = 0o600
    distrust: bool = False
    cache: str = "writeback"
    standby: bool = False


@dataclass(frozen=True)
class Mounted:
    """A mount that is usable; ``notices`` is what the user should know of its state."""

    keeper: subprocess.Popen[bytes]
    state: Path
    notices: list[str]


def find_state(mountpoint: Path) -> Path:
    """State directory of a mount, read from the kernel's table: the server need not answer.

    Raises FuseDiskError where nothing of ours is mounted.
    """
    return _find_mount(mountpoint)[1]


def _find_mount(mountpoint: Path) -> tuple[str, Path]:
    """(mountpoint as the kernel names it, state directory). Raises FuseDiskError."""
    mounts = {where: Path(state) for where, state in mounted_sources("fusedisk").items()}
    # Its parent first: to ask about the mountpoint itself would wait for a server that is down.
    path = os.path.abspath(mountpoint)
    wanted = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if wanted not in mounts:
        wanted = os.path.realpath(mountpoint)
    if wanted not in mounts:
        raise FuseDiskError(f"{mountpoint} is not a fusedisk mount")
    return wanted, mounts[wanted]


def mounted_sources(subtype: str) -> dict[str, str]:
    """Sources of mounts of one kind, by mountpoint; of several on one another that on top."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        if kind == f"fuse.{subtype}":
            found[_unescape(before.split(" ")[4])] = _unescape(source)
    return found


def _unescape(text: str) -> str:
    """Undo the octal escapes of mountinfo (kernel: fs/seq_file.c, mangle_path)."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def mount(
    images: Sequence[Path], mountpoint: Path, options: MountOptions, signals: StopSignals
) -> Mounted:
    """Mount ``images``; return when they are usable.

    Raises FuseDiskError, also when told to stop; then nothing is mounted and no image has changed.
    """
    if options.chunk_size & (options.chunk_size - 1) or not (
        CHUNK_MIN <= options.chunk_size <= CHUNK_MAX
    ):
        raise UsageError("--chunk-size must be a power of two from 4KiB to 16MiB")
    if options.standby and options.read_only:
        raise UsageError("--standby ends in a disk that is written: leave out --read-only")
    if len(images) > DISKS_MAX:
        raise UsageError(f"a mount serves at most {DISKS_MAX} disks")
    _check_mountpoint(mountpoint)
    names = [image.name for image in images]
    for name in names:
        if names.count(name) > 1:
            raise FuseDiskError(f"two images are named {name}; rename one")
    missing = [i for i in images if options.create_size is not None and not os.path.lexists(i)]
    made: list[Path] = []
    opened: list[Image] = []
    lock = -1
    try:
        for path in missing:
            create_image(path, options.create_size or 0)
            made.append(path)
        for path in images:
            opened.append(open_image(path, read_only=options.read_only, cache=options.cache))
        state = (options.state_dir or default_state_dir(images[0])).absolute()
        _check_path("state directory", state)
        promoted, base = promotion(opened) if options.standby else (True, None)
        if promoted:
            base = read_base(opened, read_only=options.read_only)
        lock = lock_state(state)
        notice = prepare(
            state,
            mountpoint.resolve(),
            opened,
            options.chunk_size,
            read_only=options.read_only,
            base=base,
            distrust=options.distrust,
            standby=not promoted,
            cache=options.cache,
        )
        # Invariant: the control file of this mount is published by now. A cutover that records
        # *committing* later looks at it before it asks for the promotion (replicator.handover).
        if not promoted:
            close_gate(state)
        elif read_fence(image.path for image in opened) is not None:
            control = Control(state / "control", True)
            control.set_fence(True)
            control.close()
        cutover = unsettled(read_mount_record(state))
        signals.check()
        keeper = _start_keeper(state, lock, mountpoint.resolve(), opened, options)
        # Somebody may use the mount already: then it stays, as if the signal had come later.
        if signals.told and fusermount(str(mountpoint.resolve())) is None:
            keeper.wait()
            signals.check()
    except BaseException:
        for path in made:
            path.unlink()
        raise
    finally:
        for image in opened:
            os.close(image.fd)
        if lock >= 0:
            os.close(lock)
    notices = [notice] if notice else []
    if cutover is not None:
        notices.append(unsettled_text(cutover))
    return Mounted(keeper, state, notices)


def stay(mounted: Mounted, signals: StopSignals) -> None:
    """Return after the unmount; a signal to stop is passed to the keeper, which unmounts.

    A busy mount goes on, and the keeper's log says so. Raises FuseDiskError for a failed server.
    """
    signals.pass_to(mounted.keeper)
    if mounted.keeper.wait() != 0:
        raise FuseDiskError(f"the disk server failed; see the logs in {mounted.state}")


def _check_path(what: str, path: Path) -> None:
    """Refuse what fusermount3's options and the kernel's mount table, read by others, cannot hold.

    Raises FuseDiskError.
    """
    if "\n" in str(path):
        raise FuseDiskError(f"{what} {str(path)!r} holds a line break; choose another")


def _check_mountpoint(mountpoint: Path) -> None:
    _check_path("mountpoint", mountpoint.absolute())
    try:
        content = os.listdir(mountpoint)
    except OSError as error:
        raise FuseDiskError(f"cannot mount on {mountpoint}: {error.strerror}") from None
    if content or mountpoint.is_mount():
        raise FuseDiskError(f"mountpoint {mountpoint} is not an empty directory; choose another")


def _start_keeper(
    state: Path, lock: int, mountpoint: Path, images: Sequence[Image], options: MountOptions
) -> subprocess.Popen[bytes]:
    source = str(state).replace("\\", "\\\\").replace(",", "\\,")
    mount_options = [f"fsname={source}", "subtype=fusedisk", "nosuid", "nodev"]
    mount_options += ["default_permissions"]
    mount_options += ["ro"] if options.read_only else ["rw"]
    mount_options += ["allow_other"] if options.allow_other else []
    ready, told = os.pipe()
    fds = ",".join(str(image.fd) for image in images)
    with os.fdopen(ready, "rb") as answers:
        try:
            keeper = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "fusedisk.keeper"),
                    *("--state", str(state), "--mountpoint", str(mountpoint)),
                    *("--options", "\n".join(mount_options), "--images", fds),
                    *("--uid", str(os.getuid() if options.uid is None else options.uid)),
                    *("--gid", str(os.getgid() if options.gid is None else options.gid)),
                    *("--mode", f"{options.mode:o}"),
                    *("--ready", str(told), "--lock", str(lock)),
                ],
                pass_fds=[told, lock, *(image.fd for image in images)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A Ctrl-C must not meet it half-way into the mount: see StopSignals.
                start_new_session=True,
            )
        finally:
            os.close(told)
        answer = answers.readline().decode(errors="replace").strip()
    if answer != "ready":
        keeper.wait()
        raise FuseDiskError(f"cannot mount: {answer or f'the server failed, see {state}'}")
    try:
        for image in images:
            (mountpoint / image.name).stat()
    except OSError as error:
        # Somebody may have told the keeper to stop at once; what is left of the mount goes too.
        fusermount(str(mountpoint))
        keeper.wait()
        raise FuseDiskError(
            f"unmounted again before it could be used ({error.strerror}); see the logs in {state}"
        ) from None
    return keeper


def upgrade(mountpoint: Path) -> int:
    """Replace the server by one of the installed code; return its pid. No request fails.

    Raises FuseDiskError where that cannot be done; then the old server goes on.
    """
    state = find_state(mountpoint)
    if not survives_crashes():
        raise FuseDiskError("this kernel cannot hand a mount over: Linux 6.9 or newer is needed")
    before = read_daemons(state)
    if before.keeper is None:
        raise FuseDiskError("the keeper is gone; unmount and mount again when the guest is down")
    os.kill(before.keeper, signal.SIGUSR1)
    deadline = time.monotonic() + _UPGRADE_SECONDS_MAX
    while (now := read_daemons(state)).restarts == before.restarts or now.server is None:
        if now.keeper is None:
            raise FuseDiskError("the mount ended meanwhile")
        if now.refused > before.refused:
            raise FuseDiskError(f"the installed code does not load; see {state / 'keeper.log'}")
        if time.monotonic() > deadline:
            raise FuseDiskError(f"the server was not replaced; see the logs in {state}")
        time.sleep(0.01)
    return now.server


def unmount(mountpoint: Path) -> str | None:
    """Flush, record a clean state, and end the daemons. Raises FuseDiskError.

    A busy mount is refused by the kernel and stays as it is. Senders read the images, not the
    mount, so they never make it busy. Returns what to tell of a mount whose daemons had died: it
    is taken away, busy or not, and has no clean state.
    """
    where, state = _find_mount(mountpoint)
    daemons = read_daemons(state)
    dead = daemons.keeper is None and daemons.server is None and not locked(state)
    failure = fusermount(where, lazy=dead)
    until = time.monotonic() + _BUSY_SECONDS
    while failure is not None and time.monotonic() < until:
        # The kernel closes some files of a program that has just ended a moment later (io_uring).
        time.sleep(0.05)
        failure = fusermount(where, lazy=dead)
    if failure is not None:
        raise FuseDiskError(f"not unmounted: {failure}; close what uses the disks")
    if dead:
        return "server and keeper had died; the next mount will not trust the change map"
    deadline = time.monotonic() + _FLUSH_SECONDS_MAX
    while locked(state):
        if time.monotonic() > deadline:
            raise FuseDiskError(f"unmounted, but the server is still flushing; see {state}")
        time.sleep(0.01)
    if not (state / "clean.json").exists():
        raise FuseDiskError(f"unmounted, but a flush failed; see {state / 'server.log'}")
    return None
