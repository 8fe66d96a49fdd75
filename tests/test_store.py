"""Stores and replicas, on real files; most steps are looked at again through a reopened store."""

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import xxhash
from manifests import edit_manifest

from fusedisk.errors import FuseDiskError
from replicator.files import Files
from replicator.manifest import ReplicaDisk, check_disk_name, read_manifest
from replicator.replica import Replica
from replicator.store import ReplicaBusy, Store, check_replica_name, list_replicas

BLOCK = 65536
SIZE = 16 * BLOCK + 512
DISKS = [ReplicaDisk("root", SIZE, BLOCK), ReplicaDisk("data.raw", 4 * BLOCK, BLOCK)]


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below `path`, to see that a refusal changed nothing."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None
        for p in path.rglob("*")
        if p.parent.name != ".locks"
    }


def fill(path: Path, name: str = "vm") -> None:
    with Store(path) as store, Replica.open(store, name, "src", DISKS) as replica:
        replica.begin(5)
        replica.write(0, BLOCK, b"x" * BLOCK)
        replica.commit("gen", 5)


def refused(path: Path, match: str, source: str = "src", disks: list[ReplicaDisk] = DISKS) -> None:
    with Store(path) as store:
        before = tree(path)
        with pytest.raises(FuseDiskError, match=match) as caught:
            Replica.open(store, "vm", source, disks)
        assert "\n" not in str(caught.value)
        assert tree(path) == before


def test_life_of_a_replica_reopened_at_each_step(tmp_path: Path) -> None:
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        assert replica.status == "new"
        assert replica.manifest.state == "filling"
        assert (tmp_path / "vm/root").stat().st_size == SIZE
        assert (tmp_path / "vm/root").stat().st_blocks == 0
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        assert replica.status == "existing"
        replica.begin(5)
        replica.write(0, SIZE - 3, b"end")
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        assert (replica.manifest.state, replica.manifest.applying) == ("filling", True)
        replica.commit("gen", 5)
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        manifest = replica.manifest
        assert (manifest.state, manifest.applying) == ("following", False)
        assert (manifest.generation, manifest.epoch) == ("gen", 5)
        with pytest.raises(FuseDiskError, match="begin a pass"):
            replica.write(0, 0, b"x")
        with pytest.raises(FuseDiskError, match="begin a pass"):
            replica.zero(0, 0, 1)
        replica.begin(6)
        assert not read_manifest(tmp_path / "vm").applying
        with pytest.raises(FuseDiskError, match="half received"):
            replica.promote("t", 5)
        with pytest.raises(FuseDiskError, match="cannot go back"):
            replica.commit("gen", 4)
        replica.commit("other", 1)
    with Store(tmp_path) as store, Replica.load(store, "vm") as replica:
        replica.abort("lost")
    with Store(tmp_path) as store, Replica.load(store, "vm") as replica:
        with pytest.raises(FuseDiskError, match="was aborted"):
            replica.promote("lost", 1)
        with pytest.raises(FuseDiskError, match="holds epoch 1, not 2"):
            replica.promote("won", 2)
        replica.promote("won", 1)
        replica.promote("won", 1)
    refused(tmp_path, "was promoted")
    (tmp_path / "vm/root").write_bytes(b"the guest's now")
    with Store(tmp_path) as store, Replica.load(store, "vm") as replica:
        replica.promote("won", 1)
        with pytest.raises(FuseDiskError, match="another cutover"):
            replica.promote("other", 1)
        with pytest.raises(FuseDiskError, match="go on at the target"):
            replica.abort("won")
        for change in (
            lambda: replica.write(0, 0, b"x"),
            lambda: replica.zero(0, 0, 1),
            lambda: replica.begin(2),
            lambda: replica.commit("other", 2),
        ):
            with pytest.raises(FuseDiskError, match="is promoted"):
                change()
    assert (tmp_path / "vm/root").read_bytes() == b"the guest's now"
    assert list_replicas(tmp_path)[0].state == "promoted"


def test_filling_is_not_promoted(tmp_path: Path) -> None:
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        with pytest.raises(FuseDiskError, match="not"):
            replica.promote("t", 0)
        assert replica.manifest.state == "filling"


def test_last_sixteen_aborts_are_kept(tmp_path: Path) -> None:
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        for number in range(20):
            replica.abort(f"t{number}")
            replica.abort(f"t{number}")
    assert read_manifest(tmp_path / "vm").aborted_tokens == [f"t{n}" for n in range(4, 20)]


