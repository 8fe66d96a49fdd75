"""What undo files are held in memory as: right against a plain model, and small."""

import errno
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator import overlay as overlays
from replicator import undo
from replicator.blocks import BLOCK_BYTES, Blocks
from replicator.files import Buffer, Files
from replicator.manifest import Point, ReplicaDisk
from replicator.overlay import Overlay, Place
from replicator.records import DATA, ZERO, Head, encode_head
from replicator.undo import UndoLog, place_of, read_exactly, undo_path, whole_records

CHUNK = 65536
SIZE = (2 << 25) + 3 * BLOCK_BYTES + 100
"""Ends in a block, and in the third of the words that bits are kept in."""
RANGES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 90), st.integers(-1, 3)))
POINT = Point(7, "gen", 1, 0.0)
DISK = ReplicaDisk("d", 64 * BLOCK_BYTES + 100, BLOCK_BYTES)


@st.composite
def places(draw: st.DrawFn) -> int:
    """A byte of the disk, mostly near where a word begins or the disk ends."""
    near = draw(st.sampled_from([0, 1 << 25, 2 << 25]))
    return min(SIZE, max(0, near + draw(st.integers(-5 * BLOCK_BYTES, 5 * BLOCK_BYTES))))


@given(st.lists(st.tuples(st.booleans(), places(), places())))
def test_blocks_are_a_set(steps: list[tuple[bool, int, int]]) -> None:
    blocks, model = Blocks(SIZE), set[int]()
    for adding, a, b in steps:
        start, end = min(a, b), max(a, b)
        touched = range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        if adding:
            blocks.add(start, end)
            model |= {
                block
                for block in touched
                if block * BLOCK_BYTES >= start
                and (end >= SIZE or (block + 1) * BLOCK_BYTES <= end)
            }
        found = list(blocks.missing(start, end))
        assert all(b < c for (_, b), (c, _) in pairwise(found)), "not joined"
        inside = {n for a, b in found for n in range(a // BLOCK_BYTES, -(-b // BLOCK_BYTES))}
        assert inside == set(touched) - model
        assert all(stop == SIZE or stop % BLOCK_BYTES == 0 for _, stop in found)


@settings(max_examples=200)
@given(RANGES, st.integers(1, 5), st.integers(1, 60))
def test_an_overlay_has_each_byte_where_it_came_first(
    ranges: list[tuple[int, int, int]], rows_max: int, row_bytes_max: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlays, "_BLOCK_ROWS_MAX", rows_max + 1)
        patch.setattr(overlays, "_ROW_BYTES_MAX", row_bytes_max)
        overlay, model = Overlay(), dict[int, tuple[int, int]]()
        for number, (start, length, fd) in enumerate(ranges):
            overlay.add(start, start + length, Place(fd, 1000 * number))
            for at in range(start, start + length):
                model.setdefault(at, (fd, 1000 * number + at - start if fd >= 0 else 0))
    for low, high in [(0, 500), (37, 38), (100, 300)]:
        position = low
        for start, end, place in overlay.pieces(low, high):
            assert position == start < end <= high
            position = end
            for at in range(start, end):
                there = place and (place.fd, place.at + at - start if place.fd >= 0 else 0)
                assert there == model.get(at)
        assert position == high
    assert max(len(rows.starts) for rows in overlay._blocks) <= rows_max + 1
    lengths = [length for rows in overlay._blocks for length in rows.lengths]
    assert max(lengths, default=0) <= row_bytes_max


@contextmanager
def bytes_held() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", ["ascending", "random"])
def test_a_range_takes_few_bytes(order: str) -> None:
    """Every second chunk of 1.3 GiB, which is what 1 TiB has 800 times."""
    numbers = list(range(10_000))
    if order == "random":
        random.Random(1).shuffle(numbers)
    with bytes_held() as held:
        overlay = Overlay()
        for n in numbers:
            overlay.add(2 * n * CHUNK, (2 * n + 1) * CHUNK, Place(3, n * (CHUNK + 48)))
        assert held() < 32 * len(numbers)
    with bytes_held() as held:
        saved = Blocks(2 * CHUNK * len(numbers))
        for n in numbers:
            saved.add(2 * n * CHUNK, (2 * n + 1) * CHUNK)
        assert held() < 6 * len(numbers)


def test_however_many_ranges_there_are_the_disk_bounds_what_is_saved() -> None:
    """The worst there is: every second block of 64 MiB."""
    with bytes_held() as held:
        saved = Blocks(64 << 20)
        for at in range(0, 64 << 20, 2 * BLOCK_BYTES):
            saved.add(at, at + BLOCK_BYTES)
        assert held() < 2 * 1500
    with bytes_held() as held:
        whole = Blocks(1 << 44)
        whole.add(0, 1 << 34)
        assert held() < 512 * 200 and not list(whole.missing(0, 1 << 34))


def test_zeros_that_touch_are_one_range() -> None:
    overlay = Overlay()
    for n in range(100):
        overlay.add(n * CHUNK, (n + 1) * CHUNK, Place(-1, 0))
    assert list(overlay.pieces(0, 100 * CHUNK)) == [(0, 100 * CHUNK, Place(-1, 0))]


def at_the_point(path: Path, image: bytes) -> bytes:
    """The disk through its undo file, all of whose data has to be what was written."""
    fd = os.open(path, os.O_RDONLY)
    try:
        overlay, found = Overlay(), bytearray(image)
        for head, at in whole_records(fd, path, POINT, [DISK], check=True):
            overlay.add(head.offset, head.offset + head.length, place_of(fd, head, at))
        for start, end, place in overlay.pieces(0, DISK.size):
            if place is not None:
                zeros = place.fd < 0
                found[start:end] = (
                    bytes(end - start) if zeros else read_exactly(place.fd, end - start, place.at)
                )
        return bytes(found)
    finally:
        os.close(fd)


@contextmanager
def image_of(tmp_path: Path, content: bytes) -> Iterator[int]:
    path = tmp_path / "image"
    path.write_bytes(content)
    (tmp_path / ".fusedisk").mkdir(exist_ok=True)
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("waiting_max", [2, 6, 1022])
def test_what_waits_is_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting_max: int
) -> None:
    """Small records end the wait by their number, and larger ones come behind them."""
    monkeypatch.setattr(undo, "_PENDING_MAX", waiting_max)
    before = random.Random(1).randbytes(DISK.size)
    with image_of(tmp_path, before) as fd:
        log = UndoLog(Files(), tmp_path, POINT, [DISK])
        for n in range(4):
            log.save(0, fd, 2 * n * BLOCK_BYTES, (2 * n + 1) * BLOCK_BYTES)
        for n in (2, 4, 6):
            log.save(0, fd, 5 * n * BLOCK_BYTES, (5 * n + 8) * BLOCK_BYTES)
        log.save(0, fd, 0, DISK.size)
        log.sync()
        log.close()
    assert at_the_point(log.path, bytes(DISK.size)) == before


def test_a_record_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has made room tries again, and then all is saved."""
    monkeypatch.setattr(undo, "_PENDING_MAX", 4)

    class Full(Files):
        calls = 0

        def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
            self.calls += 1
            if self.calls % 2:
                raise OSError(errno.ENOSPC, "full")
            return super().write(fd, buffers, offset)

    files, before = Full(), random.Random(1).randbytes(DISK.size)
    failed = 0
    with image_of(tmp_path, before) as fd:
        log = UndoLog(files, tmp_path, POINT, [DISK])
        for n in [*range(0, 65, 2), *range(1, 65, 2)]:
            while True:
                try:
                    log.save(0, fd, n * BLOCK_BYTES, min((n + 1) * BLOCK_BYTES, DISK.size))
                    break
                except OSError:
                    failed += 1
        with pytest.raises(OSError):
            log.flush()
        log.sync()
        log.close()
    assert failed > 10
    assert at_the_point(log.path, bytes(DISK.size)) == before


def test_records_of_parts_of_blocks_still_count(tmp_path: Path) -> None:
    """As files of other versions have them: what they hold stays what the point had."""
    before, after = random.Random(1).randbytes(DISK.size), random.Random(2).randbytes(DISK.size)
    path = undo_path(tmp_path, POINT.id)
    path.parent.mkdir(parents=True)
    known = [(1000, 5000), (3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 512), (DISK.size - 50, DISK.size)]
    with path.open("wb") as file:
        for start, end in known:
            data = before[start:end]
            digest = xxhash.xxh3_128_digest(data)
            head = Head(DATA, 0, start, end - start, digest)
            file.write(encode_head(head, POINT.id) + data)
    image = bytearray(before)
    for start, end in known:
        image[start:end] = after[start:end]
    with image_of(tmp_path, bytes(image)) as fd:
        log = UndoLog(Files(), tmp_path, POINT, [DISK])
        log.save(0, fd, 0, DISK.size)
        end = log.end
        log.save(0, fd, 0, DISK.size)
        assert log.end == end
        log.sync()
        log.close()
    assert at_the_point(path, after) == before


def test_blocks_are_saved_whole_where_the_filesystem_has_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.images.data_extents", lambda *_: iter([(5120, 1024)]))
    before = bytes(5120) + b"x" * 1024 + bytes(DISK.size - 6144)
    with image_of(tmp_path, before) as fd:
        for _ in range(2):
            log = UndoLog(Files(), tmp_path, POINT, [DISK])
            log.save(0, fd, 0, DISK.size)
            log.sync()
            log.close()
    with log.path.open("rb") as file:
        kinds = [head.kind for head, _ in undo.read_heads(file.fileno(), POINT.id)]
    assert kinds == [ZERO, DATA, ZERO], "saved again"
    assert at_the_point(log.path, b"y" * DISK.size) == before


@pytest.mark.parametrize("seed", range(4))
def test_a_point_that_goes_leaves_all_it_had(tmp_path: Path, seed: int) -> None:
    """Its records are of parts of blocks, and so are those of the older point."""
    rng = random.Random(seed)
    states = [random.Random(100 * seed + n).randbytes(DISK.size) for n in range(3)]
    older_point, newer_point = POINT, Point(8, "gen", 2, 0.0)
    image = bytearray(states[0])
    for number, point in enumerate((older_point, newer_point)):
        path, here = undo_path(tmp_path, point.id), bytes(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = set[int]()
        with path.open("wb") as file:
            for _ in range(12):
                start = rng.randrange(DISK.size - 9000)
                end = start + rng.choice([100, BLOCK_BYTES, 9000])
                if taken.isdisjoint(range(start, end)):
                    taken |= set(range(start, end))
                    data = here[start:end]
                    head = Head(DATA, 0, start, end - start, xxhash.xxh3_128_digest(data))
                    file.write(encode_head(head, point.id) + data)
                    image[start:end] = states[number + 1][start:end]
    older = UndoLog(Files(), tmp_path, older_point, [DISK])
    newer = UndoLog(Files(), tmp_path, newer_point, [DISK])
    older.absorb(newer)
    older.sync()
    older.close()
    newer.close()
    assert at_the_point(older.path, bytes(image)) == states[0]
