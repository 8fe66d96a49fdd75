"""Verify: what differs is found, what is only newer never counts as differing."""

import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio
import xxhash
from conftest import Mount, wait_for
from manifests import edit_manifest
from test_replication import CHUNK, REPLICATOR, SIZES, Pair, Process, guest_write

from fusedisk.changemap import ChangeMap
from fusedisk.errors import FuseDiskError
from replicator import verify
from replicator.messages import HASH_BLOCK_BYTES, Opened, Segment

TOTAL = sum(SIZES)


class Verified(Pair):
    """A pair of two disks whose replica is compared; with and without a running sender."""

    def verify(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [REPLICATOR, "verify", "--name", "r", *options, str(self.mount.mountpoint)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in result.stderr
        return result

    def findings(self, *options: str) -> dict[str, Any]:
        result = self.verify("--json", *options)
        assert result.returncode in (0, 5), result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        assert (result.returncode == 5) == (found["outcome"] == "differs")
        assert found["compared_bytes"] + found["left_out_bytes"] == TOTAL
        return found

    def fails(self, code: int, reason: str, *options: str) -> None:
        result = self.verify(*options)
        assert (result.returncode, result.stdout) == (code, ""), result.stdout
        (line,) = result.stderr.splitlines()
        assert reason in line

    def flip(self, index: int, offset: int) -> None:
        """Damage one byte of the replica behind everybody's back."""
        with self.replica(index).open("r+b") as file:
            file.seek(offset)
            (before,) = file.read(1)
            file.seek(offset)
            file.write(bytes([before ^ 1]))

    def follow(self) -> Process:
        sender = self.start()
        self.wait_following(sender)
        return sender

    def wait_caught_up(self) -> None:
        wait_for(lambda: self.status()["lag"]["chunks"] == 0, "nothing is left to send")

    def hold(self, sender: Process) -> subprocess.Popen[str]:
        """A verify that is far too slow to end; returns once it is under way."""
        command = [REPLICATOR, "verify", "--bandwidth", "4KiB", str(self.mount.mountpoint)]
        client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: self.status()["progress"]["phase"] == "verify", "it compares")
        except BaseException:
            client.kill()
            raise
        return client


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Verified]:
    made = Verified(tmp_path, fuse)
    try:
        yield made
    finally:
        made.clean_up()


@pytest.fixture(params=["sender", "no sender"])
def synced(pair: Verified, request: pytest.FixtureRequest) -> Verified:
    """A complete replica that a sender follows, or one that is left alone."""
    pair.receive()
    if request.param == "sender":
        pair.follow()
    else:
        pair.once()
    return pair


def test_equal(synced: Verified) -> None:
    found = synced.findings()
    epoch = synced.status()["epoch"]["committed"]
    assert found == {
        "outcome": "equal",
        "compared_bytes": TOTAL,
        "left_out_bytes": 0,
        "left_out_chunks": 0,
        "epoch": epoch,
        "differing_bytes": 0,
        "differing_ranges": 0,
        "repaired_bytes": 0,
        "differing": [],
    }
    result = synced.verify()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        f"equal: {TOTAL} bytes compared, 0 left out because they changed since epoch {epoch}\n"
    )


@pytest.mark.parametrize(
    ("index", "offset", "start", "length"),
    [
        (0, 0, 0, CHUNK),
        (0, 9 * CHUNK + 77, 9 * CHUNK, CHUNK),
        (1, 5 * CHUNK - 1, 4 * CHUNK, CHUNK),
        (0, SIZES[0] - 1, 40 * CHUNK, 4608),
        (1, SIZES[1] - 1, 17 * CHUNK, 512),
    ],
    ids=["first", "middle", "hole", "last", "last of the second"],
)
def test_a_flipped_byte_is_found(
    synced: Verified, index: int, offset: int, start: int, length: int
) -> None:
    synced.flip(index, offset)
    found = synced.findings()
    name = synced.images[index].name
    assert found["differing"] == [{"disk": name, "offset": start, "length": length}]
    assert (found["differing_ranges"], found["differing_bytes"]) == (1, length)
    result = synced.verify()
    assert result.returncode == 5
    assert result.stdout.splitlines()[1:] == [f"{name} offset {start} length {length}"]
    synced.flip(index, offset)
    assert synced.findings()["outcome"] == "equal"