def test_images_without_a_manifest_are_adopted(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm/root").write_bytes(b"o" * SIZE)
    refused(tmp_path, "data.raw is missing")
    (tmp_path / "vm/data.raw").write_bytes(b"o" * 4)
    refused(tmp_path, "has 4 bytes")
    (tmp_path / "vm/data.raw").write_bytes(b"o" * 4 * BLOCK)
    assert [i.state for i in list_replicas(tmp_path)] == ["unmanaged"]
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        assert replica.status == "existing"
        assert (replica.manifest.state, replica.manifest.epoch) == ("filling", None)
        replica.begin(1)
        replica.zero(0, 0, SIZE)
        replica.commit("gen", 1)
        assert replica.hashes(0, 0, 16 * BLOCK, 0) == [(0, 16 * BLOCK, True, b"")]
    assert (tmp_path / "vm/root").read_bytes() == bytes(SIZE)
    # A filesystem keeps the block that the disk fills only in part.
    assert (tmp_path / "vm/root").stat().st_blocks * 512 < BLOCK
    assert (tmp_path / "vm/data.raw").read_bytes() == b"o" * 4 * BLOCK


def test_refusals_change_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    refused(tmp_path, "belongs to source 'src', not to 'else'", source="else")
    refused(tmp_path, "has disks 'data.raw', 'root' but", disks=DISKS[:1])
    grown = [DISKS[0], ReplicaDisk("data.raw", 5 * BLOCK, BLOCK)]
    refused(tmp_path, "'data.raw' of replica 'vm' has", disks=grown)
    refused(tmp_path, "named twice", disks=[DISKS[0], DISKS[0]])
    refused(tmp_path, "at least one", disks=[])
    refused(tmp_path, "chunk size", disks=[ReplicaDisk("root", SIZE, 5000)])
    (tmp_path / "vm/root").rename(tmp_path / "moved")
    refused(tmp_path, "root is missing")
    assert list_replicas(tmp_path)[0].state == "damaged"
    (tmp_path / "vm/root").symlink_to(tmp_path / "moved")
    refused(tmp_path, "cannot open image")


def test_order_of_disks_follows_the_source(tmp_path: Path) -> None:
    fill(tmp_path)
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS[::-1]) as replica:
        assert replica.manifest.epoch == 5
        assert replica.hashes(0, 0, 4 * BLOCK, 0)[0].zero
    assert read_manifest(tmp_path / "vm").disks == DISKS


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "5"},
        {"epoch": -1},
        {"epoch": None},
        {"state": "promoted"},
        {"token": "t"},
        {"state": "odd"},
        {"surplus": 1},
        {"disks": []},
        {"disks": [{"name": "../x", "size": 1, "chunk_size": 4096}]},
        {"aborted_tokens": ["t"] * 17},
        {"version": 4},
        {"journal": {"slot": 0, "id": "0" * 32, "generation": "g", "epoch": 6, "time": 0}},
        {"applying": True},
        {"keep": "7x"},
        {"points": [{"id": 9, "generation": "g", "epoch": 1, "time": 0}]},
    ],
)
def test_bad_manifest_is_refused_and_listed(tmp_path: Path, change: dict[str, object]) -> None:
    fill(tmp_path)
    path = tmp_path / "vm/.fusedisk/manifest.json"
    edit_manifest(path, change)
    refused(tmp_path, "has version 4" if "version" in change else "is damaged")
    (info,) = list_replicas(tmp_path)
    assert info.state == "damaged"
    assert info.problem


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[]", b'{"version":2}', b"[" * 99999])
def test_garbage_manifest_is_refused_and_listed(tmp_path: Path, raw: bytes) -> None:
    fill(tmp_path)
    (tmp_path / "vm/.fusedisk/manifest.json").write_bytes(raw)
    refused(tmp_path, "is damaged")
    (info,) = list_replicas(tmp_path)
    assert (info.state, info.size, info.allocated) == ("damaged", SIZE + 4 * BLOCK, BLOCK)


def test_listing(tmp_path: Path) -> None:
    fill(tmp_path, "b")
    fill(tmp_path, "a")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "empty").mkdir()
    with Store(tmp_path):
        infos = list_replicas(tmp_path)
    assert [i.name for i in infos] == ["a", "b"]
    total = SIZE + 4 * BLOCK
    assert infos[0][1:] == ("following", total, BLOCK, 5, "gen", False, None, 1)
    with pytest.raises(FuseDiskError, match="not a directory"):
        list_replicas(tmp_path / "none")


def test_hashes_cover_the_range_in_aligned_segments(tmp_path: Path) -> None:
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        replica.write(0, 2 * BLOCK + 9, b"x")
        replica.write(0, 3 * BLOCK, b"y" * BLOCK)
        replica.write(0, SIZE - 1, b"z")
        segments = replica.hashes(0, 0, SIZE, 7)
        blocks = [bytes(9) + b"x" + bytes(BLOCK - 10), b"y" * BLOCK]
        digests = b"".join(xxhash.xxh3_128_digest(b, 7) for b in blocks)
        tail = xxhash.xxh3_128_digest(bytes(511) + b"z", 7)
        assert segments == [
            (0, 2 * BLOCK, True, b""),
            (2 * BLOCK, 2 * BLOCK, False, digests),
            (4 * BLOCK, 12 * BLOCK, True, b""),
            (16 * BLOCK, 512, False, tail),
        ]
        assert replica.hashes(0, 0, 0, 7) == []
        for offset, length in [(1, BLOCK), (0, 5)]:
            with pytest.raises(FuseDiskError, match="multiple"):
                replica.hashes(0, offset, length, 7)
        with pytest.raises(FuseDiskError, match="power of two"):
            replica.hashes(0, 0, BLOCK, 7, block=0)


