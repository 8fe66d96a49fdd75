"""The promise as a whole: random writers throughout, every fault in every phase, then cutover.

Afterwards the replica equals the source byte for byte, and both hold every acknowledged write.
FUSEDISK_E2E_ROUNDS is the number of seeds (default 3); FUSEDISK_E2E_SEED the first of them.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Mount, wait_for
from guest_writers import Writer, unexplained
from proxy import Proxy

from replicator.cli import cli

MIB = 1 << 20
CHUNK = 64 << 10
SIZES = [14 * MIB + 3 * CHUNK + 4608, 8 * MIB]
# So slow that a fill and a pass can be met while they are under way.
SLOW = 3 * MIB
WRITERS = 4
LINK_TIMEOUT_SECONDS = 2
REPLICATOR = str(Path(sys.executable).with_name("replicator"))

FIRST_SEED = int(os.environ.get("FUSEDISK_E2E_SEED", "1"))
ROUNDS = int(os.environ.get("FUSEDISK_E2E_ROUNDS", "3"))

FAULTS = ("kill_sender", "kill_receiver", "drop", "silence", "cut_mid_frame", "down")


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [REPLICATOR, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in result.stderr, result.stderr
    assert not check or result.returncode == 0, result.stderr
    return result


class World:
    """A mount, a receiver behind a proxy, a sender, and the writers."""

    def __init__(self, folder: Path, mount: Mount, seed: int, contents: list[bytearray]) -> None:
        self.folder, self.mount = folder, mount
        self.begun = time.monotonic()
        self.random = random.Random(seed)
        self.store = folder / "store"
        self.store.mkdir()
        self.receiver_address = f"unix://{folder / 'receiver'}"
        self.proxy = Proxy(self.receiver_address, rate=SLOW)
        self.sender: subprocess.Popen[bytes] | None = None
        self.receiver: subprocess.Popen[bytes] | None = None
        self.contents = contents
        disks = [mount.disk(i) for i in range(len(mount.images))]
        self.writers = [
            Writer(disks, self.contents, range(i, WRITERS), seed * 100 + i) for i in range(WRITERS)
        ]

    def receive(self) -> None:
        with (self.folder / "receiver.log").open("ab") as log:
            self.receiver = subprocess.Popen(
                [REPLICATOR, "receive", "--store", self.store, self.receiver_address],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.receiver.stdout is not None
        assert self.receiver.stdout.readline().startswith(b"listening on unix://")

    def start(self) -> None:
        with (self.folder / "sender.log").open("ab") as log:
            self.sender = subprocess.Popen(
                [
                    *(REPLICATOR, "start", "--name", "r", "--rpo", "0.2"),
                    *("--link-timeout", str(LINK_TIMEOUT_SECONDS)),
                    *(self.mount.mountpoint, self.proxy.address),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def kill(self, process: subprocess.Popen[bytes] | None) -> None:
        assert process is not None and process.poll() is None, self.logs()
        process.kill()
        process.wait()

    def logs(self) -> str:
        return "".join(
            f"--- {name}\n{(self.folder / name).read_text()[-4000:]}"
            for name in ("sender.log", "receiver.log")
            if (self.folder / name).exists()
        )

    def status(self) -> dict[str, Any]:
        (found,) = json.loads(run("status", "--json", self.mount.mountpoint).stdout)["replicas"]
        assert isinstance(found, dict)
        return found

    def poll(self) -> dict[str, Any] | None:
        """The status without the cost of a process for each look."""
        result = CliRunner().invoke(cli, ["status", "--json", str(self.mount.mountpoint)])
        found = json.loads(result.stdout)["replicas"] if result.exit_code == 0 else []
        return found[0] if found else None

    def listed(self) -> dict[str, Any]:
        (found,) = json.loads(run("list", "--json", self.store).stdout)["replicas"]
        assert isinstance(found, dict)
        return found

    def wait_until(self, condition: Callable[[dict[str, Any]], object], what: str) -> None:
        last: dict[str, Any] = {}

        def met() -> object:
            nonlocal last
            self.check_writers()
            assert self.sender is not None and self.sender.poll() is None, self.logs()
            if (now := self.poll()) is None:
                return False
            last = now
            return "progress" in now and condition(now)

        try:
            wait_for(met, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; status {last}\n{self.logs()}") from None

    def check_writers(self) -> None:
        """No fault of replication reaches a guest: neither an error nor a write that hangs."""
        for writer in self.writers:
            assert writer.refused is None and writer.failure is None, writer.said()

    def under_way(self, *states: str) -> None:
        """Wait until a phase has begun and is far from its end."""

        def begun(status: dict[str, Any]) -> bool:
            progress = status["progress"]
            room = progress["total"] - progress["done"]
            # What a status call takes at this rate is well below what is left then.
            begun = status["sent"]["data_bytes"] > 0
            return status["state"] in states and begun and room > SLOW / 2

        self.wait_until(begun, f"it is in the midst of {states}")

    def fault(self, kind: str, expected: tuple[str, ...], listed: tuple[str, ...]) -> None:
        """Break something, see that status and list tell the truth about it, and mend it."""
        log = self.folder / "sender.log"
        before = log.read_text().count("trying again")

        def noticed() -> bool:
            assert self.sender is not None and self.sender.poll() is None, self.logs()
            return log.read_text().count("trying again") > before

        self.say(f"{kind} while {expected}")
        if kind == "kill_sender":
            self.kill(self.sender)
            assert self.status()["state"] == "stopped"
            assert self.listed()["state"] in listed
            self.start()
        elif kind == "kill_receiver":
            self.kill(self.receiver)
            wait_for(noticed, "the sender noticed that the receiver died")
            self.wait_until(self._away, "status says that the receiver is away")
            assert self.listed()["state"] in listed
            self.receive()
        elif kind == "down":
            self.proxy.down()
            wait_for(noticed, "the sender noticed that the network is down")
            self.wait_until(self._away, "status says that the network is down")
            self.proxy.heal()
        elif kind == "silence":
            self.proxy.silence()
            wait_for(noticed, "the sender noticed the silence")
            assert self.status()["error"]
            self.proxy.heal()
        elif kind == "cut_mid_frame":
            self.proxy.cut_after(self.random.randint(1, MIB))
            for writer in self.writers:
                writer.pause_seconds = 0.0
            wait_for(noticed, "the sender noticed the cut")
        else:
            self.proxy.drop()
            wait_for(noticed, "the sender noticed the cut")
        for writer in self.writers:
            writer.pause_seconds = 0.002
        assert self.listed()["state"] in listed
        self.wait_until(lambda s: s["state"] in expected, f"it goes on after {kind}")

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.begun:6.1f} s: {what}")

    @staticmethod
    def _away(status: dict[str, Any]) -> bool:
        return status["state"] == "waiting" and bool(status["error"])

    def following(self) -> None:
        self.wait_until(lambda s: s["state"] == "following", "it follows")

    def in_pass(self) -> None:
        """A pass that is being sent, with much of it still to come."""
        for writer in self.writers:
            writer.pause_seconds = 0.0
        self.proxy.rate = SLOW / 3
        self.wait_until(
            lambda s: (
                s["state"] == "following"
                and s["progress"]["total"] - s["progress"]["done"] > SLOW / 3
                and s["progress"]["done"] > 0
            ),
            "a pass is under way",
        )
        self.proxy.rate = SLOW

    def close(self) -> None:
        for writer in self.writers:
            writer.stop()
        for writer in self.writers:
            if writer.is_alive():
                writer.join(60)
        for process in (self.sender, self.receiver):
            if process is not None:
                process.kill()
                process.wait()


@pytest.fixture
def make_world(
    tmp_path: Path,
    loop_device: Callable[[Path], Path],
    fuse: Callable[..., Mount],
) -> Iterator[Callable[[int], World]]:
    made: list[World] = []

    def make(seed: int) -> World:
        noise = random.Random(seed)
        first, backing = tmp_path / "odd.img", tmp_path / "backing"
        # Mostly data, so that a fill takes its time; holes, so that there is something to skip.
        for path, size in zip((first, backing), SIZES, strict=True):
            with path.open("wb") as file:
                file.truncate(size)
                for at in range(0, size - MIB, 2 * MIB):
                    file.seek(at)
                    file.write(noise.randbytes(MIB + noise.randrange(CHUNK)))
        mount = fuse(first, loop_device(backing))
        mount.mount()
        contents = [bytearray(image.read_bytes()) for image in mount.images]
        made.append(World(tmp_path, mount, seed, contents))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + ROUNDS))
def test_nothing_acknowledged_is_lost(make_world: Callable[[int], World], seed: int) -> None:
    print(f"seed {seed}: FUSEDISK_E2E_SEED={seed} FUSEDISK_E2E_ROUNDS=1 repeats it")
    world = make_world(seed)
    # Over three seeds every fault meets every phase.
    deal = [FAULTS[(2 * seed + i) % len(FAULTS)] for i in range(len(FAULTS))]
    with world.proxy:
        world.receive()
        for writer in world.writers:
            writer.start()
        world.start()

        filling = ("filling", "comparing")
        for phase, kind in zip(("filling", "comparing"), deal[0:2], strict=True):
            world.under_way(phase)
            assert world.listed()["state"] == "filling"
            world.fault(kind, filling, ("filling",))
        world.proxy.rate = None
        world.following()

        for kind in deal[2:4]:
            world.in_pass()
            world.fault(kind, ("following",), ("following",))
        world.proxy.rate = None

        for kind in deal[4:6]:
            world.following()
            world.fault(kind, ("following",), ("following",))
        cut_over(world)
    prove(world)


def cut_over(world: World) -> None:
    world.say("cutover")
    acknowledged = [writer.acknowledged for writer in world.writers]
    assert all(writer.refused is None for writer in world.writers)
    result = run(
        "cutover", "--json", "--max-downtime", "10000", world.mount.mountpoint, check=False
    )
    assert result.returncode == 0, result.stderr + world.logs()
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["outcome"] == "promoted"
    for writer, before in zip(world.writers, acknowledged, strict=True):
        writer.join(60)
        assert not writer.is_alive()
        assert writer.refused == 30  # EROFS
        assert writer.acknowledged > before, "no write was acknowledged during the cutover"
    assert world.sender is not None and world.sender.wait(60) == 0, world.logs()
    assert world.listed()["state"] == "promoted"


def prove(world: World) -> None:
    world.say("proof")
    for i, image in enumerate(world.mount.images):
        source = image.read_bytes()
        assert (world.store / "r" / image.name).read_bytes() == source
        assert world.mount.disk(i).read_bytes() == source
        assert unexplained(source, i, world.contents[i], world.writers) == []
    world.mount.unmount()
    world.mount.mount()
    assert world.mount.status()["fenced"]
    fd = os.open(world.mount.disk(), os.O_WRONLY)
    try:
        with pytest.raises(OSError) as error:
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)
    assert error.value.errno == 30
    assert world.mount.images[0].read_bytes()[:1] == world.mount.disk().read_bytes()[:1]


def test_the_network_goes_away_and_comes_back(make_world: Callable[[int], World]) -> None:
    world = make_world(99)
    with world.proxy:
        world.proxy.rate = None
        world.receive()
        world.start()
        world.following()
        world.proxy.down()
        world.wait_until(World._away, "status says that it waits, and why")
        assert "waiting (" in run("status", world.mount.mountpoint).stdout
        fd = os.open(world.mount.disk(), os.O_WRONLY)
        try:
            begun = time.monotonic()
            os.pwrite(fd, b"while the network is away", 5000)
            os.fsync(fd)
            assert time.monotonic() - begun < 10
        finally:
            os.close(fd)
        assert world.status()["lag"]["chunks"] == 1
        world.proxy.heal()
        replica = world.store / "r" / world.mount.images[0].name
        world.wait_until(
            lambda s: s["state"] == "following" and s["lag"]["chunks"] == 0, "it caught up"
        )
        assert world.status()["error"] is None
        assert replica.read_bytes() == world.mount.disk().read_bytes()


def test_a_disk_of_15_tib(tmp_path: Path, fuse: Callable[..., Mount]) -> None:
    """Nothing walks over what was never written: the map, the fill and the passes are sparse."""
    image = tmp_path / "huge.img"
    size = 15 << 40
    try:
        with image.open("wb") as file:
            file.truncate(size)
    except OSError as error:
        pytest.skip(f"no file of 15 TiB can be made here: {error.strerror}")
    mount = fuse(image)
    mount.mount()
    world = World(tmp_path, mount, 0, [])
    world.proxy.rate = None
    end = b"the last bytes of the disk"
    try:
        with world.proxy:
            world.receive()
            world.start()
            world.following()
            fd = os.open(mount.disk(), os.O_WRONLY)
            try:
                for at in (0, 7 << 40, size - len(end)):
                    assert os.pwrite(fd, end, at) == len(end)
                os.fsync(fd)
            finally:
                os.close(fd)
            run("cutover", "--max-downtime", "10000", mount.mountpoint)
    finally:
        world.close()
    replica = world.store / "r" / image.name
    assert replica.stat().st_size == size
    assert max(replica.stat().st_blocks, image.stat().st_blocks) * 512 < 2 * MIB
    with image.open("rb") as source, replica.open("rb") as copy:
        for at in (0, 7 << 40, size - CHUNK):
            source.seek(at)
            copy.seek(at)
            assert source.read(CHUNK) == copy.read(CHUNK)
        assert os.pread(copy.fileno(), len(end), size - len(end)) == end