def test_data_lost_from_the_replica_is_found(synced: Verified) -> None:
    size = SIZES[0]
    os.truncate(synced.replica(0), 9 * CHUNK)
    os.truncate(synced.replica(0), size)
    found = synced.findings()["differing"]
    assert [(r["offset"], r["length"]) for r in found] == [
        (9 * CHUNK, 2 * CHUNK),
        (40 * CHUNK, 4608),
    ]


def test_small_steps_find_the_same(synced: Verified) -> None:
    for offset in (10 * CHUNK - 1, 10 * CHUNK, 30 * CHUNK):
        synced.flip(0, offset)
    synced.flip(1, 0)
    found = synced.findings("--bandwidth", "4MiB")
    assert [(r["disk"], r["offset"], r["length"]) for r in found["differing"]] == [
        ("disk0.img", 9 * CHUNK, 2 * CHUNK),
        ("disk0.img", 30 * CHUNK, CHUNK),
        ("disk1.img", 0, CHUNK),
    ]


@pytest.mark.parametrize(
    ("chunk_size", "chunks", "left_out"),
    [("4KiB", 2, CHUNK), ("64KiB", 1, CHUNK), ("1MiB", 1, 16 * CHUNK)],
)
def test_changed_chunks_are_left_out(
    pair: Verified, chunk_size: str, chunks: int, left_out: int
) -> None:
    pair.mount.unmount()
    pair.mount.mount("--chunk-size", chunk_size)
    pair.receive()
    pair.once()
    guest_write(pair.mount.disk(), b"n" * 100, 20 * CHUNK + 4096 - 50)
    pair.flip(0, 20 * CHUNK + 9000)
    found = pair.findings()
    assert found["outcome"] == "equal"
    assert (found["left_out_chunks"], found["left_out_bytes"]) == (chunks, left_out)
    assert f", {left_out} left out because" in pair.verify().stdout
    pair.flip(0, 33 * CHUNK)
    found = pair.findings()
    assert [r["offset"] for r in found["differing"]] == [33 * CHUNK]
    assert found["left_out_bytes"] == left_out


def test_a_busy_writer_is_never_a_difference(pair: Verified) -> None:
    pair.receive()
    pair.follow()
    stop = threading.Event()
    noise = random.Random(5)

    def write() -> None:
        fds = [os.open(pair.mount.disk(i), os.O_WRONLY) for i in range(2)]
        try:
            while not stop.is_set():
                index = noise.randrange(2)
                offset = noise.randrange(SIZES[index] - 512) // 512 * 512
                os.pwrite(fds[index], noise.randbytes(512), offset)
        finally:
            for fd in fds:
                os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [pair.findings("--bandwidth", "8MiB") for _ in range(4)]
        found += [pair.findings() for _ in range(4)]
    finally:
        stop.set()
        writer.join()
    assert [f["differing"] for f in found] == [[]] * 8
    assert any(f["left_out_chunks"] for f in found)
    assert found[-1]["epoch"] > found[0]["epoch"]

    pair.wait_caught_up()
    assert pair.findings()["left_out_bytes"] == 0
    pair.flip(0, 12 * CHUNK)
    assert pair.findings()["differing_bytes"] == CHUNK


def test_epochs_go_on_and_progress_shows_meanwhile(pair: Verified) -> None:
    pair.receive()
    sender = pair.follow()
    client = pair.hold(sender)
    try:
        assert pair.status()["state"] == "following"
        assert pair.status()["progress"]["total"] == TOTAL
        guest_write(pair.mount.disk(), b"m" * CHUNK, 22 * CHUNK)
        pair.wait_identical()
        assert client.poll() is None
        pair.fails(1, "another verify")
    finally:
        client.kill()
        client.communicate()
    wait_for(lambda: pair.status()["progress"]["phase"] != "verify", "nobody waits any more")
    assert pair.findings()["outcome"] == "equal"
    pair.stop(sender)