def test_ranges_are_checked(tmp_path: Path) -> None:
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        for offset in (-1, SIZE, 2**63 - 1, 2**64):
            with pytest.raises(FuseDiskError, match="outside disk 'root'"):
                replica.write(0, offset, b"x")
            with pytest.raises(FuseDiskError, match="outside disk 'root'"):
                replica.zero(0, offset, 1)
        with pytest.raises(FuseDiskError, match="outside"):
            replica.zero(0, 1, -1)
        for disk in (-1, 2):
            with pytest.raises(FuseDiskError, match="no disk number"):
                replica.write(disk, 0, b"x")
    assert (tmp_path / "vm/root").stat().st_size == SIZE


def test_zero_without_punching_writes_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(Files, "punch", unsupported)
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        replica.write(0, 0, b"x" * SIZE)
        replica.zero(0, 1, SIZE - 2)
    assert (tmp_path / "vm/root").read_bytes() == b"x" + bytes(SIZE - 2) + b"x"


def test_failed_sync_is_not_committed_nor_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Store(tmp_path) as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            replica.begin(1)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", failing)
                with pytest.raises(FuseDiskError, match="cannot sync image"):
                    replica.commit("gen", 1)
            with pytest.raises(FuseDiskError, match="open it again"):
                replica.commit("gen", 1)
        with Replica.open(store, "vm", "src", DISKS) as replica:
            assert (replica.manifest.applying, replica.manifest.epoch) == (True, None)


def test_one_process_and_one_session_for_a_replica(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        replica = Replica.open(store, "vm", "src", DISKS)
        with Store(tmp_path) as other:
            for attempt in (Replica.load, partial(Replica.open, source_id="src", disks=DISKS)):
                with pytest.raises(ReplicaBusy, match="in use by another process"):
                    attempt(other, "vm")
            Replica.open(other, "another", "src", DISKS).close()
        with pytest.raises(FuseDiskError, match="in use by another session"):
            Replica.open(store, "vm", "src", DISKS)
        with pytest.raises(FuseDiskError, match="open replicas: vm"):
            store.close()
        replica.close()
        replica.close()
        with pytest.raises(FuseDiskError, match="is closed"):
            replica.write(0, 0, b"x")
        with pytest.raises(FuseDiskError, match="no replica 'other'"):
            Replica.load(store, "other")
    Store(tmp_path).close()
    with pytest.raises(FuseDiskError, match="is closed"):
        Replica.open(store, "vm", "src", DISKS)


def test_leftover_of_an_interrupted_creation_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".new-vm").mkdir()
    (tmp_path / ".new-vm/root").write_bytes(b"half")
    (tmp_path / "vm").mkdir()
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        assert replica.status == "new"
    assert not (tmp_path / ".new-vm").exists()


def test_names() -> None:
    for good in ("a", "A-1_b.c", "x" * 64):
        check_replica_name(good)
    for bad in ("", ".a", "-a", "a/b", "x" * 65, "a\n", "ä"):
        with pytest.raises(FuseDiskError, match="replica name"):
            check_replica_name(bad)
    for good in ("a b", "ä", ".hidden", "x" * 200):
        check_disk_name(good)
    for bad in ("", ".", "..", "a/b", "a\0", "a\n", ".fusedisk", ".fusedisk2", "é" * 101, "\udc80"):
        with pytest.raises(FuseDiskError, match="disk name"):
            check_disk_name(bad)


def test_a_fill_that_is_no_instant_is_no_point_and_is_not_promoted(tmp_path: Path) -> None:
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        replica.begin(5)
        replica.write(0, 0, b"x")
        replica.commit("gen", 5, consistent=False)
        assert (replica.manifest.state, replica.manifest.epoch) == ("filling", 5)
        assert replica.manifest.points == []
        with pytest.raises(FuseDiskError, match="first fill"):
            replica.promote("token", 5)
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS) as replica:
        # Known after a restart: the next pass goes on from there.
        assert replica.manifest.committed == ("gen", 5)
        replica.begin(6)
        replica.commit("gen", 6)
        assert (replica.manifest.state, len(replica.manifest.points)) == ("following", 1)
        replica.begin(7)
        replica.write(0, 0, b"y")
        with pytest.raises(FuseDiskError, match="one instant"):
            replica.commit("gen", 7, consistent=False)
