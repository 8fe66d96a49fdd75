"""A comparison of a replica that follows goes on after it was cut off, whoever died."""

import errno
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from conftest import wait_for
from proxy import Proxy
from test_clones import MIB, CopyingFiles, filesystem
from test_cut_fill import UNDER_WAY
from test_cut_pass import RATE, SIZE, change_around, pair, reached, received
from test_replication import CHUNK, Pair, Process

from fusedisk.errors import FuseDiskError
from replicator import messages as m
from replicator.manifest import CLAIMS_MAX, Claim, ReplicaDisk
from replicator.reaching import Reached
from replicator.replica import Replica
from replicator.store import Store

__all__ = ["filesystem", "pair"]


def compared(sender: Process) -> list[int]:
    found = re.findall(r"comparing (\d+) bytes, because the comparison was cut off", sender.said)
    return [int(count) for count in found]


@pytest.mark.parametrize(
    ("pair", "cuts"),
    [("journal", ("link", "receiver")), ("clones", ("sender", "receiver"))],
    indirect=["pair"],
)
def test_a_comparison_that_was_cut_off_goes_on(pair: Pair, cuts: tuple[str, ...]) -> None:
    receiver = pair.receive()
    pair.once()
    pair.mount.unmount()
    pair.images[0].write_bytes(random.Random(9).randbytes(SIZE))
    pair.mount.mount()
    disk, total = pair.mount.disk(), sum(image.stat().st_size for image in pair.images)
    before = written = 0
    with Proxy(pair.address, rate=RATE) as proxy:
        direct, pair.address = pair.address, proxy.address
        sender = pair.start()
        for number, what in enumerate(cuts):
            begun = before
            wait_for(lambda begun=begun: reached(pair) > begun, "a checkpoint is noted")
            said = 0 if what == "sender" else len(compared(sender))
            if what == "link":
                proxy.down()
            else:
                (sender if what == "sender" else receiver).kill()
            before = reached(pair)
            kept = received(pair.store)
            assert kept is not None and kept.compared and kept.towards != kept.generation
            written += change_around(disk, before, number)
            if number + 1 == len(cuts):
                proxy.rate = None
            if what == "link":
                proxy.heal()
            elif what == "sender":
                sender = pair.start()
            else:
                pair.address = direct
                receiver = pair.receive()
                pair.address = proxy.address
            wait_for(lambda one=sender, said=said: len(compared(one)) > said, "it goes on")
            assert compared(sender)[-1] <= total - before // CHUNK * CHUNK
        pair.wait_identical()
        sent = pair.status()["sent"]["data_bytes"]
    assert sent <= SIZE + written + UNDER_WAY * len(cuts)
    wait_for(lambda: received(pair.store) is None, "it is committed")
    pair.stop(sender)


def opened(store: Store) -> Replica:
    return Replica.open(store, "r", "source", [ReplicaDisk(n, MIB, 4096) for n in ("a", "b")])


