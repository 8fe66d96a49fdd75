"""Receivers killed with SIGKILL under a real sender: every time the replica is a whole point.

FUSEDISK_KILLS sets how many; `scripts/soak` runs a hundred.
"""

import os
import random
import signal
import time

import pytest
from conftest import wait_for
from test_clones import MakeFilesystem, filesystem
from test_replication import CHUNK, SIZES, Pair, guest_write, pair

from replicator.replica import Replica
from replicator.store import Store

__all__ = ["filesystem", "pair"]
KILLS = int(os.environ.get("FUSEDISK_KILLS", "12"))


@pytest.mark.parametrize("kind", ["undo", "clone"])
def test_replica_is_a_point_after_every_kill(
    filesystem: MakeFilesystem, pair: Pair, kind: str
) -> None:
    if kind == "clone":
        pair.store = filesystem("xfs")
    rng = random.Random(7)
    receiver = pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    held = [image.read_bytes() for image in pair.images]
    earlier = 0
    kills = KILLS if kind == "undo" or KILLS > 12 else 6
    for number in range(kills):
        pair.wait_identical()
        wait_for(lambda: pair.status()["lag"]["chunks"] == 0, "nothing is left to send")
        before, held = held, [bytes([number + 1]) * size for size in SIZES]
        # Stopped, so that no pass begins between two of the writes.
        os.kill(sender.popen.pid, signal.SIGSTOP)
        try:
            for disk, content in enumerate(held):
                for at in range(0, len(content), 16 * CHUNK):
                    guest_write(pair.mount.disk(disk), content[at : at + 16 * CHUNK], at)
        finally:
            os.kill(sender.popen.pid, signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.2))
        receiver.kill()
        with Store(pair.store) as store, Replica.load(store, "r") as replica:
            assert (replica.manifest.state, replica.manifest.applying) == ("following", False)
            found = [pair.replica(disk).read_bytes() for disk in range(len(SIZES))]
        assert found in (before, held), f"a mixture after kill {number}"
        earlier += found == before
        receiver = pair.receive()
    pair.wait_identical()
    assert "bytes, because" not in sender.said
    assert sender.popen.poll() is None, sender.said
    print(f"{kills} kills, {earlier} left the point before")
