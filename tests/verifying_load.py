"""Writers that know what was acknowledged, servers killed under them, and a replica beside them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import Mount, wait_for
from guest_writers import Writer, unexplained
from test_replication import REPLICATOR, Process

MIB = 1 << 20
SIZES = [24 * MIB + 4608, 9 * MIB]
WRITERS = 6


def mount_disks(folder: Path, fuse: Callable[..., Mount], *options: str) -> Mount:
    """A mount of two disks, all of them holes."""
    images = [folder / f"disk{i}.img" for i in range(len(SIZES))]
    for image, size in zip(images, SIZES, strict=True):
        image.touch()
        os.truncate(image, size)
    mount = fuse(*images)
    mount.mount(*options)
    return mount


class Load:
    """Writers at queue depth, cached and direct, that know what was acknowledged."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.contents = [bytearray(size) for size in SIZES]
        disks = [mount.disk(i) for i in range(len(SIZES))]
        self.writers = [Writer(disks, self.contents, range(i, WRITERS), i) for i in range(WRITERS)]
        for writer in self.writers:
            writer.pause_seconds = 0.0
            writer.start()

    def progress(self) -> None:
        """Wait until every writer got an answer to a request made after now."""
        before = [writer.acknowledged for writer in self.writers]

        def moved() -> bool:
            self.check()
            return all(w.acknowledged > n + 1 for w, n in zip(self.writers, before, strict=True))

        wait_for(moved, "all writers go on")

    def check(self) -> None:
        for writer in self.writers:
            assert writer.refused is None and writer.failure is None, writer.said()

    def stop(self) -> None:
        """Whatever became of them, they end."""
        for writer in self.writers:
            writer.stop()
        for writer in self.writers:
            writer.join(60)

    def end(self) -> None:
        self.stop()
        assert not any(writer.is_alive() for writer in self.writers)
        self.check()

    def verify(self, paths: list[Path]) -> None:
        for disk, path in enumerate(paths):
            assert unexplained(path.read_bytes(), disk, self.contents[disk], self.writers) == []


def kill_server(mount: Mount) -> float:
    """Kill it and wait for a first answer by the next; the guest's pause in seconds."""
    pid = mount.server()
    fd = os.open(mount.disk(), os.O_RDWR)
    try:
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        os.fsync(fd)
        pause = time.monotonic() - begun
    finally:
        os.close(fd)
    wait_for(lambda: mount.server() != pid, "another server is named")
    return pause


@contextlib.contextmanager
def replicated(mount: Mount, folder: Path) -> Iterator[Path]:
    """A sender and a receiver while it lasts; the replica's folder."""
    store = folder / "store"
    store.mkdir(exist_ok=True)
    address = f"unix://{folder / 'receiver'}"
    receiver = Process(folder / "receiver.log", "receive", "--store", store, address)
    try:
        wait_for(lambda: receiver.out.read_text(), "the receiver listens")
        where = ("--name", "r", "--rpo", "0.1", mount.mountpoint, address)
        sender = Process(folder / "sender.log", "start", *where)
        try:
            yield store / "r"
        finally:
            sender.kill()
            # Killed by us, or ended well after a cutover: it did not give up before.
            assert sender.popen.returncode in (0, -signal.SIGKILL), sender.said
    finally:
        receiver.kill()


def cut_over(mount: Mount) -> None:
    """Make the replica, which then holds all that was written, the disk."""
    result = subprocess.run(
        [REPLICATOR, "cutover", "--json", "--max-downtime", "20000", mount.mountpoint],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert result.returncode == 0, (result.stdout, result.stderr)
