"""Many replicas at a time: nobody waits for somebody else's link, target or garbage."""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from conftest import Mount, wait_for
from proxy import Proxy
from test_replication import Pair, guest_write

from replicator.address import parse_address
from replicator.admission import CONNECTIONS_MAX
from replicator.following import Follower
from replicator.settings import SenderSettings
from replicator.source import Source
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings

REPLICAS = 50
_FLOOD = 300
# Fifty fills and a hundred commits, on whatever machine.
_SECONDS_MAX = 240
# A copy takes minutes, whatever else the machine does.
_SLOW_RATE = 4000
_MEMORY_MAX = 128 << 20


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    try:
        yield made
    finally:
        made.clean_up()


def test_fifty_replicas_and_one_that_stalls(pair: Pair) -> None:
    pair.receive()

    async def main(proxy: Proxy) -> None:
        def follower(name: str, address: str) -> Follower:
            target = parse_address(address)
            connect = functools.partial(connected, target, Settings())
            settings = SenderSettings(rpo_seconds=0.5)
            return Follower(Source(pair.mount.mountpoint), name, target, connect, settings)

        followers = [follower(f"r{n}", pair.address) for n in range(REPLICAS - 1)]
        stalled = follower("stalled", proxy.address)
        async with trio.open_nursery() as nursery:
            for one in (*followers, stalled):
                nursery.start_soon(one.run)
            with trio.fail_after(_SECONDS_MAX):
                while any(one.committed is None for one in (*followers, stalled)):
                    await trio.sleep(0.05)
                # In the midst of a pass, with the replica's lock and a capture held.
                await trio.to_thread.run_sync(proxy.silence)
                for turn in range(2):
                    await trio.to_thread.run_sync(
                        guest_write, pair.mount.disk(0), os.urandom(4096), turn << 16
                    )
                    before = [one.commits for one in followers]
                    while any(
                        one.commits == was for one, was in zip(followers, before, strict=True)
                    ):
                        await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    with Proxy(pair.address) as proxy:
        trio.run(main, proxy)
        proxy.heal()
    for n in range(REPLICAS - 1):
        copy = pair.store / f"r{n}" / pair.images[0].name
        wait_for(lambda copy=copy: copy.read_bytes() == pair.images[0].read_bytes(), f"r{n}")


def test_a_slow_and_a_dead_target_cost_the_others_nothing(pair: Pair) -> None:
    receivers = []
    for name in ("fast", "slow", "dead"):
        pair.store, pair.address = pair.tmp_path / name, "tcp://127.0.0.1:0"
        pair.store.mkdir()
        pair.receive()
        receivers.append(pair.address)
    fast, slow, dead = receivers
    with Proxy(slow, rate=_SLOW_RATE) as slow_proxy, Proxy(dead) as dead_proxy:
        dead_proxy.silence()
        targets = {"slow": slow_proxy.address, "dead": dead_proxy.address, "fast": fast}
        for name, address in targets.items():
            pair.run("start", "--name", name, "--rpo", "0.2", pair.mount.mountpoint, address)
        copy = pair.tmp_path / "fast" / "fast" / pair.images[0].name
        for turn in range(3):
            guest_write(pair.mount.disk(0), os.urandom(4096), turn << 16)
            want = pair.images[0].read_bytes()
            wait_for(
                lambda want=want: copy.exists() and copy.read_bytes() == want, "the fast one has it"
            )
        manifest = pair.tmp_path / "slow" / "slow" / ".fusedisk" / "manifest.json"
        assert not manifest.exists() or b'"following"' not in manifest.read_bytes()


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_garbage_and_a_flood_of_connections(pair: Pair) -> None:
    receiver = pair.receive()
    pair.once()
    pid = receiver.popen.pid
    before = _resident(pid)
    host, port = pair.address.removeprefix("tcp://").split(":")
    said: list[bytes] = []
    ended = threading.Event()

    def garbage() -> None:
        count = 0
        while not ended.is_set():
            count += 1
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as one:
                one.settimeout(2)
                # Noise, a frame that claims to be huge, or half of one.
                one.sendall((os.urandom(5000), b"FDR1" + b"\xff" * 40, b"FD")[count % 3])
                if count % 3 < 2:
                    said.append(one.recv(1 << 16))
            time.sleep(0.001)

    thread = threading.Thread(target=garbage)
    thread.start()
    try:
        with contextlib.ExitStack() as held:
            for _ in range(_FLOOD):
                held.enter_context(socket.create_connection((host, int(port))))
            guest_write(pair.mount.disk(0), os.urandom(4096), 0)
            pair.once()
            assert pair.identical()
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            assert descriptors < CONNECTIONS_MAX + 64
            assert _resident(pid) - before < _MEMORY_MAX
    finally:
        ended.set()
        thread.join()
    assert len(said) > 3
    assert not any(b"disk0" in answer or b'r"' in answer for answer in said)
    assert receiver.popen.poll() is None
    # Nothing of it stays.
    wait_for(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) < 64, "they are all gone")
