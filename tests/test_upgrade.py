"""`fusedisk upgrade` under load, beside an unmount, and with servers killed at any moment of it.

FUSEDISK_UPGRADE_KILLS is the number of kills at random points (default 5).
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, processes, wait_for
from verifying_load import MIB, SIZES, Load, mount_disks

from fusedisk.changemap import Control
from fusedisk.gate import take_lease

KILLS = int(os.environ.get("FUSEDISK_UPGRADE_KILLS", "5"))
CHUNK = 65536


@pytest.fixture
def mounted(tmp_path: Path, fuse: Callable[..., Mount]) -> Mount:
    return mount_disks(tmp_path, fuse)


@pytest.fixture
def load(mounted: Mount) -> Iterator[Load]:
    made = Load(mounted)
    yield made
    made.stop()


def test_upgrade_under_load_fails_no_request(mounted: Mount, load: Load) -> None:
    seen = {mounted.server()}
    for _ in range(5):
        result = fusedisk("upgrade", mounted.mountpoint)
        assert result.returncode == 0, result.stderr
        assert mounted.server() not in seen
        seen.add(mounted.server())
        load.progress()
    load.end()
    load.verify([mounted.disk(i) for i in range(len(SIZES))])
    status = mounted.status()
    assert status["server"]["restarts"] == 5
    # All of them went in order.
    assert "WARNING" not in (mounted.state / "keeper.log").read_text()
    mounted.unmount()
    assert mounted.mount() == ""


def test_upgrade_while_the_gate_is_closed(mounted: Mount) -> None:
    fd = os.open(mounted.disk(), os.O_RDWR)
    written: list[int] = []
    writers = [
        threading.Thread(target=lambda at=n: written.append(os.pwrite(fd, b"later", at * CHUNK)))
        for n in range(20)
    ]
    lease = take_lease(mounted.state)
    control = Control(mounted.state / "control", True)
    try:
        control.set_gate(True)
        for writer in writers:
            writer.start()
        assert fusedisk("upgrade", mounted.mountpoint).returncode == 0
        assert os.pread(fd, 5, 8 * MIB) == bytes(5)
        assert written == []
    finally:
        control.set_gate(False)
        control.close()
        os.close(lease)
        for writer in writers:
            writer.join(60)
        os.close(fd)
    assert written == [5] * 20


def test_unmount_beside_upgrade(mounted: Mount) -> None:
    for _ in range(4):
        command = [sys.executable, "-m", "fusedisk", "upgrade", str(mounted.mountpoint)]
        upgrade = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            mounted.unmount()
            _, said = upgrade.communicate(timeout=60)
        finally:
            upgrade.kill()
            upgrade.wait()
        # It was there before the unmount, came too late, or was interrupted by it.
        assert upgrade.returncode == 0 or said.count("\n") == 1, said
        assert mounted.mount() == ""


def test_code_that_does_not_load_is_refused_at_once(
    tmp_path: Path, fuse: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{code}:{os.environ.get('PYTHONPATH', '')}")
        mounted = mount_disks(tmp_path, fuse)
    before = mounted.server()
    for _ in range(2):
        (code / "trio.py").write_text("raise SystemExit(1)")
        result = fusedisk("upgrade", mounted.mountpoint)
        assert result.returncode == 1 and "the installed code does not load" in result.stderr
        assert mounted.server() == before
    (code / "trio.py").unlink()
    assert fusedisk("upgrade", mounted.mountpoint).returncode == 0
    assert mounted.server() != before


@pytest.mark.soak
def test_killed_at_any_moment_of_an_upgrade(mounted: Mount, load: Load) -> None:
    """The old server, the one that follows, or the spare: nothing fails but the command itself."""
    chance = random.Random(KILLS)
    command = [sys.executable, "-m", "fusedisk", "upgrade", str(mounted.mountpoint)]
    failed = 0
    for _ in range(KILLS):
        load.progress()
        upgrade = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            # The command itself needs a while before it asks; a server is loaded as long.
            time.sleep(chance.uniform(0.1, 0.9))
            servers = processes("fusedisk.server", mounted.state)
            os.kill(chance.choice([mounted.server(), *servers]), signal.SIGKILL)
            # Longer than the command itself waits.
            _, said = upgrade.communicate(timeout=90)
        except ProcessLookupError:
            _, said = upgrade.communicate(timeout=90)
        finally:
            upgrade.kill()
            upgrade.wait()
        failed += upgrade.returncode
        assert upgrade.returncode == 0 or said.count("\n") == 1, said
    load.progress()
    restarts = mounted.status()["server"]["restarts"]
    print(f"{KILLS} kills, {failed} upgrades failed, {restarts} servers after the first")
    # What a kill interrupted is no obstacle to the next one.
    wait_for(lambda: fusedisk("upgrade", mounted.mountpoint).returncode == 0, "it works again")
    load.progress()
    load.end()
    load.verify([mounted.disk(i) for i in range(len(SIZES))])
    mounted.unmount()
    load.verify(mounted.images)
    assert mounted.mount() == ""
