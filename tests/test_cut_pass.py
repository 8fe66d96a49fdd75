"""A pass to a replica that follows goes on after it was cut off, whoever died."""

import errno
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from proxy import Proxy
from test_clones import CopyingFiles, MakeFilesystem, filesystem
from test_cut_fill import UNDER_WAY, FailingFiles, guest_discard
from test_replication import CHUNK, Pair, Process, guest_write

from fusedisk.errors import FuseDiskError
from replicator.clones import clone_directory
from replicator.failures import failure_code
from replicator.journal import JournalDamaged, journal_directory
from replicator.manifest import CLAIMS_MAX, Claim, Received, ReplicaDisk, read_manifest
from replicator.received import with_claim
from replicator.replica import Replica
from replicator.store import Store

__all__ = ["filesystem"]

MIB = 1 << 20
SIZE = 64 * MIB
RATE = 8 * MIB


@pytest.fixture
def pair(
    filesystem: MakeFilesystem,
    tmp_path: Path,
    fuse: Callable[..., Mount],
    request: pytest.FixtureRequest,
) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    if request.param == "clones":
        made.store = filesystem("xfs") / "store"
        made.store.mkdir()
    made.mount.unmount()
    os.truncate(made.images[0], 0)
    os.truncate(made.images[0], SIZE)
    made.mount.mount()
    try:
        yield made
    finally:
        made.clean_up()


def received(store: Path) -> Received | None:
    manifest = read_manifest(store / "r")
    return None if manifest is None else manifest.received


def change_around(disk: Path, reached: int, number: int) -> int:
    """Write and discard before the place that was reached, in what is on its way, and beyond.

    Bytes that were changed, which are others for each ``number``.
    """
    places = (2 * CHUNK, reached + 2 * CHUNK, SIZE - 4 * CHUNK)
    for offset in places:
        guest_write(disk, b"x" * CHUNK, offset + 2 * number * CHUNK)
        guest_discard(disk, offset + (2 * number - 1) * CHUNK, CHUNK)
    return len(places) * 2 * CHUNK


def reached(pair: Pair) -> int:
    found = received(pair.store)
    # The farthest place, whatever later connections have sent again before it.
    return 0 if found is None else found.claims[0].offset


