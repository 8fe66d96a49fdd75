"""A first copy that is cut off goes on from where it was, whoever died."""

import errno
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from manifests import edit_manifest
from proxy import Proxy
from test_replication import CHUNK, Pair, guest_write

from fusedisk.errors import FuseDiskError
from replicator.failures import failure_code
from replicator.files import Files
from replicator.manifest import Claim, ReplicaDisk, read_manifest
from replicator.replica import Replica
from replicator.store import Store

MIB = 1 << 20
SIZE = 96 * MIB
RATE = 8 * MIB
# What is on its way at most: in sockets, whose buffers grow, in the receiver's queue, in batches.
UNDER_WAY = 40 * MIB
# The copy is cut off once a restart from the begin would send more than that again.
CUT = 44 * MIB


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    made.mount.unmount()
    made.images[0].write_bytes(random.Random(5).randbytes(SIZE))
    made.mount.mount()
    try:
        yield made
    finally:
        made.clean_up()


def guest_discard(path: Path, offset: int, length: int) -> None:
    subprocess.run(
        ["fallocate", "--punch-hole", "-o", str(offset), "-l", str(length), path], check=True
    )


def reached(pair: Pair) -> int:
    manifest = read_manifest(pair.store / "r") if (pair.store / "r").is_dir() else None
    return manifest.filled.offset if manifest is not None and manifest.filled is not None else 0


@pytest.mark.parametrize("what", ["receiver", "sender", "link"])
def test_a_fill_that_was_cut_off_goes_on(pair: Pair, what: str) -> None:
    receiver = pair.receive()
    with Proxy(pair.address, rate=RATE) as proxy:
        direct, pair.address = pair.address, proxy.address
        sender = again = pair.start()
        wait_for(lambda: reached(pair) >= CUT, "a checkpoint is noted")
        if what == "link":
            proxy.down()
        else:
            (receiver if what == "receiver" else sender).kill()
        before = reached(pair)
        # Before the point that was reached, in what is on its way, and beyond.
        with_holes = pair.mount.disk()
        for offset in (2 * CHUNK, before + 2 * CHUNK, SIZE - 2 * CHUNK):
            guest_write(with_holes, b"x" * CHUNK, offset)
            guest_discard(with_holes, offset - CHUNK, CHUNK)
        proxy.rate = None
        if what == "link":
            proxy.heal()
        elif what == "receiver":
            pair.address = direct
            pair.receive()
        else:
            again = pair.start()
        wait_for(lambda: "the first copy was cut off at byte" in again.said, "it goes on")
        pair.wait_following(again)
        pair.wait_identical()
        compared = re.findall(r"comparing (\d+) bytes, because the first copy", again.said)
        total = sum(image.stat().st_size for image in pair.images)
        assert int(compared[0]) <= total - before // CHUNK * CHUNK
        # A sender counts for itself; one that lived on lost at most what was on its way.
        sent = pair.status()["sent"]["data_bytes"]
        changed = 3 * CHUNK
        assert sent <= changed + total + (-before if what == "sender" else UNDER_WAY)
        manifest = read_manifest(pair.store / "r")
        assert manifest is not None and (manifest.state, manifest.filled) == ("following", None)
        assert pair.status()["cause"] is None
        pair.stop(again)


def test_the_pass_after_a_fill_goes_on_too(pair: Pair) -> None:
    """What a guest wrote during a long fill is as long to send."""
    receiver = pair.receive()
    with Proxy(pair.address, rate=RATE) as proxy:
        direct, pair.address = pair.address, proxy.address
        sender = pair.start()
        wait_for(lambda: reached(pair) > 0, "the fill goes on")
        noise = random.Random(6)
        for offset in range(0, SIZE, 8 * MIB):
            guest_write(pair.mount.disk(), noise.randbytes(8 * MIB), offset)
        proxy.rate = None
        wait_for(lambda: based(pair) is None and epoch(pair) is not None, "the fill is committed")
        proxy.rate = RATE
        wait_for(lambda: (based(pair) or 0) >= CUT, "a checkpoint of the pass is noted")
        receiver.kill()
        before = based(pair)
        assert before is not None
        guest_write(pair.mount.disk(), b"x" * CHUNK, 2 * CHUNK)
        proxy.rate = None
        pair.address = direct
        pair.receive()
        wait_for(lambda: "going on with a pass" in sender.said, "it goes on")
        pair.wait_identical()
        left = re.findall(r"about (\d+) bytes are left", sender.said)
        assert int(left[0]) <= SIZE - before // CHUNK * CHUNK + CHUNK
        pair.stop(sender)


