"""The keeper's patience with what fails, and what asks a server to make room at a bad moment."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, processes, wait_for
from verifying_load import MIB, mount_disks

from fusedisk import keeper
from fusedisk.keeper import Keeper, Server

# A sync waits as long as $HOLD exists, and tells by $HOLD.reached that it does.
HELD_SYNC = """
    #include <fcntl.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static void hold(void)
    {
        char reached[4096];
        while (access(getenv("HOLD"), F_OK) == 0) {
            snprintf(reached, sizeof reached, "%s.reached", getenv("HOLD"));
            close(open(reached, O_CREAT | O_WRONLY, 0600));
            usleep(5000);
        }
    }
    int fsync(int fd) { hold(); return syscall(SYS_fsync, fd); }
    int fdatasync(int fd) { hold(); return syscall(SYS_fdatasync, fd); }
"""


class HeldSyncs:
    """Syncs of the servers, which are held on demand."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "hold"
        self._reached = folder / "hold.reached"

    def hold(self) -> None:
        self._reached.unlink(missing_ok=True)
        self.file.touch()

    def wait_reached(self) -> None:
        wait_for(self._reached.exists, "something is synced")

    def release(self) -> None:
        self.file.unlink(missing_ok=True)


@pytest.fixture
def syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldSyncs]:
    """Request it before ``fuse``, so that a mount is taken away with syncs that end."""
    source, library = tmp_path / "hold.c", tmp_path / "hold.so"
    source.write_text(HELD_SYNC)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    made = HeldSyncs(tmp_path)
    monkeypatch.setenv("HOLD", str(made.file))
    # Behind what is there already: a sanitizer's library wants to be the first.
    monkeypatch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {library}".strip())
    yield made
    made.release()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code that servers find before the installed one."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    return folder


def test_an_upgrade_during_the_last_flush_costs_no_clean_mark(
    tmp_path: Path, syncs: HeldSyncs, fuse: Callable[..., Mount]
) -> None:
    mount = mount_disks(tmp_path, fuse)
    with mount.disk().open("r+b") as file:
        file.write(b"x")
    syncs.hold()
    command = [sys.executable, "-m", "fusedisk", "unmount", str(mount.mountpoint)]
    unmount = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: not mount.mounted, "it is unmounted")
        syncs.wait_reached()
        os.kill(mount.server(), signal.SIGUSR1)
        # As the keeper would: it has a spare server by then.
        os.kill(mount.server(), signal.SIGUSR1)
        syncs.release()
        _, said = unmount.communicate(timeout=60)
    finally:
        syncs.release()
        unmount.kill()
        unmount.wait()
    assert (unmount.returncode, said) == (0, "")
    mount.wait_ended()
    assert "signal" not in (mount.state / "keeper.log").read_text()
    assert mount.mount() == ""


def test_a_server_makes_room_once_its_checkpoint_is_done(
    tmp_path: Path, syncs: HeldSyncs, code: Path, fuse: Callable[..., Mount]
) -> None:
    """Until the sync returns the process could not end, and nobody else may serve."""
    (code / "sitecustomize.py").write_text(
        "import fusedisk.checkpoint as c\nc._SECONDS, c.REGIONS_KEPT = 0.05, 0\n"
    )
    mount = mount_disks(tmp_path, fuse)
    written: list[int] = []

    def write() -> None:
        fd = os.open(mount.disk(), os.O_RDWR)
        try:
            for number in range(40):
                written.append(os.pwrite(fd, b"y", number * 4096))
                time.sleep(0.01)
        finally:
            os.close(fd)

    writer = threading.Thread(target=write)
    syncs.hold()
    try:
        with mount.disk(1).open("r+b") as file:
            file.write(b"x")
        syncs.wait_reached()
        before = mount.server()
        os.kill(before, signal.SIGUSR1)
        writer.start()
        wait_for(lambda: len(written) == 40, "the guest writes on")
        assert mount.server() == before
    finally:
        syncs.release()
    writer.join(60)
    wait_for(lambda: mount.status()["server"]["restarts"] == 1, "another server begins")
    assert "WARNING" not in (mount.state / "keeper.log").read_text()


def test_a_spare_that_hangs_holds_up_nothing(
    tmp_path: Path, code: Path, fuse: Callable[..., Mount]
) -> None:
    mount = mount_disks(tmp_path, fuse)

    def loaded() -> bool:
        servers = processes("fusedisk.server", mount.state)
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in servers]
        return len(maps) == 2 and all("fusedisk/datapath" in text for text in maps)

    wait_for(loaded, "the spare server has loaded its code")
    (code / "trio.py").write_text(
        f"import time\nopen({str(tmp_path / 'hangs')!r}, 'w')\ntime.sleep(300)\n"
    )
    before = mount.server()
    mount.kill_server()
    wait_for((tmp_path / "hangs").exists, "the next spare server hangs")
    (code / "trio.py").unlink()
    wait_for(lambda: mount.server() != before, "the first one serves")
    before = mount.server()
    result = fusedisk("upgrade", mount.mountpoint)
    assert result.returncode == 0, result.stderr
    assert mount.server() != before


def test_a_mount_that_cannot_note_its_beginning_fails(
    tmp_path: Path, fuse: Callable[..., Mount]
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    mount = fuse(image)
    # As on a full file system: the file cannot be written.
    (mount.state / "init.new").mkdir(parents=True)
    words = [*("mount", "--state-dir", mount.state), image, mount.mountpoint]
    command = [sys.executable, "-m", "fusedisk", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: process.poll() is not None, "the command ends")
    finally:
        if process.poll() is None:
            # Its stat() ends with the connection only.
            for pid in mount.daemons():
                os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1, said
    assert str(mount.state) in said
    assert "cannot write down how the mount began" in (mount.state / "server.log").read_text()
    assert not mount.mounted
    mount.wait_ended()
    (mount.state / "init.new").rmdir()
    mount.mount()


def test_servers_that_cannot_start_end_with_the_mount(
    tmp_path: Path, fuse: Callable[..., Mount]
) -> None:
    mounted = mount_disks(tmp_path, fuse)
    log = mounted.state / "keeper.log"
    (mounted.state / "init").write_bytes(b"")
    os.kill(mounted.server(), signal.SIGKILL)
    wait_for(lambda: log.read_text().count("starting another in") >= 6, "servers fail")
    # By now the kernel has forgotten the attributes, and nobody would answer a stat.
    result = fusedisk("unmount", mounted.mountpoint)
    assert result.returncode == 1 and "a flush failed" in result.stderr
    mounted.wait_ended()
    assert "not unmounted cleanly" in mounted.mount()


def test_the_back_off_is_bounded_after_any_number_of_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(keeper.time, "sleep", waited.append)
    one = Keeper.__new__(Keeper)
    one._failures = 0
    for _ in range(2000):
        one._wait_before_restart(1, False)
    assert waited == sorted(waited) and waited[-1] == 10.0
    one._wait_before_restart(1, True)
    assert waited[-1] == 0.0


def test_a_server_that_cannot_be_started_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no process is left")

    monkeypatch.setattr(keeper.subprocess, "Popen", refuse)
    arguments = argparse.Namespace(images="0", state="s", uid="0", gid="0", mode="600", lock=0)
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises(BlockingIOError):
            Server(arguments, 0, 0, [])
    assert len(os.listdir("/proc/self/fd")) == len(before)
