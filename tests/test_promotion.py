"""Promoting a replica whose source is gone, and settling who is the disk."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from test_points import DISKS, Model
from test_replication import CHUNK, REPLICATOR, Pair, guest_write, pair

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, read_fence, record_fence
from replicator.replica import Replica
from replicator.store import Store

__all__ = ["pair"]


def replicator(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPLICATOR, *map(str, words)], check=False, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[tuple[Store, Model]]:
    """A store whose replica "vm" has several recovery points."""
    with Store(tmp_path, keep="50") as store:
        model = Model(5)
        with Replica.open(store, "vm", "source", DISKS) as replica:
            model.fill(replica)
            for _ in range(6):
                model.step(replica)
        yield store, model


def images(store: Store) -> list[bytes]:
    return [(store.path / "vm" / disk.name).read_bytes() for disk in DISKS]


def test_a_promoted_replica_is_plain_files_and_refuses_its_source(filled: tuple[Store, Model]):
    store, model = filled
    result = replicator("promote", "--json", store.path / "vm")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["outcome"], said["already"], said["epoch"]) == ("promoted", False, model.epoch)
    assert [Path(path).read_bytes() for path in said["disks"]] == model.points[model.epoch]
    with pytest.raises(FuseDiskError, match=r"was promoted on \d{4}-.*no longer the disk"):
        Replica.open(store, "vm", "source", DISKS)
    again = json.loads(replicator("promote", "--json", store.path / "vm").stdout)
    assert again["already"] and again["token"] == said["token"]
    refused = replicator("promote", "--point", "1", store.path / "vm")
    assert refused.returncode == 1 and "belongs to its guest" in refused.stderr


def test_every_point_can_become_the_disk(filled: tuple[Store, Model]):
    store, model = filled
    rng = random.Random(1)
    with Replica.load(store, "vm") as replica:
        points = list(replica.manifest.points)
        rng.shuffle(points)
        for point in points:
            replica.roll_back(point.id)
            assert images(store) == model.points[point.epoch]
            assert replica.manifest.committed == (point.generation, point.epoch)
    result = replicator("promote", "--point", str(points[0].id), store.path / "vm")
    assert result.returncode == 0, result.stderr
    assert f"promoted, epoch {points[0].epoch};" in result.stdout
    assert images(store) == model.points[points[0].epoch]
    assert "no recovery point 999" in replicator(
        "promote", "--point", "999", store.path / "vm"
    ).stderr + _refusal(store, model)


def _refusal(store: Store, model: Model) -> str:
    """What a replica says that has no such point; the one of the test is promoted by now."""
    with Replica.open(store, "other", "source", DISKS) as replica:
        model.epoch = 0
        model.fill(replica)
    return replicator("promote", "--point", "999", store.path / "other").stderr


def test_a_source_goes_on_from_a_point_that_was_rolled_back_to(filled: tuple[Store, Model]):
    """A crash between rolling back and promoting leaves a replica at an older point, no less."""
    store, model = filled
    with Replica.load(store, "vm") as replica:
        oldest = replica.manifest.points[0]
        replica.roll_back(oldest.id)
    with Replica.open(store, "vm", "source", DISKS) as replica:
        assert replica.manifest.committed == (oldest.generation, oldest.epoch)
        model.step(replica)


def test_a_filling_replica_is_promoted_by_force_alone(tmp_path: Path):
    with Store(tmp_path) as store, Replica.open(store, "vm", "source", DISKS) as replica:
        replica.begin(1)
        replica.write(0, 0, b"half")
    refused = replicator("promote", tmp_path / "vm")
    assert refused.returncode == 1 and "no whole point" in refused.stderr
    assert refused.stderr.count("\n") == 1
    forced = replicator("promote", "--force", tmp_path / "vm")
    assert forced.returncode == 0 and "NO WHOLE POINT" in forced.stderr
    assert (tmp_path / "vm" / "disk0").read_bytes()[:4] == b"half"
    assert replicator("promote", tmp_path / "missing").returncode == 1


def test_a_living_source_keeps_its_replica_unless_forced(pair: Pair):
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    pair.wait_identical()
    refused = replicator("promote", pair.store / "r")
    assert refused.returncode == 1 and "'replicator cutover'" in refused.stderr
    assert pair.status()["state"] == "following"
    # Half open: the sender does not answer any more.
    os.kill(sender.popen.pid, signal.SIGSTOP)
    try:
        taken = replicator("promote", pair.store / "r")
    finally:
        os.kill(sender.popen.pid, signal.SIGCONT)
    assert taken.returncode == 0, taken.stderr
    pair.refused(sender, "no longer the disk")
    # The source comes back and is not fenced yet; resolve makes it so.
    guest_write(pair.mount.disk(), b"too much", 0)
    fenced = replicator("resolve", pair.mount.mountpoint)
    assert (fenced.returncode, fenced.stdout) == (0, "promoted\n"), fenced.stderr
    with pytest.raises(OSError):
        guest_write(pair.mount.disk(), b"x", 0)
    assert pair.mount.status()["fenced"]
    record = read_fence(pair.images)
    assert record is not None and (record.state, record.stamp) == ("fenced", None)
    assert "nothing to resolve: r at" in replicator("resolve", pair.mount.mountpoint).stdout


def test_force_takes_the_replica_from_a_living_source(pair: Pair):
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    assert replicator("promote", "--force", pair.store / "r").returncode == 0
    pair.refused(sender, "no longer the disk")


def test_a_cutover_of_unknown_outcome_finds_a_promotion_by_hand(pair: Pair):
    """The target was promoted under another token: never may both sides be writable."""
    pair.receive()
    pair.once()
    record = FenceRecord("lost", "committing", "r", pair.address, 1)
    record_fence(pair.images, record)
    assert replicator("promote", pair.store / "r").returncode == 0
    result = replicator("resolve", pair.mount.mountpoint)
    assert (result.returncode, result.stdout) == (0, "promoted\n"), result.stderr
    with pytest.raises(OSError):
        guest_write(pair.mount.disk(), b"x", 0)


def test_a_side_that_is_gone_is_settled_by_hand(pair: Pair):
    receiver = pair.receive()
    pair.once()
    mountpoint = pair.mount.mountpoint
    record_fence(pair.images, FenceRecord("lost", "committing", "r", pair.address, 1))
    receiver.kill()
    unknown = replicator("resolve", mountpoint)
    assert unknown.returncode == 4 and "--assume" in unknown.stderr
    result = replicator("resolve", "--assume", "source", mountpoint)
    assert (result.returncode, result.stdout) == (0, "rolled-back\n"), result.stderr
    guest_write(pair.mount.disk(), b"goes on", 0)

    record_fence(pair.images, FenceRecord("lost", "committing", "r", pair.address, 1))
    result = replicator("resolve", "--assume", "target", mountpoint)
    assert (result.returncode, result.stdout) == (0, "promoted\n"), result.stderr
    with pytest.raises(OSError):
        guest_write(pair.mount.disk(), b"x", 0)

    # The target side of the same decision, which the source cannot contradict afterwards.
    target = pair.store / "r"
    assert "not promoted" in replicator("resolve", target).stdout
    assert replicator("resolve", "--assume", "source", target).stdout == "rolled-back\n"
    assert replicator("resolve", "--assume", "target", target).returncode == 0
    assert "is the disk" in replicator("resolve", target).stdout
    assert replicator("resolve", "--assume", "source", target).returncode == 1
    pair.receive()
    contradicted = replicator("resolve", "--assume", "source", mountpoint)
    assert contradicted.returncode == 1 and "stays fenced" in contradicted.stderr
    with pytest.raises(OSError):
        guest_write(pair.mount.disk(), b"x", 0)


def test_images_of_a_replica_are_not_mounted_before_it_is_promoted(
    pair: Pair, fuse: Callable[..., Mount]
):
    pair.receive()
    pair.once()
    copies = [pair.replica(n) for n in range(2)]
    there = fuse(*copies, name="there")
    refused = there.try_mount()
    assert refused.returncode == 1 and "belongs to a replica" in refused.stderr
    there.mount("--read-only")
    there.unmount()
    assert replicator("promote", pair.store / "r").returncode == 0
    there.mount()
    guest_write(there.disk(), bytes(CHUNK), 0)
    wait_for(lambda: copies[0].read_bytes()[:CHUNK] == bytes(CHUNK), "the write is in the image")