@pytest.mark.parametrize(
    ("pair", "cuts"),
    [("journal", ("link", "receiver")), ("clones", ("sender", "receiver"))],
    indirect=["pair"],
)
def test_a_pass_that_was_cut_off_goes_on(
    pair: Pair, cuts: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    receiver = pair.receive()
    pair.once()
    disk = pair.mount.disk()
    noise = random.Random(9)
    for offset in range(0, SIZE, 8 * MIB):
        guest_write(disk, noise.randbytes(8 * MIB), offset)
    before = written = 0
    with Proxy(pair.address, rate=RATE) as proxy:
        direct, pair.address = pair.address, proxy.address
        sender = pair.start()
        for number, what in enumerate(cuts):
            begun = before
            wait_for(lambda begun=begun: reached(pair) > begun, "a checkpoint is noted")
            said = 0 if what == "sender" else len(left(sender))
            if what == "link":
                proxy.down()
            else:
                (sender if what == "sender" else receiver).kill()
            before = reached(pair)
            kept = received(pair.store)
            assert kept is not None
            if "clones" in request.node.name:
                assert kept.clones == [0]
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
            wait_for(lambda one=sender, said=said: len(left(one)) > said, "it goes on")
            assert left(sender)[-1] <= SIZE - before // CHUNK * CHUNK + written
        pair.wait_identical()
        sent = pair.status()["sent"]["data_bytes"]
    # A sender that lived on counts what was on its way when it was cut off, too.
    assert sent <= SIZE + written + UNDER_WAY * len(cuts)
    wait_for(lambda: received(pair.store) is None, "it is committed")
    pair.stop(sender)


def left(sender: Process) -> list[int]:
    return [int(count) for count in re.findall(r"about (\d+) bytes are left", sender.said)]


def opened(store: Store, *names: str) -> Replica:
    return Replica.open(store, "r", "source", [ReplicaDisk(n, MIB, CHUNK) for n in names])


class EitherKind(CopyingFiles, FailingFiles):
    """Clones or has none, and can fail to sync."""


@pytest.fixture(params=["journal", "clones"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    files = EitherKind()
    files.clones = request.param == "clones"
    with Store(tmp_path, files) as made:
        with opened(made, "a", "b") as replica:
            replica.begin(1)
            replica.write(0, 0, b"old" * 100)
            replica.commit("gen", 1)
        yield made


def cut_off(store: Store) -> None:
    """A pass to epoch 3 that came to byte 4096 of the first disk."""
    with opened(store, "a", "b") as replica:
        replica.begin(3, "gen", based=True)
        replica.write(0, 0, b"new")
        replica.checkpoint("gen", 3, 0, 4096)
        replica.write(1, 0, b"not noted")


def content(store: Store) -> list[bytes]:
    return [(store.path / "r" / name).read_bytes()[:9] for name in ("a", "b")]


def test_a_pass_goes_on_from_what_was_noted(store: Store) -> None:
    cut_off(store)
    with opened(store, "a", "b") as replica:
        kept = replica.received
        assert kept is not None and kept.claims == [Claim(3, 0, 4096)]
        assert replica.hashes(1, 0, CHUNK, 0)[0].zero, "the point is what it was"
        replica.begin(5, "gen", continues=True, based=True)
        assert replica.received is None, "it is not offered twice"
        replica.write(0, 3, b"er")
        replica.checkpoint("gen", 5, 0, 1024)
        assert replica.manifest.received is not None
        assert replica.manifest.received.claims == [Claim(3, 0, 4096), Claim(5, 0, 1024)]
        assert replica.manifest.received.id == kept.id
    with opened(store, "a", "b") as replica:
        replica.begin(6, "gen", continues=True, based=True)
        replica.commit("gen", 6)
        replica.checkpoint("gen", 6, 0, 4096)
        replica.apply()
        assert replica.manifest.received is None
    assert content(store) == [b"newerdold", bytes(9)]


def test_a_pass_is_kept_for_its_own_sequel_alone(store: Store) -> None:
    cut_off(store)
    with opened(store, "b", "a") as replica:
        assert replica.received is None, "the disks are sent in another order"
    with opened(store, "a", "b") as replica:
        with pytest.raises(FuseDiskError, match="keeps no pass to go on with"):
            replica.begin(5, "another", continues=True, based=True)
        replica.begin(5, "gen", based=True)
        assert replica.manifest.received is None, "its files are another pass's now"
        replica.checkpoint("another", 5, 0, 4096)
        assert replica.manifest.received is None, "marks of another history say nothing"
        replica.commit("gen", 5)
    assert content(store)[0] == b"oldoldold"
    nothing = pytest.raises(FuseDiskError, match="keeps no pass to go on with")
    with opened(store, "a", "b") as replica, nothing:
        replica.begin(6, "gen", continues=True, based=True)


def test_a_store_that_is_moved_to_the_other_kind_keeps_no_pass(store: Store) -> None:
    cut_off(store)
    assert isinstance(store.files, EitherKind)
    store.files.clones = not store.files.clones
    with opened(store, "a", "b") as replica:
        assert replica.received is None
        replica.begin(5, "gen", based=True)
        replica.write(1, 0, b"all")
        replica.commit("gen", 5)
        replica.apply()
    assert content(store) == [b"oldoldold", b"all" + bytes(6)]
    assert not files_of_a_pass(store)


@pytest.mark.parametrize("how", ["promoted", "rolled back"])
def test_a_decision_ends_a_pass_that_is_kept(store: Store, how: str) -> None:
    store.keep = "3"
    with opened(store, "a", "b") as replica:
        replica.begin(2, "gen")
        replica.write(0, 0, b"two")
        replica.commit("gen", 2)
        replica.apply()
    cut_off(store)
    with Replica.load(store, "r") as replica:
        if how == "promoted":
            replica.take_over("token", force=False)
        else:
            replica.roll_back(replica.manifest.points[0].id)
    with Replica.load(store, "r") as replica:
        assert replica.manifest.received is None
    assert content(store)[0] == (b"twooldold" if how == "promoted" else b"oldoldold")


def test_a_sync_that_fails_notes_nothing(store: Store) -> None:
    assert isinstance(store.files, EitherKind)
    with opened(store, "a", "b") as replica:
        replica.begin(3, "gen", based=True)
        replica.write(0, 0, b"new")
        store.files.failing = True
        with pytest.raises(FuseDiskError) as caught:
            replica.checkpoint("gen", 3, 0, 4096)
        assert failure_code(caught.value) == "io"
        store.files.failing = False
    with opened(store, "a", "b") as replica:
        assert replica.received is None


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_target_keeps_what_was_noted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(store)
    with opened(store, "a", "b") as replica:
        replica.begin(5, "gen", continues=True, based=True)
        replica.write(0, 3, b"er")
        replica.checkpoint("gen", 5, 0, 1024)
        with monkeypatch.context() as patched:
            patched.setattr(store.files, "write", full)
            with pytest.raises(FuseDiskError, match="target full: no room for the rest of a pass"):
                replica.write(0, 0, b"more")
    with opened(store, "a", "b") as replica:
        assert replica.claims == [Claim(3, 0, 4096), Claim(5, 0, 1024)]
        replica.begin(6, "gen", continues=True, based=True)
        replica.write(1, 0, b"the rest")
        replica.commit("gen", 6)
        replica.apply()
    assert content(store) == [b"newerdold", b"the rest\0"]


@pytest.mark.parametrize("step", ["checkpoint", "commit"])
def test_what_was_noted_survives_a_step_without_room(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    cut_off(store)
    with opened(store, "a", "b") as replica:
        replica.begin(5, "gen", continues=True, based=True)
        with monkeypatch.context() as patched:
            patched.setattr(store.files, "write", full)
            with pytest.raises(FuseDiskError) as caught:
                if step == "commit":
                    replica.commit("gen", 5)
                else:
                    replica.checkpoint("gen", 5, 0, 8192)
            assert failure_code(caught.value) == "full"
    with opened(store, "a", "b") as replica:
        assert replica.claims == [Claim(3, 0, 4096)]
        replica.begin(6, "gen", continues=True, based=True)
        replica.commit("gen", 6)
        replica.apply()
    assert content(store)[0] == b"newoldold"


def test_a_pass_that_is_given_up_leaves_its_room_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have taken all of it, and to let go of it in the manifest takes some."""
    cut_off(store)
    with opened(store, "a", "b") as replica, monkeypatch.context() as patched:
        patched.setattr(store.files, "write", full)
        with pytest.raises(FuseDiskError) as caught:
            replica.begin(5, "gen", based=True)
        assert failure_code(caught.value) == "full"
        assert not files_of_a_pass(store)
    with opened(store, "a", "b") as replica:
        assert replica.received is None
        replica.begin(6, "gen", based=True)
        replica.write(1, 0, b"all")
        replica.commit("gen", 6)
        replica.apply()
    assert content(store) == [b"oldoldold", b"all" + bytes(6)]


def files_of_a_pass(store: Store) -> list[Path]:
    folders = clone_directory(store.path / "r"), journal_directory(store.path / "r")
    return [*folders[0].glob("next.*"), *folders[1].glob("[01]")]


@pytest.mark.parametrize("store", ["journal"], indirect=True)
def test_what_was_not_noted_of_a_pass_gives_its_room_back(store: Store) -> None:
    with opened(store, "a", "b") as replica:
        replica.begin(3, "gen", based=True)
        replica.write(0, 0, bytes(100) * 100)
        replica.checkpoint("gen", 3, 0, 16384)
        noted = replica.manifest.received
        replica.write(0, CHUNK, bytes(CHUNK))
    assert noted is not None
    (path,) = files_of_a_pass(store)
    assert path.stat().st_size > noted.length
    with opened(store, "a", "b") as replica:
        assert path.stat().st_size == noted.length == replica.kept_bytes
        assert replica.room_for_rest() > 0


@pytest.mark.parametrize("store", ["journal"], indirect=True)
@pytest.mark.parametrize("at", [8, -4096, -1, None])
def test_a_journal_that_was_kept_is_checked(store: Store, at: int | None) -> None:
    """Before it is committed, while the point before it is whole: so it costs that pass alone."""
    with opened(store, "a", "b") as replica:
        replica.begin(3, "gen", based=True)
        replica.write(0, 0, random.Random(1).randbytes(8192))
        replica.checkpoint("gen", 3, 0, 8192)
    (path,) = journal_directory(store.path / "r").iterdir()
    found = bytearray(path.read_bytes())
    found[len(found) // 50 if at is None else at] ^= 1
    path.write_bytes(found)
    with opened(store, "a", "b") as replica, pytest.raises(JournalDamaged) as caught:
        replica.begin(5, "gen", continues=True, based=True)
        replica.commit("gen", 5)
    assert failure_code(caught.value) == "damaged"
    with opened(store, "a", "b") as replica:
        assert (replica.received, replica.manifest.state) == (None, "following")
        replica.begin(6, "gen", based=True)
        replica.write(0, 0, b"new")
        replica.commit("gen", 6)
        replica.apply()
    assert content(store)[0] == b"newoldold"


def test_a_claim_replaces_those_that_it_reaches_beyond() -> None:
    claims: list[Claim] = []
    for claim in (Claim(3, 0, 4096), Claim(3, 1, 512), Claim(5, 0, 512), Claim(5, 0, 8192)):
        claims = with_claim(claims, claim)
    assert claims == [Claim(3, 1, 512), Claim(5, 0, 8192)]
    assert with_claim(claims, Claim(7, 1, 1024)) == [Claim(7, 1, 1024)]
    # Older, and so it says less of what was written since than a newer one that is nearer.
    assert with_claim(claims, Claim(2, 1, 1024)) == [Claim(2, 1, 1024), *claims]
    for less in (*claims, Claim(3, 1, 511), Claim(2, 1, 512), Claim(4, 0, 8192)):
        assert with_claim(claims, less) == claims
    for place in range(100, 0, -1):
        claims = with_claim(claims, Claim(200 - place, 0, place))
    assert len(claims) == CLAIMS_MAX and claims[0] == Claim(3, 1, 512)
