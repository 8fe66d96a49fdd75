"""The source's host loses its power in the midst of a real cutover: one side is the disk.

The kernel drops what it holds for the file system of image, record and state, as a power loss does.
Where FUSEDISK_POWER_LOSSES is set, also where nothing was begun, and where all is over.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from frame_proxy import FrameProxy
from test_clones import MakeFilesystem, filesystem
from test_cutover import run
from test_promotion import replicator
from test_replication import REPLICATOR, Process, guest_write
from test_store_power import cut_power, mount_again

from fusedisk.changemap import Control
from fusedisk.fencing import read_fence
from fusedisk.state import sync_directory
from replicator import messages as m

__all__ = ["filesystem"]
MIB = 1 << 20
SAID = b"acknowledged and flushed"


class Doomed:
    """A mount on a file system whose power is cut just before a frame of a kind goes on."""

    def __init__(self, folder: Path, disks: Path, mount: Mount, at: type[m.Event] | None) -> None:
        self.folder, self.disks, self.mount, self._at = folder, disks, mount, at
        mount.state = disks / "state"
        mount.images[0].write_bytes(os.urandom(MIB))
        with mount.images[0].open("rb") as image:
            os.fsync(image.fileno())
        sync_directory(disks)
        mount.mount()
        self._control = Control(mount.state / "control")
        self.struck = threading.Event()
        self.store = folder / "store"
        self.store.mkdir()
        target = f"unix://{folder / 's'}"
        self._proxy = FrameProxy(folder / "p", target, self._frame)
        self._processes = [Process(folder / "receive", "receive", "--store", self.store, target)]
        wait_for((folder / "s").exists, "the receiver listens")
        words = ("start", "--name", "r", "--rpo", "0.1", mount.mountpoint, self._proxy.address)
        self._processes.append(Process(folder / "start", *words))

    def _frame(self, kind: type[m.Event]) -> bool:
        if kind is not self._at or self.struck.is_set() or not self._control.gated:
            return True
        cut_power(self.disks)
        self.struck.set()
        # Neither is there anybody who would hear it, nor who sent it.
        return False

    def end_host(self) -> None:
        """What ran on it is no more, and it starts again."""
        self._processes[1].kill()
        self._control.close()
        # Their own files tell nothing any more.
        for pid in self.mount.daemons():
            os.kill(pid, signal.SIGKILL)
        detach = ["fusermount3", "-u", "-z", "--", self.mount.mountpoint]
        subprocess.run(detach, capture_output=True, check=True)
        self.mount.wait_ended()
        mount_again(self.disks)

    def writable(self) -> bool:
        try:
            guest_write(self.mount.disk(0), b"is it the disk?", MIB // 2)
        except OSError:
            return False
        return True

    @property
    def promoted(self) -> bool:
        return '"promoted"' in replicator("list", "--json", self.store).stdout

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._proxy.close()


@pytest.fixture
def doomed(
    filesystem: MakeFilesystem, tmp_path: Path, fuse: Callable[..., Mount]
) -> Iterator[Callable[..., Doomed]]:
    made: list[Doomed] = []

    def make(at: type[m.Event] | None) -> Doomed:
        disks = filesystem("xfs")
        made.append(Doomed(tmp_path, disks, fuse(disks / "disk.img"), at))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.mount.clean_up()


SEAMS: dict[type[m.Event] | None, str] = {m.Promote: "rolled-back", m.Promoted: "promoted"}
if "FUSEDISK_POWER_LOSSES" in os.environ:
    SEAMS[m.Commit] = "nothing to resolve: the source is the disk"
    # Once it is over.
    SEAMS[None] = "nothing to resolve: r at"


@pytest.mark.parametrize(("at", "settled"), SEAMS.items())
def test_one_side_is_the_disk_after_a_power_loss_of_the_source(
    doomed: Callable[..., Doomed], at: type[m.Event] | None, settled: str
) -> None:
    host = doomed(at)
    mountpoint = host.mount.mountpoint

    def follows() -> bool:
        return '"following"' in run("replicator", "status", "--json", mountpoint).stdout

    wait_for(follows, "it follows", 60)
    guest_write(host.mount.disk(0), SAID, 4096)
    words = [REPLICATOR, "cutover", "--max-downtime", "20000", mountpoint]
    cutover = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if at is None:
            assert cutover.wait(60) == 0
            cut_power(host.disks)
        else:
            assert host.struck.wait(60)
        host.end_host()
    finally:
        cutover.kill()
        cutover.wait()
    host.mount.mount()
    promoted = host.promoted
    assert promoted == (at in (m.Promoted, None))
    # Before anybody has asked.
    assert not (host.writable() and promoted)
    assert replicator("resolve", mountpoint).stdout.startswith(settled)
    assert host.writable() != promoted
    record = read_fence(host.mount.images)
    assert (record.state if record else None) == ("fenced" if promoted else None)
    for disk in [host.store / "r" / "disk.img"] if promoted else [host.mount.images[0]]:
        with disk.open("rb") as image:
            image.seek(4096)
            assert image.read(len(SAID)) == SAID
