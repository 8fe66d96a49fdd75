"""The room that a journal needs is looked at, and made, before the pass is sent."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import wait_for
from test_clones import MakeFilesystem, filesystem
from test_points import UndoFiles
from test_replication import CHUNK, SIZES, Pair, guest_write, pair

from replicator import messages as m
from replicator.frames import encode
from replicator.manifest import ReplicaDisk
from replicator.pins import Pin
from replicator.receiver import _opened
from replicator.replica import Replica, TargetFull
from replicator.store import Store

__all__ = ["filesystem", "pair"]
MIB = 1 << 20


def test_a_pass_that_would_not_fit_is_not_sent(filesystem: MakeFilesystem, pair: Pair) -> None:
    pair.store = filesystem("ext4")
    receiver = pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    pair.wait_identical()
    before = [pair.replica(disk).read_bytes() for disk in range(2)]
    ballast = pair.store / "ballast"
    with ballast.open("wb") as file:
        room = os.statvfs(pair.store)
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - MIB)
    for at in range(0, SIZES[0], 16 * CHUNK):
        guest_write(pair.mount.disk(), os.urandom(min(16 * CHUNK, SIZES[0] - at)), at)

    def error() -> str:
        return pair.status()["error"] or ""

    wait_for(lambda: "for its journal and there are" in error(), "status says what is missing")
    assert "for its journal" in receiver.said and "for its journal" in sender.said
    assert [pair.replica(disk).read_bytes() for disk in range(2)] == before
    ballast.unlink()
    pair.wait_identical()
    assert sender.popen.poll() is None


class Nearly(UndoFiles):
    """A disk that has 10 MiB left, and what the removal of undo records gives back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 1 << 40
        real = os.statvfs

        def statvfs(path: Path) -> os.statvfs_result:
            found = list(real(path))
            found[1], found[4] = 1, self.left
            return os.statvfs_result(found)

        monkeypatch.setattr("replicator.holding.os.statvfs", statvfs)

    def unlink(self, path: Path) -> None:
        if path.parent.name == "points":
            self.left += path.stat().st_size
        super().unlink(path)


def test_points_go_before_a_pass_is_sent_and_only_as_many_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = Nearly(monkeypatch)
    disks = [ReplicaDisk("disk", 2 * MIB, 65536)]

    def step(replica: Replica, epoch: int) -> None:
        replica.begin(epoch)
        replica.write(0, 0, os.urandom(2 * MIB))
        replica.commit("gen", epoch)
        replica.apply()

    with Store(tmp_path, files, "9") as store, Replica.open(store, "vm", "src", disks) as replica:
        for epoch in range(1, 8):
            step(replica, epoch)
        files.left = 10 * MIB
        pin = Pin(tmp_path, "vm", 4)
        try:
            # Three points may go, of a little more than 2 MiB each; the fourth is in use.
            with pytest.raises(TargetFull, match=r"needs 17.0 MiB .* there are 10.0 MiB left"):
                replica.begin(8, None, 17 * MIB)
            assert len(replica.manifest.points) == 7
            replica.begin(8, None, 14 * MIB)
            assert [point.id for point in replica.manifest.points] == [3, 4, 5, 6, 7]
        finally:
            pin.close()
        step(replica, 8)
    assert caplog.text.count("target full; dropped the oldest recovery point") == 2


def test_however_much_room_there_is_it_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What points would give back counts too, on a filesystem that has more than anybody."""
    files = Nearly(monkeypatch)
    disks = [ReplicaDisk("disk", 2 * MIB, 65536)]
    with Store(tmp_path, files, "9") as store:
        with Replica.open(store, "vm", "src", disks) as replica:
            for epoch in range(1, 4):
                replica.begin(epoch, "gen", based=True)
                replica.write(0, 0, os.urandom(2 * MIB))
                replica.commit("gen", epoch)
                replica.apply()
            replica.begin(4, "gen", based=True)
            replica.write(0, 0, os.urandom(MIB))
            replica.checkpoint("gen", 4, 0, MIB)
        with Replica.open(store, "vm", "src", disks) as replica:
            files.left = m.OFFSET_MAX
            said = _opened(replica)
    assert said.room == m.OFFSET_MAX and said.kept_bytes > MIB
    assert encode(said)


def test_a_replica_that_failed_waits_for_nothing_to_say_so(tmp_path: Path) -> None:
    """Its first error says why; a pass may be being applied over the same disk for long."""
    with Store(tmp_path) as store:
        replica = Replica.open(store, "vm", "src", [ReplicaDisk("disk", CHUNK, CHUNK)])
        with replica, ThreadPoolExecutor(1) as another, replica._apply_mutex:
            replica._give_up("failed", OSError(errno.ENOSPC, "full"))
            assert another.submit(replica._drop_oldest_point).result(10) is None
