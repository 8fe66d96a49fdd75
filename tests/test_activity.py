"""The activity log: what is on record, in every state of the file, under every order of writes."""

import errno
import itertools
import os
import random
import threading
import time
import uuid
import zlib
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk import activityfile
from fusedisk.activity import REGION, ActivityLog
from fusedisk.activityfile import BLOCK, REGIONS_IN_BLOCK, encode, parse
from fusedisk.changemap import ChangeMap, Control
from fusedisk.checkpoint import checkpoint
from fusedisk.disk import Disk

GENERATION = "6f1d1f5e-0c1b-4a52-8a2e-7d2f0a3c9b11"
serial = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activity")


def make(folder: Path, regions: int) -> Path:
    path = folder / f"log{next(serial)}"
    activityfile.create(path, GENERATION, regions)
    return path


def on_disk(path: Path) -> list[int]:
    return parse(path.read_bytes(), GENERATION).hot


def test_format_is_what_it_says() -> None:
    content = encode(GENERATION, 20, [0, 9])
    assert len(content) == 2 * BLOCK
    second = content[BLOCK:]
    assert second[:8] == b"FDACT01\0"
    assert second[8:24] == uuid.UUID(GENERATION).bytes
    assert second[24:44] == bytes([1] + [0] * 7 + [20] + [0] * 7 + [0] * 4)
    assert second[44:48] == zlib.crc32(second[:44] + bytes(4) + second[48:]).to_bytes(4, "little")
    assert second[48:51] == b"\x01\x02\x00"


def test_disks_begin_with_regions_of_their_own() -> None:
    assert activityfile.first_regions([1, REGION, REGION + 1]) == [0, 1, 2, 4]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 2 * REGIONS_IN_BLOCK + 4), max_size=40))
def test_encoded_is_parsed(hot: set[int]) -> None:
    found = parse(encode(GENERATION, 2 * REGIONS_IN_BLOCK + 5, hot), GENERATION)
    assert found.hot == sorted(hot)
    assert found.newest == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2 * BLOCK - 1), st.integers(1, 255))
def test_damage_of_one_copy_leaves_the_other(at: int, flip: int) -> None:
    content = bytearray(encode(GENERATION, 20, [3]))
    content[at] ^= flip
    assert parse(bytes(content), GENERATION).hot == [3]
    content[(at + BLOCK) % (2 * BLOCK)] ^= flip
    with pytest.raises(ValueError):
        parse(bytes(content), GENERATION)


@given(st.binary(max_size=3 * BLOCK))
def test_rubbish_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse(content, GENERATION)


def test_log_of_another_generation_or_size_is_refused(folder: Path) -> None:
    path = make(folder, 20)
    with pytest.raises(ValueError):
        ActivityLog(path, str(uuid.uuid4()))
    with pytest.raises(ValueError):
        activityfile.read(path, GENERATION, 21)
    os.truncate(path, BLOCK)
    with pytest.raises(ValueError):
        ActivityLog(path, GENERATION)


