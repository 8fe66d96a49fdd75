"""A Linux guest on a mounted disk, whose server is killed while the guest is busy."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount
from guest import Guest, compile_load, virtio_disk
from verifying_load import kill_server

KILLS = int(os.environ.get("FUSEDISK_GUEST_KILLS", "4"))
SECONDS = 4 + 2 * KILLS


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Start guests, which are gone when the test is over."""
    started: list[Guest] = []

    def start(script: str, *options: str) -> Guest:
        folder = tmp_path / f"guest{len(started)}"
        folder.mkdir()
        started.append(Guest(folder, script, *options, programs=[compile_load(folder)]))
        return started[-1]

    yield start
    for guest in started:
        guest.close()


def test_a_guest_sees_no_error_while_its_server_is_killed(
    tmp_path: Path, fuse: Callable[..., Mount], boot: Callable[..., Guest]
) -> None:
    image = tmp_path / "disk.img"
    mount = fuse(image)
    mount.mount("--create", "64MiB")
    script = f"""
        echo ready; load /dev/vda 4 {SECONDS}
        blkdiscard /dev/vda && echo discarded
        """
    guest = boot(script, *virtio_disk(mount.disk()))
    guest.wait_said("ready")
    chance = random.Random(KILLS)
    for _ in range(KILLS):
        # In the midst of its work: the next one is named before it has answered anything.
        time.sleep(chance.uniform(0, 0.6))
        kill_server(mount)
    guest.wait_ended(SECONDS + 120)
    assert "load ended well" in guest.said, guest.said
    assert "discarded" in guest.said
    assert "error" not in guest.said.lower(), guest.said
    assert mount.status()["server"]["restarts"] == KILLS
    assert image.stat().st_blocks == 0
    mount.unmount()
    assert mount.mount() == ""
    mount.unmount()