def test_a_lost_receiver_ends_verify_and_not_the_sender(pair: Verified) -> None:
    receiver = pair.receive()
    sender = pair.follow()
    client = pair.hold(sender)
    receiver.kill()
    _, said = client.communicate(timeout=60)
    assert client.returncode == 1 and len(said.splitlines()) == 1
    assert "verify again" in said
    assert sender.popen.poll() is None
    pair.fails(1, "verify")
    pair.receive()
    wait_for(lambda: pair.status()["state"] == "following", "the sender is back")
    assert pair.findings()["outcome"] == "equal"


def test_a_sender_that_ends_is_named(pair: Verified) -> None:
    pair.receive()
    sender = pair.follow()
    client = pair.hold(sender)
    pair.stop(sender)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 1
    assert "ended before it answered" in said


def test_unknown_replica_and_bad_values(pair: Verified) -> None:
    pair.fails(2, "there is no replica r")
    pair.receive()
    pair.once()
    pair.fails(2, "there is no replica ../r", "--name", "../r")
    pair.fails(2, "is not a size", "--bandwidth", "fast")
    pair.fails(2, "more than nothing", "--bandwidth", "0")


def test_a_replica_gone_from_the_store_is_not_made_again(pair: Verified) -> None:
    pair.receive()
    pair.once()
    shutil.rmtree(pair.store / "r")
    pair.fails(1, "there is no replica r in the store")
    assert not (pair.store / "r").exists()


def test_no_receiver(pair: Verified) -> None:
    receiver = pair.receive()
    pair.once()
    receiver.kill()
    pair.fails(1, f"cannot compare with the receiver at {pair.address}")


def test_another_generation_has_nothing_to_compare_with(pair: Verified) -> None:
    pair.receive()
    pair.once()
    pair.mount.unmount()
    pair.mount.mount("--distrust")
    pair.fails(1, "nothing committed of this source's generation")


def test_a_pass_that_was_cut_off_is_refused(pair: Verified) -> None:
    pair.receive()
    pair.once()
    path = pair.store / "r" / ".fusedisk" / "manifest.json"
    filling = {"state": "filling", "generation": None, "epoch": None, "applying": True}
    edit_manifest(path, {**filling, "points": []})
    pair.fails(1, "in the middle of a pass")


def test_findings_join_neighbours_and_are_bounded() -> None:
    findings = verify.Findings()
    for disk, start, end in (("a", 0, 5), ("a", 5, 9), ("a", 10, 11), ("b", 11, 12)):
        findings.add(disk, start, end)
    assert findings.report()["differing"] == [
        {"disk": "a", "offset": 0, "length": 9},
        {"disk": "a", "offset": 10, "length": 1},
        {"disk": "b", "offset": 11, "length": 1},
    ]
    for number in range(10, 2000):
        findings.add("b", 2 * number, 2 * number + 1)
    # Joined to a range beyond the bound, which must not lengthen the last one listed.
    findings.add("b", 3999, 4001)
    assert len(findings.differing) == verify.RANGES_MAX
    assert findings.differing[-1].length == 1
    assert (findings.differing_ranges, findings.differing_bytes) == (1993, 9 + 1 + 1 + 1990 + 2)


def test_touched_blocks() -> None:
    block, mib = HASH_BLOCK_BYTES, 1 << 20
    assert verify.touched_blocks([15, 16, 40], 4096, 0, mib) == {0, 1, 2}
    assert verify.touched_blocks([1], mib, mib, mib + 3 * block) == {16, 17, 18}
    assert verify.blocks_bytes([15, 16], 16 * block + 512) == block + 512


