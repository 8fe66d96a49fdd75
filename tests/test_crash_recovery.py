"""A crash of the host, for real: XFS is shut down, and what was not synced is gone.

The kernel drops what it holds for the file system, data and metadata, as a power loss does.
"""

import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from conftest import Mount, fusedisk, unavailable, wait_for
from verifying_load import kill_server, replicated

from fusedisk import activityfile, preparing
from fusedisk.activity import REGION, ActivityLog
from fusedisk.capture import Capture
from fusedisk.changemap import ChangeMap, Control
from fusedisk.checkpoint import checkpoint
from fusedisk.disk import Disk
from fusedisk.epochs import STEP, raise_bound, read_bound, reserve
from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from fusedisk.image import Image, open_image
from fusedisk.preparing import prepare
from fusedisk.state import read_mount_record

CHUNK = 64 << 10
SIZE = 6 * REGION + 3 * CHUNK + 512


def run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


class Xfs:
    """A file system that can lose its power."""

    def __init__(self, device: Path, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.mounted = False
        self.users: list[Host] = []

    def mount(self) -> None:
        run("mount", self.device, self.folder)
        self.mounted = True

    def unmount(self) -> None:
        # A killed process lets go of its files a moment after it is gone from the process list.
        wait_for(
            lambda: subprocess.run(["umount", self.folder], capture_output=True).returncode == 0,
            "the file system is not busy any more",
        )
        self.mounted = False

    def cut_power(self) -> None:
        """What was not synced is lost; nothing can be written any more."""
        run("xfs_io", "-x", "-c", "shutdown", self.folder)


@pytest.fixture
def xfs(tmp_path: Path, loop_device: Callable[[Path], Path]) -> Iterator[Xfs]:
    backing = tmp_path / "xfs.img"
    backing.touch()
    os.truncate(backing, 400 << 20)
    (tmp_path / "xfs").mkdir()
    try:
        run("mkfs.xfs", "-q", backing)
        found = Xfs(loop_device(backing), tmp_path / "xfs")
        found.mount()
    except (OSError, subprocess.CalledProcessError) as error:
        unavailable(f"no XFS: {error}")
    yield found
    for user in found.users:
        user.close()
    if found.mounted:
        found.unmount()


class Host:
    """What a mount is made of, without FUSE; one host that crashes and comes up again."""

    def __init__(self, xfs: Xfs, seed: int) -> None:
        self.xfs, self.random = xfs, random.Random(seed)
        self.path, self.state = xfs.folder / "disk.img", xfs.folder / "state"
        self.path.touch()
        os.truncate(self.path, SIZE)
        self.state.mkdir()
        self.image: Image | None = None
        xfs.users.append(self)
        self.notice: str | None = None

    def start(self, base: str | None = None) -> None:
        self.image = open_image(self.path, read_only=False)
        self.notice = prepare(
            self.state, self.xfs.folder / "mnt", [self.image], CHUNK, read_only=False, base=base
        )
        self.generation = read_mount_record(self.state).generation
        self.control = Control(self.state / "control", True)
        self.map = ChangeMap(self.state / "0.map", True)
        self.log = ActivityLog(self.state / "activity", self.generation)
        self.disk = Disk(self.control, self.map, self.image.fd, activity=self.log)

    def crash(self) -> None:
        self.xfs.cut_power()
        self.close()
        self.xfs.unmount()
        self.xfs.mount()

    def close(self) -> None:
        """End the processes."""
        if self.image is not None:
            self.log.close()
            self.control.close()
            self.map.close()
            os.close(self.image.fd)
            self.image = None

    def work(self) -> None:
        """One thing that a guest, the kernel or the server may do."""
        assert self.image is not None
        offset = self.random.randrange(SIZE)
        length = min(self.random.choice([512, 4096, CHUNK, 3 * CHUNK]), SIZE - offset)
        match self.random.randrange(12):
            case 0:
                os.fdatasync(self.image.fd)
            case 1:
                self.disk.zero(offset, length)
            case 2:
                # Writeback of the map and of the image comes when it pleases.
                os.fdatasync(self.map.fd)
            case 3:
                self.checkpoint()
            case _:
                self.disk.write(self.random.randbytes(length), offset)

    def checkpoint(self) -> int:
        assert self.image is not None
        files = [self.image.fd, self.map.fd]
        return trio.run(lambda: checkpoint(self.log, self.state, self.control, files, kept=0))

    def content(self) -> bytes:
        return self.path.read_bytes()


class Replica:
    """The other end, in a few lines: it has what it was sent, and the epoch of that."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.epoch = 0
        self.generation = ""

    def catch_up(self, host: Host) -> int:
        """A pass; how many bytes were sent."""
        since = self.epoch if self.generation == host.generation else 0
        reserve(host.state, host.control)
        epoch = host.control.advance()
        content = host.content()
        sent = 0
        for first, count in host.map.runs(since):
            start, end = first * CHUNK, min((first + count) * CHUNK, SIZE)
            self.data[start:end] = content[start:end]
            sent += end - start
        self.epoch, self.generation = epoch, host.generation
        return sent


@pytest.mark.parametrize("seed", range(4))
def test_replica_is_right_after_a_power_loss(xfs: Xfs, seed: int) -> None:
    host, replica = Host(xfs, seed), Replica()
    host.start()
    generation = host.generation
    lost = 0
    for _ in range(4):
        for _ in range(host.random.randrange(40)):
            host.work()
            if host.random.randrange(12) == 0:
                replica.catch_up(host)
        before = host.content()
        host.crash()
        lost += host.content() != before
        host.start()
        assert host.generation == generation
        assert "will be sent again" in str(host.notice)
        assert host.control.epoch > replica.epoch
        replica.catch_up(host)
        assert bytes(replica.data) == host.content()
    assert lost


def test_what_a_checkpoint_covered_is_not_sent_again(xfs: Xfs) -> None:
    host, replica = Host(xfs, 0), Replica()
    host.start()
    for region in range(6):
        host.disk.write(b"x" * CHUNK, region * REGION)
    replica.catch_up(host)
    assert host.checkpoint() == 0
    host.disk.write(b"y" * 512, 2 * REGION)
    assert host.checkpoint() == 5
    host.disk.write(b"z" * 512, 4 * REGION + CHUNK)
    host.crash()
    host.start()
    assert host.notice == "not unmounted cleanly: 32 MiB that were in use will be sent again"
    sent = replica.catch_up(host)
    assert bytes(replica.data) == host.content()
    assert sent == 2 * REGION
    for region in (0, 1, 3, 5):
        assert replica.data[region * REGION : region * REGION + CHUNK] == b"x" * CHUNK


def test_crash_during_recovery_is_another_crash(xfs: Xfs, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("_mark_doubtful", "_publish", "raise_bound", "write_durably"):
        host, replica = Host(xfs, 1), Replica()
        host.start()
        host.disk.write(b"a" * CHUNK, REGION)
        replica.catch_up(host)
        host.crash()

        def stop(*_: object) -> None:
            raise OSError(5, "stopped here")

        with monkeypatch.context() as patch:
            patch.setattr(preparing, step, stop)
            with pytest.raises(FuseDiskError):
                host.start()
        host.crash()
        host.start()
        assert "will be sent again" in str(host.notice)
        replica.catch_up(host)
        assert bytes(replica.data) == host.content()
        host.crash()
        run("rm", "-r", host.state, host.path)


@pytest.mark.parametrize("lost", ["activity", "epochs", "0.map", "mount.json", "torn"])
def test_state_that_is_damaged_too_is_not_believed(xfs: Xfs, lost: str) -> None:
    host = Host(xfs, 2)
    host.start()
    generation = host.generation
    host.disk.write(b"a" * CHUNK, REGION)
    host.crash()
    if lost == "torn":
        log = host.state / "activity"
        log.write_bytes(bytes(512) + log.read_bytes()[512:4096] + bytes(4096))
    else:
        (host.state / lost).unlink()
    host.start()
    assert "is not trusted and begins anew" in str(host.notice)
    assert host.generation != generation
    assert host.log.hot() == []
    host.crash()


def test_image_touched_after_the_host_came_up_is_not_believed(
    xfs: Xfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(xfs, 3)
    host.start()
    host.crash()
    monkeypatch.setattr(preparing, "_boot_id", lambda: "the next boot")
    booted = int(host.path.stat().st_ctime) + 1
    monkeypatch.setattr(preparing, "_boot_time", lambda: booted)
    host.start()
    assert "0 MiB" in str(host.notice)
    host.crash()
    monkeypatch.setattr(preparing, "_boot_id", lambda: "and another one")
    os.utime(host.path, (booted + 1, booted + 1))
    host.start()
    assert "changed after the host came up again" in str(host.notice)
    host.crash()


def test_image_put_in_place_of_another_is_not_believed(xfs: Xfs) -> None:
    host = Host(xfs, 4)
    host.start()
    host.crash()
    other = xfs.folder / "other"
    other.touch()
    os.truncate(other, SIZE)
    other.rename(host.path)
    host.start()
    assert "another file" in str(host.notice)
    host.crash()


def test_nothing_leaves_the_record_once_a_flush_has_failed(xfs: Xfs) -> None:
    host = Host(xfs, 5)
    host.start()
    host.disk.write(b"x", REGION)
    assert host.checkpoint() == 0
    host.control.set_doubt()
    with pytest.raises(OSError, match="a flush failed"):
        host.checkpoint()
    assert host.log.hot() == [1]
    host.crash()
    host.start()
    assert "will be sent again" in str(host.notice) or "a flush failed" in str(host.notice)
    host.crash()


def test_crash_keeps_a_promotion_only_with_the_marks_made_since(xfs: Xfs) -> None:
    host = Host(xfs, 6)
    host.start("a promotion")
    generation = host.generation
    host.disk.write(b"x", REGION)
    host.crash()
    # The crash took the image's new times, so that it looks as it was promoted.
    host.start("a promotion")
    assert read_mount_record(host.state).base == "a promotion"
    assert host.generation == generation
    assert host.map.count(0) == REGION // CHUNK
    host.crash()
    (host.state / "activity").unlink()
    host.start("a promotion")
    assert "is not trusted" in str(host.notice)
    assert read_mount_record(host.state).base is None
    host.crash()
    # A later promotion says what the disks are, whatever became of the mount before.
    host.start("the next promotion")
    assert host.notice is None
    assert read_mount_record(host.state).base == "the next promotion"
    assert host.map.count(0) == 0
    host.crash()


def test_capture_opens_no_epoch_beyond_the_bound(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control", 1, 2)
    captured = Capture(str(tmp_path), control, 1 << 20, CHUNK)
    captured.open(0)
    assert (captured.epoch, control.limit) == (1, 2)
    for _ in range(2):
        with pytest.raises(OverflowError):
            Capture(str(tmp_path), control, 1 << 20, CHUNK).open(0)
    assert captured.closed() and captured.intact
    captured.close()
    control.close()


def test_bound_of_epochs_is_ahead_and_never_goes_back(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control", 1, 2)
    control.advance()
    with pytest.raises(OverflowError):
        control.advance()
    reserve(tmp_path, control)
    assert control.limit == read_bound(tmp_path) == 2 + STEP
    assert raise_bound(tmp_path, 5) == 2 + STEP
    for _ in range(STEP + 10):
        reserve(tmp_path, control)
        control.advance()
    bound = read_bound(tmp_path)
    assert bound is not None
    assert control.epoch < bound
    (tmp_path / "epochs").write_text("{}")
    assert read_bound(tmp_path) is None


def test_mounted_disk_on_a_host_that_loses_power(
    xfs: Xfs, fuse: Callable[..., Mount], tmp_path: Path
) -> None:
    """The whole of it: mount, crash, mount."""
    image = xfs.folder / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    mount = fuse(image)
    mount.state = xfs.folder / "state"
    mount.mount()
    with mount.disk().open("r+b", buffering=0) as file:
        file.write(b"synced")
        os.fsync(file.fileno())
        file.seek(3 * REGION)
        file.write(b"lost")
    record = activityfile.read(
        mount.state / "activity", read_mount_record(mount.state).generation, 7
    )
    assert record == [0, 3]
    xfs.cut_power()
    for pid in mount.daemons():
        os.kill(pid, signal.SIGKILL)
    run("fusermount3", "-u", "-z", "--", mount.mountpoint)
    mount.wait_ended()
    xfs.unmount()
    xfs.mount()
    assert re.search("32 MiB that were in use", mount.mount())
    assert mount.changed() == [2 * REGION // CHUNK]
    assert mount.disk().read_bytes()[:6] == b"synced"
    mount.unmount()
    assert mount.mount() == ""
    mount.unmount()
    said = fusedisk("mount", "--distrust", "--state-dir", mount.state, image, mount.mountpoint)
    assert "--distrust was given" in said.stderr
    assert mount.changed() == [0]
    mount.unmount()
    # The mounts below are counted before the file system goes.
    xfs.unmount()


def test_power_loss_after_several_servers(
    xfs: Xfs, fuse: Callable[..., Mount], tmp_path: Path
) -> None:
    """What one server put on record the next ones keep, and each adds to it."""
    image = xfs.folder / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    mount = fuse(image)
    mount.state = xfs.folder / "state"
    mount.mount()
    chance = random.Random(SIZE)
    with replicated(mount, tmp_path) as folder:
        replica = folder / image.name
        with mount.disk().open("r+b", buffering=0) as file:
            for region in range(6):
                for _ in range(20):
                    file.seek(region * REGION + chance.randrange(REGION))
                    file.write(chance.randbytes(4096))
                if region == 1:
                    assert fusedisk("upgrade", mount.mountpoint).returncode == 0
                elif region < 5:
                    kill_server(mount)
        wait_for(lambda: replica.exists() and has_data(replica, image), "the replica has it")
        xfs.cut_power()
        for pid in mount.daemons():
            os.kill(pid, signal.SIGKILL)
    run("fusermount3", "-u", "-z", "--", mount.mountpoint)
    mount.wait_ended()
    xfs.unmount()
    xfs.mount()
    # Something was lost, and the replica does not know.
    assert image.read_bytes() != replica.read_bytes()
    assert "MiB that were in use will be sent again" in mount.mount()
    with replicated(mount, tmp_path):
        wait_for(lambda: has_data(image, replica), "the replica followed the source back")
    assert image.read_bytes() == replica.read_bytes()
    mount.unmount()
    # The mounts below are counted before the file system goes.
    xfs.unmount()


def has_data(one: Path, other: Path) -> bool:
    """Whether all that is not a hole in the other file is in this one."""
    with one.open("rb") as found, other.open("rb") as wanted:
        return all(
            os.pread(found.fileno(), length, offset) == os.pread(wanted.fileno(), length, offset)
            for offset, length in data_extents(wanted.fileno(), 0, SIZE)
        )
