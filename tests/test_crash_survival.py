"""Servers and keepers killed under load: the guest sees a pause, never an error or an old block.

FUSEDISK_SERVER_KILLS is the number of kills at random points (default 12).
"""

import contextlib
import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, processes, unavailable, wait_for
from verifying_load import MIB, SIZES, Load, cut_over, kill_server, mount_disks, replicated

from fusedisk.changemap import ChangeMap, Control
from fusedisk.extents import data_extents
from fusedisk.gate import take_lease

KILLS = int(os.environ.get("FUSEDISK_SERVER_KILLS", "12"))
CHUNK = 65536

MakeMount = Callable[..., Mount]


@pytest.fixture
def mounted(tmp_path: Path, fuse: MakeMount) -> Mount:
    return mount_disks(tmp_path, fuse)


@pytest.fixture
def load(mounted: Mount) -> Iterator[Load]:
    made = Load(mounted)
    yield made
    made.stop()


def kill_by_id(mount: Mount) -> None:
    """Kill it and wait until the next one is named."""
    pid = mount.server()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: mount.server() != pid, "another server begins")


def keeper_log(mount: Mount) -> str:
    return (mount.state / "keeper.log").read_text()


def wait_for_spare(mount: Mount) -> int:
    """The process id of the server that waits."""

    def spares() -> list[int]:
        found = processes("fusedisk.server", mount.state)
        return [pid for pid in found if pid != mount.server()]

    wait_for(spares, "there is a spare server")
    return spares()[0]


def all_data_is_marked(mount: Mount) -> None:
    """The disks began as holes, so whatever is data now was written."""
    for index, image in enumerate(mount.images):
        changes = ChangeMap(mount.state / f"{index}.map")
        with image.open("rb") as file:
            for offset, length in data_extents(file.fileno(), 0, changes.size):
                for chunk in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1):
                    assert changes.last(chunk) > 0, (index, chunk)
        changes.close()


