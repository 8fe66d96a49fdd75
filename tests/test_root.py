"""The root: what was sent and what was stored, compared as a link begins and as one promotes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from test_cut_pass import EitherKind
from test_cutover import BOUND, run
from test_cutover import Pair as CutoverPair
from test_replication import CHUNK, Pair, guest_write, pair
from test_takeover import link_to, shake_hands

from fusedisk.replicas import Root, read_record
from replicator import messages as m
from replicator.chain import Chain, fold
from replicator.files import Files
from replicator.link import Unequal
from replicator.manifest import ReplicaDisk, read_manifest, write_manifest
from replicator.receiver import Receiver
from replicator.replica import Replica
from replicator.senderlink import SenderLink
from replicator.store import Store
from replicator.transfers import TransferDigest

__all__ = ["pair"]

NONCE = b"n" * 16
FIRST, SECOND = m.Data.of(0, 0, b"1" * 4096), m.Zero(0, 8192, 4096)


def digest(*transfers: m.Data | m.Zero, kept: bytes = b"") -> TransferDigest:
    made = TransferDigest(kept)
    for transfer in transfers:
        made.add(transfer)
    return made


def opened(epoch: int, root: bytes | None, kept: bytes | None = None) -> m.Opened:
    return m.Opened("following", "gen", epoch, None, root=root, kept=kept)


def root_of(chain: Chain) -> bytes:
    promised = chain.promise()
    assert promised is not None
    return promised


def sent(chain: Chain, epoch: int, *, answered: bool = True) -> bytes:
    """A pass is sent; the root that a target has which stored it."""
    passed, begun = chain.begin("pass", continues=False)
    base = root_of(chain) if begun is None else begun
    chain.committing("gen", epoch, passed)
    if answered:
        chain.committed()
    return fold(base, "gen", epoch, passed)


def test_a_commit_whose_answer_was_lost_is_known_to_have_been_made_or_not() -> None:
    for made in (False, True):
        chain = Chain(Root("00" * 16, 3, whole=True))
        before, after = root_of(chain), sent(chain, 4, answered=False)
        assert chain.meet(opened(4, after) if made else opened(3, before), "gen")
        assert (root_of(chain), chain.proves) == (after if made else before, True)


@pytest.mark.parametrize("epoch", [3, 4])
def test_a_target_at_an_epoch_of_ours_by_another_way_is_not_believed(epoch: int) -> None:
    chain = Chain(Root("00" * 16, 3, whole=True))
    sent(chain, 4, answered=False)
    for _ in range(2):
        assert not chain.meet(opened(epoch, NONCE), "gen"), "nor the next time it connects"
        assert chain.root is not None, "a later process has to know it, too"
    _, anew = chain.begin("compare", continues=False)
    assert anew is not None
    chain.committing("gen", 5, digest())
    chain.committed()
    assert chain.proves


def test_a_target_whose_root_is_not_known_is_taken_up_without_proving_anything() -> None:
    for found in (opened(3, None), opened(9, NONCE), opened(2, NONCE)):
        chain = Chain(Root("00" * 16, 3, whole=True))
        assert chain.meet(found, "gen") and chain.promise() is None
        root = sent(chain, 10)
        assert (root_of(chain), chain.proves) == (root, False), "what follows is told apart"


def test_what_another_process_sent_of_a_pass_proves_nothing() -> None:
    for ours in (True, False):
        chain = Chain(Root("00" * 16, 3, whole=True))
        passed, _ = chain.begin("pass", continues=False)
        passed.add(FIRST)
        kept = passed.value()
        if ours:
            chain.checkpoint(kept)
        assert chain.meet(opened(3, bytes(16), kept), "gen")
        again, root = chain.begin("pass", continues=True)
        assert (again.value(), root) == (digest(kept=kept).value(), None)
        chain.committing("gen", 4, again)
        chain.committed()
        assert chain.proves == ours


async def commit(link: SenderLink, epoch: int, passed: TransferDigest) -> None:
    await link.send(m.Commit("generation", epoch, passed.count, passed.value()))
    await link.expect(m.Committed)


@pytest.fixture(params=["journal", "clones"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    files = EitherKind()
    files.clones = request.param == "clones"
    with Store(tmp_path, files) as made:
        yield made


@pytest.mark.trio
async def test_the_target_folds_what_it_stored_also_of_a_pass_that_was_cut_off(
    store: Store,
) -> None:
    receiver = Receiver(store)
    async with link_to(receiver) as link, trio.open_nursery() as nursery:
        nursery.start_soon(link.listen)
        assert (await shake_hands(link, "one")).root is None
        await link.send(m.Begin(1, "fill", root=NONCE), FIRST)
        await commit(link, 1, digest(FIRST))
        root = fold(NONCE, "generation", 1, digest(FIRST))
        part = digest(SECOND, FIRST)
        at = m.Reached("generation", 2, 0, 4096)
        await link.send(m.Begin(2, "pass"), SECOND, FIRST)
        await link.send(m.Checkpoint(at, part.count, part.value()))
        while (noted := read_manifest(store.path / "r")) is None or noted.received is None:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    async with link_to(receiver) as link, trio.open_nursery() as nursery:
        nursery.start_soon(link.listen)
        found = await shake_hands(link, "one")
        assert (found.root, found.kept) == (root, part.value())
        rest = digest(FIRST, kept=part.value())
        await link.send(m.Begin(3, "pass", 0, True), FIRST)
        await commit(link, 3, rest)
        root = fold(root, "generation", 3, rest)
        await link.send(m.Promote("token", 3, NONCE))
        with pytest.raises(Unequal, match="not what was sent"):
            await link.expect(m.Promoted)
        nursery.cancel_scope.cancel()
    async with link_to(receiver) as link, trio.open_nursery() as nursery:
        nursery.start_soon(link.listen)
        assert (await shake_hands(link, "one")).root == root
        await link.send(m.Promote("token", 3, root))
        await link.expect(m.Promoted)
        nursery.cancel_scope.cancel()


def test_going_back_to_a_point_makes_the_root_unknown(store: Store) -> None:
    store = Store(store.path, store.files, "9")
    with store, Replica.open(store, "r", "source", [ReplicaDisk("d", 1 << 20, CHUNK)]) as replica:
        for epoch in (1, 2):
            replica.begin(epoch, root=NONCE if epoch == 1 else None)
            replica.write(0, 0, bytes([epoch]))
            replica.commit("gen", epoch)
            replica.apply()
            assert replica.manifest.root is not None
        replica.roll_back(1)
        assert (replica.manifest.epoch, replica.manifest.root) == (1, None)


DROPPING = """
from replicator.cli import main
from replicator.replica import Replica
write, dropped = Replica._write, []
def forget(self, pieces):
    if not dropped:
        dropped.extend(p for p in pieces if p.data[:4] == b"lost")
        pieces = [p for p in pieces if p not in dropped]
    write(self, pieces)
