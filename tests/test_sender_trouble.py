"""What a sender makes of trouble: it waits, longer each time, and says so; or ends, if told to."""

import functools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import Mount, unavailable, wait_for
from frame_proxy import FrameProxy
from simulated_process import run
from test_read_errors import BadSource
from test_replication import Pair, guest_write, pair
from test_stalling import Hanging

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import Lag
from replicator.address import parse_address
from replicator.following import Follower
from replicator.messages import Committed, Event, Welcome
from replicator.reporting import report
from replicator.settings import SenderSettings
from replicator.source import Source
from replicator.standing import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN, Standing
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings

__all__ = ["pair"]


@pytest.fixture
def small(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    """A pair whose store has hardly any room."""
    made = Pair(tmp_path, fuse)
    size = ["-o", "size=300k"]
    words = ["mount", "-t", "tmpfs", *size, "tmpfs", str(made.store)]
    if os.geteuid() != 0 or subprocess.run(words, check=False).returncode != 0:
        unavailable("only root mounts filesystems")
    try:
        yield made
    finally:
        made.clean_up()
        subprocess.run(["umount", made.store], check=True)


def test_a_full_target_is_tried_less_and_less_and_the_error_stands(tmp_path: Path) -> None:
    world = Hanging(tmp_path, 3)
    seen: set[str] = set()

    async def story() -> None:
        follower = world.follower
        assert follower is not None
        world.target.full = True
        await world.until(lambda: follower.state == "waiting")
        before = len(world.network.connections)
        with trio.move_on_after(60):
            while True:
                seen.add(f"{follower.state}: {'full' in world.error()}")
                await trio.sleep(0.05)
        # Half a second, then twice as long each time.
        assert len(world.network.connections) - before <= 8
        world.target.full = False
        commits = follower.commits
        await world.until(lambda: follower.state == "following" and not world.error())
        assert follower.commits > commits

    run(3, lambda: world.play(story))
    assert seen == {"waiting: True"}


def test_an_idle_replica_is_fine_once_the_link_is_there_again(tmp_path: Path) -> None:
    world = Hanging(tmp_path, 4)

    async def story() -> None:
        follower = world.follower
        assert follower is not None
        world._guest_runs = False
        await world.until(lambda: not any(m.count(follower.committed) for m in world.mount.maps))
        commits = follower.commits
        world.network.connections[-1].drop()
        await world.until(lambda: follower.state == "waiting")
        # Long before a link that holds would tell.
        await world.until(lambda: follower.state == "following" and not world.error(), 20)
        assert follower.commits == commits

    run(4, lambda: world.play(story))


def test_how_a_sender_stands() -> None:
    changes: list[str] = []
    standing = Standing(lambda: changes.append(standing.state))
    standing.enter("filling")
    standing.fail("full", refused=True)
    delays = [standing.wait(0.0, 99.0) for _ in range(8)]
    assert delays[0] == RETRY_SECONDS_MIN and delays[-1] == RETRY_SECONDS_MAX
    for doing in ("connecting", "comparing", "following"):
        standing.enter(doing)
        assert (standing.state, standing.error) == ("waiting", "full")
    standing.enter("paused")
    assert (standing.state, standing.error) == ("paused", "full")
    standing.enter("following")
    standing.holds()
    assert (standing.state, standing.error) == ("following", None)
    assert standing.wait(0.0, 99.0) == RETRY_SECONDS_MAX
    standing.progressed()
    assert standing.wait(0.0, 99.0) == RETRY_SECONDS_MIN
    standing.fail("the link was lost")
    standing.enter("connecting")
    assert (standing.state, standing.error) == ("waiting", "the link was lost")
    standing.enter("following")
    assert (standing.state, standing.error) == ("following", None)
    standing.cannot_read("byte 5")
    assert (standing.state, standing.error) == ("waiting", "byte 5")
    standing.cannot_read(None)
    standing.hang("the disk hangs")
    assert (standing.state, standing.error) == ("following", "the disk hangs")
    assert changes[-1] == "following"


def test_a_damaged_frame_costs_a_link_and_no_sender(pair: Pair) -> None:
    damaged = []

    def damaging(kind: type[Event]) -> bool:
        # The first commit after the copy was complete.
        if kind is not Committed or damaged or "INFO following" not in sender.said:
            return False
        damaged.append(kind)
        return True

    pair.address = f"unix://{pair.tmp_path}/receiver"
    pair.receive()
    proxy = FrameProxy(pair.tmp_path / "proxy", pair.address, damaging=damaging)
    try:
        pair.address = proxy.address
        sender = pair.start()
        pair.wait_following(sender)
        guest_write(pair.mount.disk(), b"x", 0)
        wait_for(lambda: "trying again" in sender.said, "the damage is noticed")
        pair.wait_identical()
        wait_for(lambda: pair.status()["state"] == "following", "it follows again")
        assert damaged and sender.popen.poll() is None
        pair.stop(sender)
    finally:
        proxy.close()


def test_a_receiver_that_is_none_ends_the_sender(pair: Pair) -> None:
    pair.address = f"unix://{pair.tmp_path}/receiver"
    pair.receive()
    proxy = FrameProxy(pair.tmp_path / "proxy", pair.address, damaging=lambda kind: kind is Welcome)
    try:
        pair.address = proxy.address
        pair.refused(pair.start(), "is none: ")
    finally:
        proxy.close()


def test_a_target_without_room_is_waited_for_or_not(small: Pair) -> None:
    small.receive()
    small.refused(small.start("--on-target-error", "stop"), "; ended by --on-target-error stop")
    sender = small.start("--on-source-error", "stop")
    wait_for(lambda: sender.said.count("trying again") > 2, "it tries again and again")
    found = small.status()
    assert found["state"] == "waiting" and "target full" in found["error"]
    assert sender.popen.poll() is None


def follower_of(pair: Pair, source: Source, **settings: Any) -> Follower:
    address = parse_address(pair.address)
    connect = functools.partial(connected, address, Settings())
    return Follower(source, "r", address, connect, SenderSettings(once=True, **settings))


def test_a_source_that_cannot_be_read_ends_the_sender_if_wanted(pair: Pair) -> None:
    pair.receive()
    source = BadSource(pair.mount.mountpoint)

    async def main() -> None:
        with trio.fail_after(30):
            await follower_of(pair, source, on_source_error="stop").run()

    try:
        with pytest.raises(FuseDiskError, match=r"cannot read 65536 bytes .* --on-source-error"):
            trio.run(main)
    finally:
        source.close()


class Watched(Source):
    """Notes the threads that look at the disks and the maps."""

    def __init__(self, mountpoint: Path) -> None:
        self.threads: set[threading.Thread] = set()
        super().__init__(mountpoint)

    def lag(self, since: int) -> Lag:
        self.threads.add(threading.current_thread())
        return super().lag(since)

    def allocated(self) -> list[int]:
        self.threads.add(threading.current_thread())
        return super().allocated()


def test_disks_and_maps_are_looked_at_in_threads(pair: Pair) -> None:
    pair.receive()
    source = Watched(pair.mount.mountpoint)

    async def main() -> None:
        follower = follower_of(pair, source)
        await follower.run()
        await report(follower)

    try:
        trio.run(main)
    finally:
        source.close()
    assert source.threads and threading.main_thread() not in source.threads