@pytest.mark.soak
def test_killed_at_random_points_nothing_is_lost(mounted: Mount, load: Load) -> None:
    chance = random.Random(KILLS)
    pauses = []
    for _ in range(KILLS):
        load.progress()
        # Anywhere among requests, also before a spare server is ready.
        time.sleep(chance.uniform(0, 0.6))
        pauses.append(kill_server(mounted))
    load.progress()
    load.end()
    pauses.sort()
    milliseconds = [round(1000 * p) for p in (pauses[len(pauses) // 2], pauses[-1])]
    print(f"{KILLS} kills; pause: median {milliseconds[0]} ms, longest {milliseconds[1]} ms")
    status = mounted.status()
    assert status["server"]["restarts"] == KILLS
    load.verify([mounted.disk(i) for i in range(len(SIZES))])
    all_data_is_marked(mounted)
    changed = mounted.changed()
    mounted.unmount()
    load.verify(mounted.images)
    # Trusted, and the same: a crash of the server alone costs no comparison.
    assert mounted.mount() == ""
    assert mounted.changed() == changed


@pytest.mark.soak
def test_killed_while_replicating_the_replica_is_identical(
    tmp_path: Path, mounted: Mount, load: Load
) -> None:
    with replicated(mounted, tmp_path) as replica:
        chance = random.Random(KILLS)
        for _ in range(KILLS):
            load.progress()
            time.sleep(chance.uniform(0, 0.6))
            kill_server(mounted)
        load.progress()
        load.end()
        cut_over(mounted)
    load.verify([replica / image.name for image in mounted.images])
    for image in mounted.images:
        assert (replica / image.name).read_bytes() == image.read_bytes()


@pytest.mark.parametrize("engine", ["io_uring", "libaio"])
def test_fio_verifies_through_kills(tmp_path: Path, mounted: Mount, engine: str) -> None:
    if not shutil.which("fio"):
        unavailable("fio is missing")
    command = [
        *("fio", "--name=v", f"--filename={mounted.disk()}", f"--ioengine={engine}"),
        *("--rw=randwrite", "--bs=4k", "--iodepth=16", "--direct=1", "--verify=crc32c"),
        *("--numjobs=2", "--size=1m", "--offset_increment=1m", "--loops=8", "--rate_iops=500"),
        *("--verify_fatal=1", "--verify_state_save=0", "--fsync=64"),
    ]
    out = tmp_path / "fio.log"
    running: list[subprocess.Popen[bytes]] = []

    def fio() -> None:
        with out.open("wb") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log))

    def verified() -> None:
        assert running[-1].wait(90) == 0, out.read_text()

    fio()
    try:
        for _ in range(3):
            time.sleep(0.7)
            if running[-1].poll() is not None:
                verified()
                fio()
            kill_server(mounted)
        verified()
    finally:
        running[-1].kill()
        running[-1].wait()
    assert mounted.status()["server"]["restarts"] == 3


def test_killed_while_flushing(mounted: Mount) -> None:
    errors: list[OSError] = []
    stop = threading.Event()

    def flush(number: int) -> None:
        fd = os.open(mounted.disk(), os.O_RDWR)
        try:
            while not stop.is_set():
                os.pwrite(fd, os.urandom(MIB), number * MIB)
                (os.fsync if number % 2 else os.fdatasync)(fd)
        except OSError as error:
            errors.append(error)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=flush, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        time.sleep(0.2)
        kill_server(mounted)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert errors == []


@pytest.mark.parametrize("outcome", ["opened", "fenced", "abandoned"])
def test_held_writes_stay_held_by_the_next_server(mounted: Mount, outcome: str) -> None:
    fd = os.open(mounted.disk(), os.O_RDWR)
    direct = os.open(mounted.disk(), os.O_RDONLY | os.O_DIRECT)
    block = mmap.mmap(-1, 4096)
    results: list[int] = []

    def write() -> None:
        try:
            results.append(os.pwrite(fd, b"held", 0))
        except OSError as error:
            results.append(-(error.errno or 0))

    writer = threading.Thread(target=write)
    lease = take_lease(mounted.state)
    control = Control(mounted.state / "control", True)
    try:
        control.set_gate(True)
        writer.start()
        for _ in range(2):
            kill_by_id(mounted)
            # Reads, past the kernel's cache, are answered, so the server is up; the write waits.
            block[:] = b"?" * 4096
            assert os.preadv(direct, [block], MIB) == 4096 and block[:] == bytes(4096)
            assert results == []
            assert mounted.images[0].read_bytes()[:4] == bytes(4)
        if outcome == "fenced":
            control.set_fence(True)
        if outcome != "abandoned":
            control.set_gate(False)
    finally:
        # Whoever holds the lease no more has no say over the gate: the server opens it.
        os.close(lease)
        writer.join(60)
        control.close()
        os.close(direct)
        os.close(fd)
    assert results == ([-errno.EROFS] if outcome == "fenced" else [4])


def test_the_spare_server_killed_is_replaced(mounted: Mount, load: Load) -> None:
    spare = wait_for_spare(mounted)
    os.kill(spare, signal.SIGKILL)
    wait_for(lambda: "the spare server ended" in keeper_log(mounted), "the keeper noticed")
    # With and without a spare, the next server is there.
    kill_server(mounted)
    load.progress()
    wait_for_spare(mounted)
    kill_server(mounted)
    load.progress()
    load.end()
    load.verify([mounted.disk(i) for i in range(len(SIZES))])
    assert mounted.status()["server"]["restarts"] == 2


def test_the_keeper_killed_the_disk_goes_on(mounted: Mount, load: Load) -> None:
    wait_for_spare(mounted)
    (keeper,) = processes("fusedisk.keeper", mounted.state)
    server = mounted.server()
    os.kill(keeper, signal.SIGKILL)
    # The spare server ends with the keeper.
    wait_for(lambda: mounted.daemons() == [server], "only the server is left")
    load.progress()
    status = mounted.status()
    assert status["keeper"]["pid"] is None and status["server"]["pid"] == server
    assert "the keeper is gone" in fusedisk("status", mounted.mountpoint).stdout
    refused = fusedisk("upgrade", mounted.mountpoint)
    assert refused.returncode == 1 and "the keeper is gone" in refused.stderr
    load.end()
    mounted.unmount()
    load.verify(mounted.images)
    assert mounted.mount() == ""


def close_dead(fd: int) -> None:
    """Close a file whose server is gone: the kernel says so, and closes it."""
    with pytest.raises(OSError, match="not connected"):
        os.close(fd)


@pytest.mark.parametrize("busy", [False, True])
def test_keeper_and_server_killed(mounted: Mount, busy: bool) -> None:
    fd = os.open(mounted.disk(), os.O_RDWR)
    os.pwrite(fd, b"x", 0)
    try:
        (keeper,) = processes("fusedisk.keeper", mounted.state)
        os.kill(keeper, signal.SIGKILL)
        os.kill(mounted.server(), signal.SIGKILL)
        mounted.wait_ended()
        with pytest.raises(OSError):
            os.pread(fd, 1, 0)
        if not busy:
            close_dead(fd)
        status = mounted.status()
        assert status["keeper"]["pid"] is None and status["server"]["pid"] is None
        assert "the disks are dead" in fusedisk("status", mounted.mountpoint).stdout
        result = fusedisk("unmount", mounted.mountpoint)
        assert result.returncode == 0, result.stderr
        assert "server and keeper had died" in result.stderr
        assert not mounted.mounted
    finally:
        if busy:
            close_dead(fd)
    assert "not unmounted cleanly" in mounted.mount()


def test_a_server_that_cannot_start_is_tried_again_ever_more_seldom(
    mounted: Mount, load: Load
) -> None:
    request = (mounted.state / "init").read_bytes()
    load.progress()
    (mounted.state / "init").write_bytes(request[:-1])
    os.kill(mounted.server(), signal.SIGKILL)
    begun = time.monotonic()

    def delays() -> list[float]:
        lines = [s for s in keeper_log(mounted).splitlines() if "starting another in" in s]
        return [float(s.split()[-2]) for s in lines]

    wait_for(lambda: len(delays()) >= 6, "several servers failed")
    assert time.monotonic() - begun > sum(delays()[:-1])
    assert delays()[2:6] == sorted(set(delays()[2:6]))
    assert "recorded INIT request is damaged" in (mounted.state / "server.log").read_text()
    load.check()
    (mounted.state / "init").write_bytes(request)
    load.progress()
    load.end()
    load.verify([mounted.disk(i) for i in range(len(SIZES))])
    mounted.unmount()
    assert mounted.mount() == ""


def test_a_failed_flush_leaves_no_clean_mark(
    tmp_path: Path, fuse: MakeMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed writeback once; a later flush that works proves nothing."""
    source, library = tmp_path / "fail.c", tmp_path / "fail.so"
    source.write_text(
        """#include <errno.h>
        #include <unistd.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        int fdatasync(int fd)
        {
            if (unlink(getenv("FAIL_ONCE")) == 0) { errno = EIO; return -1; }
            return syscall(SYS_fdatasync, fd);
        }"""
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("FAIL_ONCE", str(tmp_path / "once"))
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    mount = fuse(image)
    with monkeypatch.context() as patch:
        # Behind what is there already: a sanitizer's library wants to be the first.
        patch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {library}".strip())
        mount.mount()
    fd = os.open(mount.disk(), os.O_RDWR)
    try:
        os.pwrite(fd, b"lost", 0)
        (tmp_path / "once").touch()
        with pytest.raises(OSError, match="Input/output"):
            os.fdatasync(fd)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    # Neither this server nor the next one forgets.
    kill_server(mount)
    result = fusedisk("unmount", mount.mountpoint)
    assert result.returncode == 1 and "a flush failed" in result.stderr
    mount.wait_ended()
    # The counter's file may not survive the host; what is believed after a crash is gone, durably.
    assert not (mount.state / "activity").exists()
    assert "was not unmounted cleanly, and a flush failed" in mount.mount()


@pytest.fixture
def overcommitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A folder whose device has no room for what its file system thinks; the tmpfs that has it."""
    small, folder = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("overcommitted")
    done: list[tuple[str | Path, ...]] = []

    def run(*command: str | Path, undo: tuple[str | Path, ...] | None = None) -> str:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode != 0:
            unavailable(f"no file system that fails: {result.stderr.strip()}")
        if undo is not None:
            done.append(undo)
        return result.stdout.strip()

    try:
        run("mount", "-t", "tmpfs", "-o", "size=24m", "none", small, undo=("umount", small))
        (small / "device").touch()
        os.truncate(small / "device", 64 * MIB)
        run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", small / "device")
        loop = run("losetup", "--find", "--show", small / "device")
        done.append(("losetup", "--detach", loop))
        run("mount", loop, folder, undo=("umount", folder))
        yield folder, small
    finally:
        for undo in reversed(done):
            subprocess.run(list(map(str, undo)), check=True)


def test_a_failed_flush_that_died_with_its_server_is_not_forgotten(
    tmp_path: Path,
    overcommitted: tuple[Path, Path],
    fuse: MakeMount,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel tells the server, which is killed before it can tell anybody."""
    source, library = tmp_path / "die.c", tmp_path / "die.so"
    source.write_text(
        """#include <signal.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        #include <stdlib.h>
        int fdatasync(int fd)
        {
            int failed = syscall(SYS_fdatasync, fd);
            if (failed && unlink(getenv("DIE_ONCE")) == 0) {
                unsetenv("LD_PRELOAD");
                if (system(getenv("BEFORE_IT"))) return failed;
                kill(getpid(), SIGKILL);
            }
            return failed;
        }"""
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    folder, small = overcommitted
    monkeypatch.setenv("DIE_ONCE", str(tmp_path / "once"))
    # Every later flush succeeds.
    monkeypatch.setenv("BEFORE_IT", f"mount -o remount,size=100m {small}")
    (tmp_path / "once").touch()
    image = folder / "disk.img"
    image.touch()
    os.truncate(image, 48 * MIB)
    mount = fuse(image)
    mount.state = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {library}".strip())
        mount.mount()
    fd = os.open(mount.disk(), os.O_RDWR)
    try:
        for offset in range(0, 40 * MIB, MIB):
            os.pwrite(fd, os.urandom(MIB), offset)
        with contextlib.suppress(OSError):
            os.fdatasync(fd)
        wait_for(lambda: mount.status()["server"]["restarts"] == 1, "the server died of it")
        assert not (tmp_path / "once").exists()
    finally:
        os.close(fd)
    result = fusedisk("unmount", mount.mountpoint)
    assert result.returncode == 1 and "a flush failed" in result.stderr
    mount.wait_ended()
    assert not (mount.state / "activity").exists()