@pytest.fixture(params=["journal", "clones"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    files = CopyingFiles()
    files.clones = request.param == "clones"
    with Store(tmp_path, files) as made:
        with opened(made) as replica:
            replica.begin(1, "old")
            for disk in range(2):
                replica.write(disk, 0, b"o" * MIB)
            replica.commit("old", 1)
        yield made


def cut_off(store: Store) -> None:
    """A comparison for epoch 7 of another generation that came to 100 KiB of the first disk."""
    with opened(store) as replica:
        replica.begin(7, "new")
        replica.write(0, 0, b"n" * 4096)
        replica.checkpoint("new", 7, 0, 100 << 10)
        replica.write(0, 120 << 10, b"not noted")


def test_a_comparison_is_kept_for_its_own_sequel_alone(store: Store) -> None:
    cut_off(store)
    with opened(store) as replica:
        kept = replica.received
        assert kept is not None and kept.compared and replica.claims == [Claim(7, 0, 100 << 10)]
        assert (replica.towards, kept.generation, kept.epoch) == ("new", "old", 1)
        nothing = pytest.raises(FuseDiskError, match="keeps no pass to go on with")
        for generation, based in (("old", False), ("newer", False), ("new", True)):
            with nothing:
                replica.begin(7, generation, continues=True, based=based)
        replica.begin(7, "new", continues=True)
        replica.write(1, 0, b"rest")
        replica.commit("new", 9)
        replica.apply()
    folder = store.path / "r"
    assert (folder / "a").read_bytes() == b"n" * 4096 + b"o" * (MIB - 4096)
    assert (folder / "b").read_bytes() == b"rest" + b"o" * (MIB - 4)


@pytest.mark.parametrize("store", ["clones"], indirect=True)
def test_what_was_not_compared_is_as_the_point_again(store: Store) -> None:
    """A block of 64 KiB is sent whole where one chunk differs, and the rest of it may be torn."""
    with opened(store) as replica:
        replica.begin(7, "new")
        replica.write(0, 0, b"n" * (200 << 10))
        replica.checkpoint("new", 7, 0, 100 << 10)
        replica.write(1, 0, b"torn")
        replica.checkpoint("new", 7, 0, 100 << 10)
    with opened(store) as replica:
        replica.begin(7, "new", continues=True)
        replica.commit("new", 9)
        replica.apply()
    assert (store.path / "r/a").read_bytes() == b"n" * CHUNK + b"o" * (MIB - CHUNK)
    assert (store.path / "r/b").read_bytes() == b"o" * MIB


def test_a_later_epoch_counts_once_the_comparison_is_complete(store: Store) -> None:
    with opened(store) as replica:
        replica.begin(7, "new")
        replica.checkpoint("new", 7, 0, CHUNK)
        replica.checkpoint("new", 8, 1, CHUNK)
        assert replica.manifest.received is not None
        assert replica.manifest.received.claims == [Claim(7, 0, CHUNK)]
        replica.checkpoint("new", 7, 1, MIB)
        replica.checkpoint("new", 8, 1, CHUNK)
        assert replica.manifest.received.claims == [Claim(7, 1, MIB), Claim(8, 1, CHUNK)]
    with opened(store) as replica:
        replica.begin(7, "new", continues=True)
        replica.checkpoint("new", 9, 0, CHUNK)
        replica.checkpoint("new", 10, 1, MIB)
        assert replica.manifest.received is not None
        assert replica.manifest.received.claims == [Claim(10, 1, MIB)]


def test_what_was_said_of_a_pass_is_not_noted_of_the_next(store: Store) -> None:
    with opened(store) as replica:
        replica.begin(2, "old", based=True)
        number = replica.number
        replica.begin(2, "old", based=True)
        replica.checkpoint("old", 2, 1, MIB, of=number)
        assert replica.manifest.received is None
        replica.checkpoint("old", 2, 1, MIB, of=replica.number)
        assert replica.manifest.received is not None


@pytest.mark.parametrize("how", ["cut", "full"])
def test_what_came_after_a_comparison_survives_its_sequels(
    store: Store, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each of them has nothing left to compare and says so again, before it sends anything."""
    claims = [Claim(7, 1, MIB), Claim(8, 0, 512 << 10)]
    with opened(store) as replica:
        replica.begin(7, "new")
        replica.checkpoint("new", 7, 1, MIB)
        replica.write(0, 0, b"x" * (512 << 10))
        replica.checkpoint("new", 8, 0, 512 << 10)
    for sequel in (b"1" * 16, b"2" * 16):
        with opened(store) as replica, monkeypatch.context() as patched:
            before = replica.kept_bytes
            replica.begin(7, "new", continues=True)
            replica.write(1, 0, sequel * 4096)
            replica.checkpoint("new", 7, 1, MIB, sequel)
            if how == "full":
                patched.setattr(store.files, "write", full)
                with pytest.raises(FuseDiskError, match="no room for the rest of a pass"):
                    replica.write(1, 0, b"more")
        with opened(store) as replica:
            # What is noted with them is of now: it is what the next sequel begins with.
            assert (replica.claims, replica.kept) == (claims, sequel)
            assert replica.kept_bytes > before or not before
    with opened(store) as replica:
        replica.begin(7, "new", continues=True)
        replica.commit("new", 9)
        replica.apply()
    assert (store.path / "r/a").read_bytes() == b"x" * (512 << 10) + b"o" * (512 << 10)
    assert (store.path / "r/b").read_bytes() == b"2" * CHUNK + b"o" * (MIB - CHUNK)


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


class Slow:
    """Checkpoints of replicas, the first of which takes until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.noted: list[tuple[int, int, int]] = []
        checkpoint = Replica.checkpoint

        def slow(
            replica: Replica,
            generation: str,
            epoch: int,
            disk: int,
            offset: int,
            passed: bytes = b"",
            *,
            of: int | None = None,
        ) -> None:
            self.begun.set()
            self.go_on.wait()
            self.noted.append((epoch, disk, offset))
            checkpoint(replica, generation, epoch, disk, offset, passed, of=of)

        monkeypatch.setattr(Replica, "checkpoint", slow)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


async def say(replica: Replica, slow: Slow, *places: tuple[int, int, int]) -> None:
    """Say how far a pass is, all of it while the first of it is being noted."""
    async with trio.open_nursery() as nursery:
        reached = Reached(replica, nursery)
        for place in places:
            reached.note(m.Reached("new", *place))
            await trio.to_thread.run_sync(slow.begun.wait)
        slow.go_on.set()


@pytest.mark.trio
async def test_what_is_said_while_the_end_of_a_comparison_waits_leaves_it(
    store: Store, slow: Slow
) -> None:
    with opened(store) as replica:
        replica.begin(7, "new")
        after = [(8, 0, at * CHUNK) for at in range(1, 9)]
        await say(replica, slow, (7, 0, CHUNK), (7, 1, CHUNK), (7, 1, MIB), *after)
        # What a later one says too is not noted by itself.
        assert slow.noted == [(7, 0, CHUNK), (7, 1, MIB), after[-1]]
        assert replica.manifest.received is not None
        assert replica.manifest.received.claims == [Claim(7, 1, MIB), Claim(*after[-1])]


@pytest.mark.trio
async def test_only_so_much_waits_to_be_noted(store: Store, slow: Slow) -> None:
    with opened(store) as replica:
        replica.begin(7, "new")
        claims = [(7 + at, 0, CHUNK - at) for at in range(10 * CLAIMS_MAX)]
        await say(replica, slow, *claims)
        assert slow.noted == claims[: CLAIMS_MAX + 1]


@pytest.mark.trio
async def test_what_waits_goes_with_its_pass(store: Store, slow: Slow) -> None:
    with opened(store) as replica:
        async with trio.open_nursery() as nursery:
            reached = Reached(replica, nursery)
            replica.begin(7, "new")
            reached.note(m.Reached("new", 7, 0, CHUNK))
            await trio.to_thread.run_sync(slow.begun.wait)
            reached.note(m.Reached("new", 7, 1, MIB))
            replica.begin(8, "new")
            reached.note(m.Reached("new", 8, 0, CHUNK))
            slow.go_on.set()
        assert slow.noted == [(7, 0, CHUNK), (8, 0, CHUNK)]
        assert replica.manifest.received is not None
        assert replica.manifest.received.claims == [Claim(8, 0, CHUNK)]
