"""The redo journal: what it holds, what damage of it does, and that a full target loses nothing."""

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusedisk.errors import FuseDiskError
from replicator import messages as m
from replicator.files import Buffer, Files
from replicator.journal import JournalDamaged, JournalHeader, JournalWriter, read_journal
from replicator.manifest import JournalRef, ReplicaDisk, read_manifest
from replicator.receiver import _store
from replicator.records import Piece
from replicator.replica import Replica, TargetFull
from replicator.store import Store, list_replicas

SIZE = 3 * 4096
DISKS = [ReplicaDisk("a", SIZE, 4096), ReplicaDisk("b", 4096, 4096)]


@pytest.fixture(autouse=True)
def _no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files can be cloned there is no journal."""
    monkeypatch.setattr(Files, "can_clone", lambda *_: False)


def opened(store: Store) -> Replica:
    return Replica.open(store, "vm", "src", DISKS)


def images(path: Path) -> list[bytes]:
    return [(path / "vm" / disk.name).read_bytes() for disk in DISKS]


def fill(replica: Replica) -> None:
    replica.begin(1)
    replica.write(0, 0, b"1" * SIZE)
    replica.write(1, 0, b"1" * 4096)
    replica.commit("gen", 1)


def second(replica: Replica) -> None:
    replica.begin(2)
    replica.write(0, 10, b"2" * 5000)
    replica.zero(1, 0, 4096)
    replica.commit("gen", 2)


BEFORE = [b"1" * SIZE, b"1" * 4096]
AFTER = [b"1" * 10 + b"2" * 5000 + b"1" * (SIZE - 5010), bytes(4096)]


def committed(path: Path) -> Path:
    """A store whose second pass is committed and not applied; its journal."""
    with Store(path) as store, opened(store) as replica:
        fill(replica)
        second(replica)
        assert replica.manifest.committed == ("gen", 2)
    assert images(path) == BEFORE
    (journal,) = (path / "vm/.fusedisk/journal").iterdir()
    return journal


def test_committed_pass_is_applied_at_the_next_open(tmp_path: Path) -> None:
    journal = committed(tmp_path)
    (info,) = list_replicas(tmp_path)
    assert (info.state, info.epoch, info.applying) == ("following", 2, True)
    with Store(tmp_path) as store, opened(store) as replica:
        assert (replica.manifest.epoch, replica.manifest.applying) == (2, False)
        assert images(tmp_path) == AFTER
    assert not journal.exists()


def test_journal_of_disks_in_another_order_reaches_the_right_disks(tmp_path: Path) -> None:
    committed(tmp_path)
    with Store(tmp_path) as store, Replica.open(store, "vm", "src", DISKS[::-1]):
        assert images(tmp_path) == AFTER


def test_pass_that_was_cut_off_changes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store, opened(store) as replica:
        fill(replica)
        replica.begin(2)
        replica.write(0, 0, b"2" * SIZE)
        before = [s.digests for s in replica.hashes(0, 0, SIZE, 0)]
        replica.begin(2)
        replica.zero(0, 0, SIZE)
        assert [s.digests for s in replica.hashes(0, 0, SIZE, 0)] == before
    assert images(tmp_path) == BEFORE
    assert list((tmp_path / "vm/.fusedisk/journal").iterdir()) == []


def test_promoted_implies_applied(tmp_path: Path) -> None:
    committed(tmp_path)
    with Store(tmp_path) as store, opened(store) as replica:
        replica.begin(3)
        replica.write(1, 0, b"3" * 4096)
        replica.commit("gen", 3)
        replica.promote("token", 3)
        assert images(tmp_path) == [AFTER[0], b"3" * 4096]


def assert_damage_is_named_and_repaired(path: Path, log: pytest.LogCaptureFixture) -> None:
    log.clear()
    with Store(path) as store, opened(store) as replica:
        assert "journal" in log.text and "cannot be promoted" in log.text
        manifest = replica.manifest
        assert (manifest.state, manifest.epoch, manifest.applying) == ("filling", None, True)
        with pytest.raises(FuseDiskError, match="holds epoch None"):
            replica.promote("token", 2)
        replica.begin(3)
        for disk, content in enumerate(AFTER):
            replica.write(disk, 0, content)
        replica.commit("gen", 3)
    assert (read_manifest(path / "vm").state, images(path)) == ("following", AFTER)  # type: ignore[union-attr]


def test_any_damage_to_a_committed_journal_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = committed(tmp_path)
    good = journal.read_bytes()
    manifest = tmp_path / "vm/.fusedisk/manifest.json"
    record = manifest.read_bytes()
    ref = read_manifest(tmp_path / "vm").journal  # type: ignore[union-attr]
    assert ref is not None

    def damaged(content: bytes) -> bool:
        journal.write_bytes(content)
        try:
            list(read_journal(tmp_path / "vm", ref, "src", DISKS))
        except JournalDamaged as error:
            assert str(journal) in str(error) and "\n" not in str(error)
            return True
        return False

    assert not damaged(good)
    near = {*range(300), *range(len(good) - 250, len(good)), *range(0, len(good), 97)}
    for at in sorted(near):
        assert damaged(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]), at
        assert damaged(good[:at]), at

    caplog.set_level(logging.ERROR)
    for content in (good[:-1], good[:400] + b"\0" * 512 + good[912:], b"", b"x" * 99):
        manifest.write_bytes(record)
        journal.write_bytes(content)
        assert_damage_is_named_and_repaired(tmp_path, caplog)
    manifest.write_bytes(record)
    journal.unlink(missing_ok=True)
    assert_damage_is_named_and_repaired(tmp_path, caplog)


def test_damage_that_is_found_at_the_open_has_not_reached_the_images(tmp_path: Path) -> None:
    journal = committed(tmp_path)
    content = journal.read_bytes()
    journal.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with Store(tmp_path) as store, opened(store) as replica:
        assert replica.manifest.state == "filling"
    assert images(tmp_path) == BEFORE


def test_damage_is_found_by_the_process_that_wrote_the_journal(tmp_path: Path) -> None:
    with Store(tmp_path, keep="3") as store, opened(store) as replica:
        fill(replica)
        second(replica)
        (journal,) = (tmp_path / "vm/.fusedisk/journal").iterdir()
        journal.write_bytes(journal.read_bytes().replace(b"2" * 5000, b"2" * 4999 + b"x"))
        with pytest.raises(JournalDamaged, match="data of record 0 is not what was written"):
            replica.apply()
        assert replica.manifest.state == "filling"
        with pytest.raises(FuseDiskError, match="damaged journal; open it again"):
            replica.begin(3)


def test_all_but_a_little_of_a_pass_is_with_the_disk_before_each_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.writeback._STEP_BYTES", 4096)
    monkeypatch.setattr("replicator.undo._PENDING_MAX", 2)
    begun: dict[str, list[tuple[int, int]]] = {}

    class Noting(Files):
        def start_writeback(self, fd: int, offset: int, length: int) -> None:
            name = os.readlink(f"/proc/self/fd/{fd}").rpartition("/vm/")[2]
            begun.setdefault(name, []).append((offset, length))
            super().start_writeback(fd, offset, length)

    with Store(tmp_path, Noting(), "3") as store, opened(store) as replica:
        fill(replica)
        replica.begin(2)
        for at in (0, 4096, 8192):
            replica.write(0, at, b"2" * 4096)
        replica.commit("gen", 2)
        replica.apply()
    assert begun["a"] == [(0, 4096), (4096, 4096), (8192, 4096)]
    assert begun[".fusedisk/points/1"] == [(at * 4144, 4144) for at in range(3)]
    journal = begun[".fusedisk/journal/0"]
    assert [length for _, length in journal] == [4144] * 3 and journal[1][0] == sum(journal[0])


def test_format(tmp_path: Path) -> None:
    (tmp_path / ".fusedisk").mkdir()
    header = JournalHeader("00112233445566778899aabbccddeeff", "src", "gen", 1, 2)
    writer = JournalWriter(Files(), tmp_path, 1, header)
    writer.data([Piece(1, 5, memoryview(b"data"))])
    writer.zero(0, 4096, 8192)
    ref = writer.seal("gen", 2, 7.5)
    writer.close()
    assert ref == JournalRef(1, header.id, "gen", 2, 7.5)
    content = (tmp_path / ".fusedisk/journal/1").read_bytes()
    assert content[:16].hex() == "46445245444f310a010000006c000000"
    first = content.index(b"data") - 48
    assert content[first : first + 24].hex() == ("010001000000000005000000000000000400000000000000")
    second = first + 52
    assert content[second : second + 24].hex() == (
        "020000000000000000100000000000000020000000000000"
    )
    # All of it, checksums too: a change here is a change of the version.
    assert (
        hashlib.sha256(content).hexdigest()
        == "ecdafa5eda51ef1b408cdc0467e60ed3eb25f8115b46714772addd5f6e71b682"
    )
    assert list(read_journal(tmp_path, ref, "src", DISKS)) == [
        (1, 5, 4, b"data"),
        (0, 4096, 8192, None),
    ]
    with pytest.raises(JournalDamaged, match="not the one"):
        list(read_journal(tmp_path, ref, "other source", DISKS))


class Faulty(Files):
    """Calls `fault` before each operation; it may raise, or wait."""

    def __init__(self) -> None:
        self.fault: Callable[[str], None] = lambda _: None

    def create(self, path: Path) -> int:
        self.fault("create")
        return super().create(path)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self.fault("write" if len(buffers) == 1 else "append")
        return super().write(fd, buffers, offset)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        self.fault("reserve")
        super().reserve(fd, offset, length)

    def sync(self, fd: int) -> None:
        self.fault("sync")
        super().sync(fd)


def test_many_pieces_are_taken_in_order_at_once(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    class Noting(Files):
        def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
            calls.append(("write", len(buffers)))
            return super().write(fd, buffers, offset)

        def reserve(self, fd: int, offset: int, length: int) -> None:
            calls.append((f"reserve at {offset}", length))
            super().reserve(fd, offset, length)

    def pieces(*what: tuple[int, int, bytes]) -> list[Piece]:
        return [Piece(disk, at, memoryview(data)) for disk, at, data in what]

    with Store(tmp_path, Noting()) as store, opened(store) as replica:
        replica.begin(1)
        replica.write_many(pieces((0, 0, b"1" * SIZE), (1, 0, b"1" * 4096)))
        replica.commit("gen", 1)
        replica.begin(2)
        many = pieces((0, 0, b"a" * 4096), (0, 4096, b"b" * 4096), (0, 10, b"c"), (1, 9, b"d" * 9))
        calls.clear()
        replica.write_many(many)
        assert calls == [
            *(("reserve at 0", 8192), ("reserve at 10", 1), ("write", 6)),
            *(("reserve at 9", 9), ("write", 2)),
        ]
        with pytest.raises(FuseDiskError, match="are outside disk 'b'"):
            replica.write_many(pieces((0, 0, b"x"), (1, 4096, b"x")))
        replica.write_many(pieces(*((0, 8192 + at, b"e") for at in range(1500))))
        replica.commit("gen", 2)
        replica.apply()
    first = b"a" * 10 + b"c" + b"a" * 4085 + b"b" * 4096 + b"e" * 1500 + b"1" * (4096 - 1500)
    assert images(tmp_path) == [first, b"1" * 9 + b"d" * 9 + b"1" * 4078]


def test_a_receiver_keeps_the_order_of_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.receiver._PIECES_BYTES_MAX", 5000)
    taken: list[int] = []
    write_many = Replica.write_many

    def noting(self: Replica, pieces: Sequence[Piece]) -> None:
        taken.append(len(pieces))
        write_many(self, pieces)

    monkeypatch.setattr(Replica, "write_many", noting)
    parts = [m.Data.of(0, at, memoryview(b"a" * 4096)) for at in (0, 4096, 8192)]
    last = m.Data.of(0, 50, memoryview(b"b" * 10))
    with Store(tmp_path) as store, opened(store) as replica:
        replica.begin(1)
        _store(replica, [*parts, m.Zero(0, 0, 100), last])
        replica.commit("gen", 1)
    assert taken == [2, 1, 1]
    assert images(tmp_path)[0] == bytes(50) + b"b" * 10 + bytes(40) + b"a" * (SIZE - 100)


@pytest.mark.parametrize("where", ["create", "append", "reserve"])
def test_full_target_drops_the_pass_alone(tmp_path: Path, where: str) -> None:
    files = Faulty()

    def full(operation: str) -> None:
        if operation == where:
            raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path, files) as store, opened(store) as replica:
        fill(replica)
        files.fault = full
        with pytest.raises(TargetFull, match="target full"):
            second(replica)
        assert list((tmp_path / "vm/.fusedisk/journal").iterdir()) == []
        files.fault = lambda _: None
        assert replica.manifest.committed == ("gen", 1)
        assert images(tmp_path) == BEFORE
        second(replica)
        replica.apply()
    assert images(tmp_path) == AFTER


def test_next_pass_is_received_while_one_is_applied(tmp_path: Path) -> None:
    files = Faulty()
    applying, received = threading.Event(), threading.Event()
    with Store(tmp_path, files) as store, opened(store) as replica:
        fill(replica)
        second(replica)

        def hold(operation: str) -> None:
            if operation == "write" and threading.current_thread() is thread:
                applying.set()
                assert received.wait(60)

        thread = threading.Thread(target=replica.apply)
        files.fault = hold
        thread.start()
        assert applying.wait(60)
        replica.begin(3)
        replica.write(1, 0, b"3" * 4096)
        received.set()
        thread.join(60)
        replica.commit("gen", 3)
        replica.apply()
    assert images(tmp_path) == [AFTER[0], b"3" * 4096]


def test_a_pass_begun_while_the_one_before_is_cleared_away_keeps_its_journal(
    tmp_path: Path,
) -> None:
    files = Clearing()
    with Store(tmp_path, files) as store, opened(store) as replica:
        fill(replica)
        second(replica)

        def begin() -> None:
            replica.begin(3)
            replica.write(1, 0, b"3" * 4096)

        files.meanwhile = begin
        replica.apply()
        assert files.meanwhile is None
        replica.commit("gen", 3)
        replica.apply()
    assert images(tmp_path) == [AFTER[0], b"3" * 4096]


class Clearing(Files):
    """Does something between the record that a journal is applied and its removal."""

    meanwhile: Callable[[], None] | None = None

    def unlink(self, path: Path) -> None:
        if path.parent.name == "journal" and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        super().unlink(path)


def test_apply_that_failed_is_done_again(tmp_path: Path) -> None:
    files = Faulty()

    def failing(operation: str) -> None:
        if operation == "sync":
            raise OSError(errno.EIO, "Input/output error")

    with Store(tmp_path, files) as store:
        with opened(store) as replica:
            fill(replica)
            second(replica)
            files.fault = failing
            with pytest.raises(FuseDiskError, match="cannot sync image"):
                replica.apply()
            with pytest.raises(FuseDiskError, match="open it again"):
                replica.begin(3)
        files.fault = lambda _: None
        with opened(store) as replica:
            assert replica.manifest.epoch == 2
    assert images(tmp_path) == AFTER
