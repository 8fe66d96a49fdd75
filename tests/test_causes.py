"""Whatever is sent or compared whole has a reason, which the sender says and the status shows."""

import random
import re
import subprocess

from conftest import fusedisk, wait_for
from test_replication import REPLICATOR, SIZES, Pair, Process, pair

__all__ = ["pair"]
SLOWLY = ("--bandwidth", "32KiB")
CHANGED = "the source began a new generation: image disk0.img changed while it was not mounted"


def whole(pair: Pair, *options: str) -> tuple[Process, dict[str, object]]:
    """A sender in the midst of all, and what its status is."""
    sender = pair.start(*SLOWLY, *options)
    wait_for(lambda: " bytes, " in sender.said, "it is at it")
    return sender, pair.status()


def shown(pair: Pair) -> str:
    words = [REPLICATOR, "status", str(pair.mount.mountpoint)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_fill_and_a_comparison_say_why(pair: Pair) -> None:
    pair.receive()
    sender, found = whole(pair)
    assert found["cause"] == "the target has no replica of that name"
    assert "because the target has no replica of that name" in shown(pair)
    said = re.search(r"filling with (\d+) bytes, as the target has no replica of", sender.said)
    # As much as is allocated, which is far less than the disks have.
    assert said is not None and 4 * 65536 < int(said[1]) < sum(SIZES) / 2
    pair.stop(sender)
    pair.once()
    assert pair.status()["cause"] is None
    pair.mount.unmount()
    pair.images[0].write_bytes(random.Random(3).randbytes(SIZES[0]))
    # What a mount in between could forget is kept for whoever is compared later.
    pair.mount.mount()
    assert fusedisk("unmount", pair.mount.mountpoint).returncode == 0
    pair.mount.mount()
    sender, found = whole(pair)
    assert found["cause"] == CHANGED and f"because {CHANGED}" in shown(pair)
    assert f"comparing {sum(SIZES)} bytes, because {CHANGED}" in sender.said
    pair.stop(sender)