Replica._write = forget
main()
"""


class Forgetful(CutoverPair):
    """Its receiver loses one write."""

    def receive(self) -> "subprocess.Popen[bytes]":
        words = ["receive", "--store", self.store, self.address]
        receiver = subprocess.Popen(
            [sys.executable, "-c", DROPPING, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert receiver.stdout is not None
        assert receiver.stdout.readline().startswith(b"listening on unix://")
        return receiver


def test_a_replica_that_lost_a_write_long_ago_is_not_promoted(tmp_path: Path, fuse: None) -> None:
    moved = Forgetful(tmp_path)
    try:
        moved.write(b"lost")
        moved.wait_until_committed()
        assert moved.replica.read_bytes()[:4] != b"lost"
        moved.write(b"later", 1 << 20)
        moved.wait_until_committed()
        cutover = ["replicator", "cutover", "--json", *BOUND, moved.mountpoint]
        result = run(*cutover, check=False)
        assert result.returncode == 5, result.stderr
        (line,) = result.stderr.splitlines()
        assert "not what was sent" in line and "the guest goes on" in line
        assert json.loads(result.stdout)["outcome"] == "rolled-back"
        moved.write(b"the guest goes on", 2 << 20)
        # The sender has compared, and sent it again.
        outcome = json.loads(run(*cutover).stdout)
        assert (outcome["outcome"], outcome["root"]) == ("promoted", "equal")
        assert moved.replica.read_bytes() == moved.image.read_bytes()
    finally:
        moved.close()


def test_a_store_that_was_put_back_is_compared(pair: Pair, tmp_path: Path) -> None:
    receiver = pair.receive()
    pair.once()
    guest_write(pair.mount.disk(), b"old" * 1000, 0)
    pair.once()
    shutil.copytree(pair.store / "r", tmp_path / "old")
    guest_write(pair.mount.disk(), b"new" * 1000, 9 * CHUNK)
    sender = pair.once()
    noted = read_record(pair.mount.state, "r")
    now = read_manifest(pair.store / "r")
    assert noted is not None and now is not None
    assert noted.root == Root(now.root or "", now.epoch or 0, whole=True)
    receiver.popen.terminate()
    receiver.wait()
    shutil.rmtree(pair.store / "r")
    shutil.copytree(tmp_path / "old", pair.store / "r")
    old = read_manifest(pair.store / "r")
    assert old is not None and old.epoch is not None and noted.epoch == now.epoch
    points = [*old.points[:-1], msgspec.structs.replace(old.points[-1], epoch=now.epoch)]
    faked = msgspec.structs.replace(old, epoch=now.epoch, points=points)
    write_manifest(Files(), pair.store / "r", faked)
    pair.receive()
    sender = pair.once()
    assert "not what was sent" in sender.said
    assert pair.identical()
