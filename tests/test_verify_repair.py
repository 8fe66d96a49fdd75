"""Verify that repairs, and verify on a schedule, of replicas whose images were damaged."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from test_replication import CHUNK, SIZES, guest_write
from test_verify import Verified

from fusedisk.changemap import ChangeMap
from replicator.captured import unchanged


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Verified]:
    made = Verified(tmp_path, fuse)
    yield made
    for process in made.processes:
        process.kill()


@pytest.fixture
def following(pair: Verified) -> Verified:
    pair.receive()
    for disk in range(2):
        guest_write(pair.mount.disk(disk), b"to be kept" * 30000, 0)
    pair.follow()
    pair.wait_caught_up()
    return pair


def test_what_is_damaged_is_repaired_and_nothing_else_is_sent(following: Verified) -> None:
    following.flip(0, 5)
    following.flip(1, 3 * CHUNK + 17)
    # Data where the source has a hole.
    with following.replica(1).open("r+b") as file:
        file.seek(SIZES[1] - 5)
        file.write(b"stray")
    sent = following.status()["sent"]["data_bytes"]
    assert following.findings()["outcome"] == "differs"
    assert following.status()["verify"]["last"]["outcome"] == "differs"
    found = following.findings("--repair")
    assert (found["outcome"], found["differing"]) == ("repaired", [])
    assert found["repaired_bytes"] >= 2 * CHUNK
    assert following.status()["sent"]["data_bytes"] - sent <= 4 * CHUNK
    assert following.findings()["outcome"] == "equal"
    assert following.identical()
    last = following.status()["verify"]["last"]
    assert (last["outcome"], last["differing_bytes"]) == ("equal", 0)


def test_a_repair_under_write_load_is_one_instant(following: Verified) -> None:
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            guest_write(following.mount.disk(0), number.to_bytes(8, "big") * 64, number % 8 * 512)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        following.flip(0, 2 * CHUNK + 1)
        following.flip(1, 9)
        assert following.findings("--repair")["outcome"] == "repaired"
    finally:
        stop.set()
        writer.join()
    following.wait_caught_up()
    assert following.findings()["outcome"] == "equal"
    following.wait_identical()


def test_a_repair_needs_a_sender(following: Verified) -> None:
    following.stop(following.processes[-1])
    following.fails(1, "has no running sender to repair it", "--repair")


def test_a_scheduled_verify_is_noted_and_says_what_differs(pair: Verified) -> None:
    pair.receive()
    sender = pair.start("--verify-every", "1s", "--verify-bandwidth", "1GiB")
    pair.wait_following(sender)

    def outcome() -> str | None:
        last = pair.status()["verify"]["last"]
        return None if last is None else str(last["outcome"])

    wait_for(lambda: outcome() == "equal", "it is verified")
    guest_write(pair.mount.disk(0), b"x" * CHUNK, 0)
    pair.wait_caught_up()
    pair.flip(0, 77)
    wait_for(lambda: outcome() == "differs", "the damage is found")
    wait_for(lambda: "run 'replicator verify --repair'" in sender.said, "it is logged")
    assert pair.status()["verify"]["every"] == 1
    sender.kill()
    # It is kept for the next sender, which verifies when it is time.
    noted = json.loads((pair.mount.state / "replicas/r.json").read_text())
    assert noted["verified"]["outcome"] == "differs"
    assert pair.status()["verify"]["last"]["outcome"] == "differs"


def test_what_was_written_since_is_left_to_the_pass(tmp_path: Path) -> None:
    changes = ChangeMap.create(tmp_path / "map", 16 * 4096, 4096)
    changes.mark(1, 0, 16 * 4096)
    changes.mark(2, 4096, 1)
    assert unchanged([changes], [(0, 100, 3 * 4096)], 1) == [(0, 100, 4096), (0, 8192, 3 * 4096)]
    assert unchanged([changes], [(0, 100, 3 * 4096)], 0) == []
