"""The target's host loses its power under a real sender and receiver: always a whole point is left.

The kernel drops what it holds for the store's file system, data and metadata, as a power loss does.
FUSEDISK_POWER_LOSSES sets how often; `scripts/soak` does it many times.
"""

import fcntl
import os
import random
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from conftest import wait_for
from test_clones import MakeFilesystem, filesystem
from test_replication import CHUNK, SIZES, Pair, guest_write, pair

from replicator.livepoint import LivePoint
from replicator.replica import Replica
from replicator.store import Store

__all__ = ["filesystem", "pair"]
LOSSES = int(os.environ.get("FUSEDISK_POWER_LOSSES", "3"))
# XFS_IOC_GOINGDOWN, which is EXT4_IOC_SHUTDOWN as well, and its flag: the log is not flushed.
_GOING_DOWN, _NO_LOG_FLUSH = 0x8004587D, 2


def cut_power(path: Path) -> None:
    """What was not synced is lost; nothing can be written any more."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _GOING_DOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


def mount_again(path: Path) -> None:
    # A killed process lets go of its files a moment after it is gone from the process list.
    wait_for(
        lambda: subprocess.run(["umount", path], capture_output=True).returncode == 0,
        "the file system is not busy any more",
    )
    subprocess.run(["mount", "-o", "loop", path.with_name("image"), path], check=True)


def content(store: Store, point: int) -> list[bytes]:
    view = LivePoint(store, "r", point)
    try:
        return [view.read(disk, 0, size) for disk, size in enumerate(SIZES)]
    finally:
        view.close()


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_replica_is_a_point_after_every_power_loss(
    filesystem: MakeFilesystem, pair: Pair, kind: str
) -> None:
    pair.store = filesystem(kind)
    rng = random.Random(3)
    options = ("receive", "--store", pair.store, "--keep", "3")
    receiver = pair.run(*options, pair.address)
    wait_for(lambda: receiver.out.read_text().endswith("\n"), "the receiver listens")
    pair.address = receiver.out.read_text().removeprefix("listening on ").strip()
    sender = pair.start()
    pair.wait_following(sender)
    pair.wait_identical()
    history = [[image.read_bytes() for image in pair.images]]
    earlier = 0
    for number in range(LOSSES):
        pair.wait_identical()
        wait_for(lambda: pair.status()["lag"]["chunks"] == 0, "nothing is left to send")
        acknowledged = pair.status()["epoch"]["committed"]
        history.append([bytes([number % 255 + 1]) * size for size in SIZES])
        # Stopped, so that no pass begins between two of the writes.
        os.kill(sender.popen.pid, signal.SIGSTOP)
        try:
            for disk, data in enumerate(history[-1]):
                for at in range(0, len(data), 16 * CHUNK):
                    guest_write(pair.mount.disk(disk), data[at : at + 16 * CHUNK], at)
        finally:
            os.kill(sender.popen.pid, signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.4))
        cut_power(pair.store)
        receiver.kill()
        mount_again(pair.store)
        with Store(pair.store) as store:
            with Replica.load(store, "r") as replica:
                manifest = replica.manifest
            assert (manifest.state, manifest.applying) == ("following", False)
            assert manifest.epoch is not None and manifest.epoch >= acknowledged
            found = [pair.replica(disk).read_bytes() for disk in range(len(SIZES))]
            assert found in history[-2:], f"a mixture after power loss {number}"
            assert content(store, manifest.points[-1].id) == found
            assert all(content(store, point.id) in history for point in manifest.points)
        earlier += found == history[-2]
        receiver = pair.run(*options, pair.address)
    pair.wait_identical()
    assert "bytes, because" not in sender.said
    assert sender.popen.poll() is None, sender.said
    print(f"{LOSSES} power losses, {earlier} left the point before")