def based(pair: Pair) -> int | None:
    manifest = read_manifest(pair.store / "r")
    filled = None if manifest is None else manifest.filled
    return filled.offset if filled is not None and filled.based else None


def epoch(pair: Pair) -> int | None:
    manifest = read_manifest(pair.store / "r")
    return None if manifest is None else manifest.epoch


def opened(store: Store, *names: str) -> Replica:
    return Replica.open(store, "r", "source", [ReplicaDisk(n, MIB, CHUNK) for n in names])


def test_a_checkpoint_counts_for_its_own_pass_alone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with opened(store, "a", "b") as replica:
            replica.checkpoint("gen", 3, 0, 0)
            assert replica.filled is None, "no pass was begun"
            replica.begin(3)
            replica.write(0, 0, b"data")
            replica.checkpoint("gen", 3, 1, 4096)
            replica.checkpoint("gen", 4, 1, 8192)
        with opened(store, "b", "a") as replica:
            assert replica.filled is None, "the disks are sent in another order"
        with opened(store, "a", "b") as replica:
            filled = replica.filled
            assert filled is not None and (filled.epoch, filled.disk, filled.offset) == (3, 1, 4096)
            replica.begin(3, "gen")
            assert replica.filled == filled
            replica.begin(3, "another")
            assert replica.filled is None, "nothing is claimed of images that take another pass"
            replica.checkpoint("gen", 3, 1, 4096)
            replica.begin(5, "gen")
            assert replica.filled is None
            replica.checkpoint("gen", 5, 0, 4096)
            replica.commit("gen", 5, consistent=False)
            replica.checkpoint("gen", 5, 0, 8192)
            assert replica.filled is None, "the fill is complete"
            replica.begin(6, "gen")
            replica.checkpoint("gen", 6, 0, 4096)
            replica.commit("gen", 6)
            replica.checkpoint("gen", 6, 0, 8192)
            assert replica.filled is None
        with opened(store, "a", "b") as replica:
            assert (replica.manifest.state, replica.filled) == ("following", None)


def test_a_manifest_with_a_checkpoint_but_no_fill_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with opened(store, "a") as replica:
            replica.begin(3)
            replica.checkpoint("gen", 3, 0, 4096)
        file = tmp_path / "r/.fusedisk/manifest.json"
        edit_manifest(file, {"applying": False})
        with pytest.raises(Exception, match="where none is under way"):
            opened(store, "a")


def test_a_replica_taken_by_force_amid_a_fill_can_be_read_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with opened(store, "a") as replica:
            replica.begin(3)
            replica.checkpoint("gen", 3, 0, 4096)
            replica.take_over("token", force=True)
        with Replica.load(store, "r") as replica:
            assert (replica.manifest.state, replica.filled) == ("promoted", None)


def test_a_failed_sync_notes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path, FailingFiles()) as store:
        with opened(store, "a") as replica:
            replica.begin(3)
            replica.write(0, 0, b"data")
            assert isinstance(store.files, FailingFiles)
            store.files.failing = True
            with pytest.raises(FuseDiskError) as caught:
                replica.checkpoint("gen", 3, 0, 4096)
            assert failure_code(caught.value) == "io", "the sender tries again"
            store.files.failing = False
        with opened(store, "a") as replica:
            assert replica.filled is None


class FailingFiles(Files):
    failing = False

    def sync(self, fd: int) -> None:
        if self.failing:
            raise OSError(errno.EIO, "Input/output error")
        super().sync(fd)


def test_a_pass_from_a_base_keeps_its_farthest_claim(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with opened(store, "a", "b") as replica:
            replica.begin(1, "gen")
            replica.commit("gen", 1, consistent=False)
            replica.begin(2, "gen", based=True)
            replica.checkpoint("another", 3, 1, 4096)
            assert replica.claims == [], "marks of another history say nothing"
            replica.checkpoint("gen", 3, 1, 4096)
        with opened(store, "a", "b") as replica:
            assert replica.claims == [Claim(3, 1, 4096)]
            replica.begin(4, "gen", based=True, continues=True)
            replica.checkpoint("gen", 5, 0, 4096, b"later")
            assert replica.claims == [Claim(3, 1, 4096)], "it goes on from there"
            assert replica.kept == b"later"
            replica.checkpoint("gen", 5, 1, 4096)
            assert replica.claims == [Claim(5, 1, 4096)]
        for again in ({"based": True}, {"continues": True}):
            with opened(store, "a", "b") as replica:
                assert replica.claims
                replica.begin(6, "gen", **again)
                assert replica.claims == [], "the images take what is no sequel"
                replica.begin(7, "gen", based=True)
                replica.checkpoint("gen", 7, 1, 4096)
