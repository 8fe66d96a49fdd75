"""Real mounts for tests, and the certainty that none is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedisk.fencing import clear_fence

WAIT_SECONDS = 60.0
# Who starts the tests in the background of a shell has it ignored, as have all their processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that came last would be waited for by a worker with nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def unavailable(reason: str) -> None:
    """Skip; where FUSE is required (FUSEDISK_REQUIRE_FUSE=1) fail, so that nothing hides."""
    if os.environ.get("FUSEDISK_REQUIRE_FUSE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def fusedisk(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "fusedisk", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.01)


def mounts_below(directory: Path) -> list[str]:
    """Mountpoints at or below ``directory``, innermost last."""
    table = Path("/proc/self/mountinfo").read_bytes().splitlines()
    escaped = [line.split(b" ")[4] for line in table]
    points = [
        os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), point))
        for point in escaped
    ]
    return [p for p in points if Path(p).is_relative_to(directory)]


def processes(module: str, state: Path) -> list[int]:
    """Running ``python -m <module>`` processes of one state directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if module.encode() in words and os.fsencode(state) in words:
                found.append(int(entry.name))
    return found


class Mount:
    """One mountpoint with its images; commands are run as a user runs them."""

    def __init__(self, mountpoint: Path, images: list[Path], state: Path) -> None:
        self.mountpoint = mountpoint
        self.images = images
        self.state = state

    def mount(self, *options: str) -> str:
        """Mount, and return what was said on stderr."""
        result = self.try_mount(*options)
        assert result.returncode == 0, result.stderr
        assert result.stdout == ""
        return result.stderr

    def try_mount(self, *options: str) -> subprocess.CompletedProcess[str]:
        where = ("--state-dir", self.state)
        return fusedisk("mount", *options, *where, *self.images, self.mountpoint)

    def unmount(self) -> None:
        result = fusedisk("unmount", self.mountpoint)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert not self.mounted
        self.wait_ended()

    @property
    def mounted(self) -> bool:
        return str(self.mountpoint) in mounts_below(self.mountpoint)

    def disk(self, index: int = 0) -> Path:
        return self.mountpoint / self.images[index].name

    def status(self) -> dict[str, Any]:
        result = fusedisk("status", "--json", self.mountpoint)
        assert (result.returncode, result.stderr) == (0, "")
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def changed(self) -> list[int]:
        return [disk["changed_chunks"] for disk in self.status()["disks"]]

    def daemons(self) -> list[int]:
        return processes("fusedisk.keeper", self.state) + processes("fusedisk.server", self.state)

    def wait_ended(self) -> None:
        wait_for(lambda: not self.daemons(), "the daemons have ended")

    def server(self) -> int:
        """Process id of the server that serves now, not of the spare one."""
        found: int = json.loads((self.state / "pids.json").read_text())["server"]
        return found

    def kill_server(self) -> None:
        os.kill(self.server(), signal.SIGKILL)

    def crash(self) -> None:
        """Leave what a crash of the host would leave, as far as the state directory shows it."""
        for pid in [*processes("fusedisk.keeper", self.state), self.server()]:
            os.kill(pid, signal.SIGKILL)
        command = ["fusermount3", "-u", "-z", "--", str(self.mountpoint)]
        subprocess.run(command, capture_output=True, check=True)
        self.wait_ended()

    def clean_up(self) -> None:
        """Whatever the test did, nothing is mounted or running afterwards."""
        if self.mounted and fusedisk("unmount", self.mountpoint).returncode != 0:
            command = ["fusermount3", "-u", "-z", "--", str(self.mountpoint)]
            subprocess.run(command, capture_output=True, check=False)
        try:
            self.wait_ended()
        except AssertionError:
            for pid in self.daemons():
                os.kill(pid, signal.SIGKILL)
            raise


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Make a Mount, not yet mounted, of the given images."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        unavailable("/dev/fuse is missing or not ours to use")
    made: list[Mount] = []

    def make(*images: Path, name: str = "mnt") -> Mount:
        mountpoint = tmp_path / name
        mountpoint.mkdir()
        made.append(Mount(mountpoint, list(images), tmp_path / f"{name}.state"))
        return made[-1]

    yield make
    failures = []
    for mount in reversed(made):
        try:
            mount.clean_up()
        except AssertionError as error:
            failures.append(str(error))
    assert not failures
    assert mounts_below(tmp_path) == []


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Attach a file to a loop device until the test is over; request it before ``fuse``."""
    attached: list[str] = []

    def attach(backing: Path, *options: str) -> Path:
        try:
            result = subprocess.run(
                ["losetup", "--find", "--show", *options, str(backing)],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            unavailable("losetup is missing")
        if result.returncode != 0:
            unavailable(f"no loop device: {result.stderr.strip()}")
        attached.append(result.stdout.strip())
        return Path(attached[-1])

    yield attach
    for device in attached:
        # First: a fence follows what is attached, and soon that may be of another test.
        clear_fence([Path(device)])
        subprocess.run(["losetup", "--detach", device], check=True)