def test_changed_chunks_stay_within_the_range(tmp_path: Path) -> None:
    changes = ChangeMap.create(tmp_path / "map", 10 * 4096 + 1, 4096)
    for epoch, chunk in ((2, 0), (3, 4), (4, 5), (5, 10)):
        changes.mark(epoch, chunk * 4096, 1)
    assert verify.changed_chunks(changes, 0, 10 * 4096 + 1, 3) == [5, 10]
    assert verify.changed_chunks(changes, 4 * 4096, 5 * 4096, 2) == [4]
    changes.close()


def test_zeros_equal_a_hole(tmp_path: Path) -> None:
    block = HASH_BLOCK_BYTES
    image = tmp_path / "image"
    image.write_bytes(bytes(2 * block) + b"x" * block)
    fd = os.open(image, os.O_RDONLY)
    try:
        hole = [Segment(0, 3 * block, True, b"")]
        found, seen = verify.unequal_blocks(fd, hole, 7, frozenset())
        assert (found, seen) == ([(2 * block, 3 * block)], 3 * block)
        assert verify.unequal_blocks(fd, hole, 7, frozenset({0, 2})) == ([], block)
        digests = b"".join(xxhash.xxh3_128_digest(c * block, 7) for c in (b"\0", b"y", b"x"))
        data = [Segment(0, 3 * block, False, digests)]
        assert verify.unequal_blocks(fd, data, 7, frozenset())[0] == [(block, 2 * block)]
        with pytest.raises(OSError, match="the image ends at byte"):
            verify.unequal_blocks(
                fd, [Segment(0, block * 3 + 1, False, digests + b"0" * 16)], 7, frozenset()
            )
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("opened", "reason"),
    [
        (Opened("following", "g", 4, None, True), "middle of a pass"),
        (Opened("filling", None, None, None), "nothing committed"),
        (Opened("following", "h", 4, None), "nothing committed"),
        (Opened("following", "g", 9, None), "ahead of its source"),
    ],
)
def test_what_cannot_be_compared_with(opened: Opened, reason: str) -> None:
    with pytest.raises(FuseDiskError, match=reason):
        verify.committed_epoch(opened, "r", "g", 9)


def test_committed_epoch() -> None:
    assert verify.committed_epoch(Opened("following", "g", 8, None), "r", "g", 9) == 8


class _RacySession:
    """A target that holds zeros, and a guest that writes while the target hashes."""

    seed = 1
    committed = 5

    repairs: ClassVar[list[tuple[int, int, int]]] = []

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    async def hashes(self, disk: int, offset: int, length: int) -> list[Segment]:
        self._write()
        return [Segment(offset, length, True, b"")]


class _StillSource:
    """One disk without a mount."""

    mounted = True

    def __init__(self, folder: Path, size: int) -> None:
        from fusedisk.state import Disk, MountRecord

        path = folder / "image"
        path.touch()
        os.truncate(path, size)
        self.record = MountRecord("s", "g", "/m", False, [Disk("image", str(path), size, 4096)])
        self.fds = [os.open(path, os.O_RDWR)]
        self.maps = [ChangeMap.create(folder / "map", size, 4096)]


@pytest.mark.parametrize(("epoch", "outcome"), [(6, "equal"), (5, "differs")])
def test_a_write_while_the_target_hashes(tmp_path: Path, epoch: int, outcome: str) -> None:
    source = _StillSource(tmp_path, 3 * HASH_BLOCK_BYTES)

    def write() -> None:
        source.maps[0].mark(epoch, HASH_BLOCK_BYTES, 4096)
        os.pwrite(source.fds[0], b"new", HASH_BLOCK_BYTES)

    async def run() -> verify.Findings:
        verification = verify.Verification(source, verify.VerifyOptions())  # type: ignore[arg-type]
        session: Any = _RacySession(write)
        await verification.work(session, float("inf"), trio.Event())
        return await verification.result()

    try:
        found = trio.run(run)
    finally:
        os.close(source.fds[0])
        source.maps[0].close()
    assert found.outcome == outcome
    assert found.left_out_chunks == (1 if epoch == 6 else 0)