# Each step is a write to a region, an ageing without or with cooling, or a drop.
steps = st.lists(
    st.one_of(
        st.integers(0, 9).map(lambda r: ("heat", r)),
        st.sampled_from([("age", 0), ("age", 1), ("drop", 0), ("reopen", 0)]),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_nothing_leaves_the_record_that_was_written_since(
    folder: Path, history: list[tuple[str, int]]
) -> None:
    path = make(folder, 10)
    log = ActivityLog(path, GENERATION)
    # What a checkpoint that began at the last age(cool=…) would have synced.
    dirty: set[int] = set()
    synced: set[int] = set()
    for step, region in history:
        if step == "heat":
            log.heat(0, region * REGION + 5, 1)
            dirty.add(region)
            synced.discard(region)
        elif step == "age":
            log.age(cool=region)
            if region:
                synced = set(dirty)
        elif step == "drop":
            # The sync of a checkpoint comes first: what was written before it began is safe.
            dirty -= synced
            log.drop()
        else:
            log = ActivityLog(path, GENERATION)
            synced = set()
        assert dirty <= set(on_disk(path))
        assert set(log.hot()) <= set(on_disk(path))


def test_idle_regions_leave_after_two_rounds_and_busy_ones_stay(folder: Path) -> None:
    path = make(folder, 4)
    log = ActivityLog(path, GENERATION)
    log.heat(0, 0, 3 * REGION)
    assert on_disk(path) == [0, 1, 2]
    assert log.age(cool=4) == 0
    log.heat(0, REGION, 1)
    assert log.age(cool=4) == 2
    log.heat(0, 2 * REGION, 1)
    assert log.drop() == 1
    assert on_disk(path) == log.hot() == [1, 2]


def test_those_idle_for_the_longest_time_leave_first(folder: Path) -> None:
    path = make(folder, 2000)
    log = ActivityLog(path, GENERATION)
    order = [7, 3, 1999, 0, 5]
    for region in order:
        log.heat(0, region * REGION, 1)
        log.age(cool=0)
    # Back in use and idle again: the newest.
    log.heat(0, 3 * REGION, 1)
    log.age(cool=0)
    assert log.age(cool=2) == 2
    assert log.drop() == 2
    assert on_disk(path) == [0, 3, 5]
    # Of those that are equally old as many as were asked for; of those in use none.
    log.heat(0, 10 * REGION, 4 * REGION)
    log.age(cool=0)
    log.heat(0, 0, 1)
    assert log.age(cool=4) == 4
    assert log.drop() == 4
    assert on_disk(path) == [0, 12, 13]
    # Long idle is no longer told apart, and still goes.
    for _ in range(1100):
        log.age(cool=0)
    assert log.age(cool=99) == 3
    assert log.drop() == 3
    assert on_disk(path) == []


def test_a_checkpoint_leaves_what_was_in_use_lately(tmp_path: Path) -> None:
    """A slow writer all over a wide disk would else wait for the record again and again."""
    control = Control.create(tmp_path / "control", 1, 1 << 20)
    path = make(tmp_path, 400)
    log = ActivityLog(path, GENERATION)

    def due() -> int:
        return trio.run(lambda: checkpoint(log, tmp_path, control, [], kept=160))

    for region in range(160):
        log.heat(0, region * REGION, 1)
        if region % 16 == 0:
            assert due() == 0
    assert due() == 0
    log.heat(0, 200 * REGION, 1)
    # More than are kept: an eighth goes besides, so that the next one is not due at once.
    assert due() == 21
    assert on_disk(path) == [*range(21, 160), 200]
    assert due() == 0


def test_every_tear_of_a_write_leaves_what_was_durable(folder: Path) -> None:
    path = make(folder, 20000)
    log = ActivityLog(path, GENERATION)
    for region in range(0, 20000, 1777):
        before, held = path.read_bytes(), on_disk(path)
        log.heat(0, region * REGION, 1)
        after = path.read_bytes()
        written = [at for at in range(0, len(after), 512) if before[at:][:512] != after[at:][:512]]
        for there in itertools.product([False, True], repeat=len(written)):
            torn = bytearray(before)
            for at in itertools.compress(written, there):
                torn[at : at + 512] = after[at : at + 512]
            assert set(held) <= set(parse(bytes(torn), GENERATION).hot)


def test_regions_of_several_blocks(folder: Path) -> None:
    regions = 2 * REGIONS_IN_BLOCK + 3
    path = make(folder, regions)
    log = ActivityLog(path, GENERATION)
    edge = REGIONS_IN_BLOCK
    log.heat(edge - 1, 0, 2 * REGION)
    log.heat(regions - 1, 0, REGION)
    assert on_disk(path) == [edge - 1, edge, regions - 1]
    assert ActivityLog(path, GENERATION).hot() == on_disk(path)
    with pytest.raises(ValueError):
        log.heat(regions - 1, 0, REGION + 1)


def test_log_that_cannot_be_written_is_an_error_each_time(folder: Path) -> None:
    path = make(folder, 4)
    log = ActivityLog(path, GENERATION)
    log.heat(0, 0, 1)
    fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
    own = next(fd for fd in fds if _names(fd, path))
    with Path("/dev/full").open("wb") as full:
        kept = os.dup(own)
        os.dup2(full.fileno(), own)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                log.heat(0, REGION, 1)
            assert caught.value.errno == errno.ENOSPC
        log.heat(0, 0, 1)
        os.dup2(kept, own)
        os.close(kept)
    assert on_disk(path) == [0]
    log.heat(0, REGION, 1)
    assert on_disk(path) == [0, 1]


def test_writers_beside_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment is a change that no sync covered missing from the file."""
    regions, writers, length = 5, 3, 4 << 20
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, regions * REGION)
    control = Control.create(tmp_path / "control", 1, 1 << 20)
    changes = ChangeMap.create(tmp_path / "map", regions * REGION, 65536)
    log = ActivityLog(make(tmp_path, regions), GENERATION)
    path = next(tmp_path.glob("log*"))
    fd = os.open(image, os.O_RDWR)
    disk = Disk(control, changes, fd, activity=log)
    stop = threading.Event()
    failures: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(number)
        try:
            for count in itertools.count(1):
                if stop.is_set():
                    return
                # Long enough for a checkpoint to pass by; what is written last tells.
                data = bytes(length - 8) + count.to_bytes(8, "little")
                disk.write(data, chance.randrange(regions) * REGION + number * length)
                time.sleep(chance.choice([0, 0.002, 0.01]))
        except BaseException as error:
            failures.append(error)

    def content() -> list[bytes]:
        ends = [(n + 1) * length - 8 for n in range(writers)]
        return [b"".join(os.pread(fd, 8, r * REGION + end) for end in ends) for r in range(regions)]

    synced = content()

    def sync(which: int) -> None:
        nonlocal synced
        if which == fd:
            synced = content()

    monkeypatch.setattr("fusedisk.checkpoint.os.fdatasync", sync)
    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    try:
        dropped = 0
        for _ in range(200):
            dropped += trio.run(
                lambda: checkpoint(log, tmp_path, control, [fd, changes.fd], kept=0)
            )
            now = content()
            record = on_disk(path)
            assert [r for r in range(regions) if now[r] != synced[r] and r not in record] == []
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        os.close(fd)
    assert failures == []
    assert dropped


def _names(fd: int, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except OSError:
        return False
