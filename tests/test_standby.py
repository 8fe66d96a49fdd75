"""A replica's images in a mount that stands by: written from the promotion on, all of it noted."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from moving import Move
from test_promotion import replicator
from test_replication import CHUNK, Pair, guest_write, pair

from fusedisk.fencing import FenceRecord, record_fence

__all__ = ["pair"]


@pytest.mark.parametrize("disks", [1, 2])
def test_a_running_guest_moves_away_and_home_again(
    tmp_path: Path, fuse: Callable[..., Mount], disks: int
) -> None:
    mount = fuse(*(tmp_path / f"disk{number}.img" for number in range(disks)))
    move = Move(tmp_path, mount, fuse)
    try:
        assert move.cut_over().wait(120) == 0, move.log("cutover.log")
        move.target.wait_for_records(3)
        back = move.prepare_home(fuse)
        assert back.cut_over().wait(120) == 0, back.log("cutover.log")
        assert "only changes are sent" in back.log("start.log"), back.log("start.log")
        sent = back.entry()["sent"]["data_bytes"]
        assert sent < 16 << 20, "a whole disk was sent"
        away, home = move.target, back.target
        back.check(back.replicas, move.source, away, home)
        records = move.records(move.source, away, home)
        assert len({record.boot for record in records}) == 1
        uptimes = [record.uptime for record in records]
        assert uptimes == sorted(uptimes)
        assert "failed" not in away.said + home.said
    finally:
        move.close()


@pytest.fixture
def standing(pair: Pair, fuse: Callable[..., Mount]) -> Mount:
    """A mount of a replica's images, which stands by while its sender goes on."""
    pair.receive()
    pair.wait_following(pair.start())
    made = fuse(pair.replica(0), pair.replica(1), name="away")
    made.mount("--standby")
    return made


def committed(pair: Pair) -> bool:
    lag = pair.status()["lag"]
    return lag["chunks"] == 0


def test_it_is_read_at_once_and_written_once_promoted(pair: Pair, standing: Mount) -> None:
    assert standing.status()["standby"]
    with pytest.raises(OSError) as refused:
        guest_write(standing.disk(0), b"too early", 0)
    assert refused.value.errno == errno.EROFS
    guest_write(pair.mount.disk(1), b"of the source", 5 * CHUNK)
    wait_for(lambda: committed(pair) and pair.identical(), "it is at the target")
    # Also what was read before is read again: the receiver writes to the images beside us.
    assert standing.disk(1).read_bytes() == pair.images[1].read_bytes()
    guest_write(pair.mount.disk(1), b"and once more", 5 * CHUNK)
    wait_for(lambda: committed(pair) and pair.identical(), "it is at the target")
    assert standing.disk(1).read_bytes() == pair.images[1].read_bytes()
    early = replicator("start", "--once", standing.mountpoint, "unix:///nowhere")
    assert early.returncode == 1 and "stands by until" in early.stderr

    moved = replicator("cutover", "--max-downtime", "20000", pair.mount.mountpoint)
    assert moved.returncode == 0, moved.stderr
    # At once: a guest that goes on here does not wait for us to look.
    guest_write(standing.disk(0), b"the guest goes on", 3 * CHUNK)
    assert not standing.status()["standby"]
    assert standing.changed() == [1, 0]
    token = json.loads((pair.store / "r/.fusedisk/manifest.json").read_text())["token"]
    assert json.loads((standing.state / "mount.json").read_text())["base"] == token
    # What it has become outlives the mount.
    standing.unmount()
    standing.mount()
    assert standing.changed() == [1, 0]


def test_a_promotion_that_cannot_be_noted_yet_is_a_pause(pair: Pair, standing: Mount) -> None:
    """The guest may have arrived already: an error of its disk would be worse than waiting."""
    in_the_way = standing.state / "mount.json.new"
    in_the_way.mkdir()
    moved = replicator("cutover", "--max-downtime", "20000", pair.mount.mountpoint)
    assert moved.returncode == 0, moved.stderr
    failures: list[OSError] = []

    def write() -> None:
        try:
            guest_write(standing.disk(0), b"the guest goes on", 3 * CHUNK)
        except OSError as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    log = standing.state / "server.log"
    wait_for(lambda: "writes are held until" in log.read_text(), "the log says so")
    writer.join(0.5)
    assert writer.is_alive() and standing.status()["standby"]
    in_the_way.rmdir()
    writer.join(60)
    assert not writer.is_alive() and failures == []
    assert not standing.status()["standby"]
    assert standing.disk(0).read_bytes()[3 * CHUNK :].startswith(b"the guest goes on")


def test_the_end_of_the_standby_is_found_after_any_crash(pair: Pair, standing: Mount) -> None:
    """The server is killed, then the whole mount is gone, while the replica is promoted."""
    standing.kill_server()
    with pytest.raises(OSError):
        guest_write(standing.disk(0), b"too early", 0)
    standing.crash()
    assert standing.mount("--standby") == ""
    standing.crash()
    moved = replicator("cutover", "--max-downtime", "20000", pair.mount.mountpoint)
    assert moved.returncode == 0, moved.stderr
    assert standing.mount("--standby") == ""
    assert not standing.status()["standby"]
    guest_write(standing.disk(0), b"the guest goes on", 3 * CHUNK)
    token = json.loads((pair.store / "r/.fusedisk/manifest.json").read_text())["token"]
    assert json.loads((standing.state / "mount.json").read_text())["base"] == token
    assert standing.changed() == [1, 0]


def test_only_a_whole_replica_stands_by(pair: Pair, standing: Mount, fuse: Callable[..., Mount]):
    single = fuse(pair.replica(0), name="single")
    standing.unmount()
    for mount in (single, fuse(pair.tmp_path / "plain.img", name="plain")):
        if not mount.images[0].exists():
            mount.images[0].write_bytes(os.urandom(1 << 20))
        refused = mount.try_mount("--standby")
        assert refused.returncode == 1 and "only a replica stands by" in refused.stderr


def test_no_history_from_before_is_believed_where_it_stands_by(
    pair: Pair, fuse: Callable[..., Mount]
) -> None:
    """A disk that left and is to come home: another replica must not go on from the old marks.

    The receiver writes to the images of a mount that stands by, and these marks know nothing of it.
    """
    receiver = pair.receive()
    pair.wait_following(pair.start())
    moved = replicator("cutover", "--max-downtime", "20000", pair.mount.mountpoint)
    assert moved.returncode == 0, moved.stderr
    home = fuse(pair.replica(0), pair.replica(1), name="home")
    home.mount()
    guest_write(home.disk(0), b"of another replica's epoch", 3 * CHUNK)
    before = json.loads((home.state / "mount.json").read_text())
    home.unmount()
    for state in ("committing", "fenced"):
        record_fence(home.images, FenceRecord("token", state, "r", "unix:///there", 2))
    receiver.kill()
    adopted = replicator("adopt", pair.store / "r")
    assert adopted.returncode == 0 and "compared" not in adopted.stdout, adopted.stderr
    assert home.mount("--standby") == ""
    now = json.loads((home.state / "mount.json").read_text())
    assert now["standby"] and now["generation"] != before["generation"]
    assert home.changed() == [0, 0]
