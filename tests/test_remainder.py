"""What is left of a pass: looked up while it is sent, right by chunks, and never held as a list."""

import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedisk.capture import Capture
from fusedisk.changemap import ChangeMap, Control
from fusedisk.state import MountRecord
from replicator import messages as m
from replicator.captured import CapturedSource
from replicator.proof import steps
from replicator.remainder import Remainder
from replicator.source import Source

CHUNK = 4096
BLOCK = m.HASH_BLOCK_BYTES
COUNT = 1 << 15


class Marked(Source):
    """A source of one disk without an image, whose marks are what the test says."""

    def __init__(self, folder: Path, size: int) -> None:
        self.state, self.fds = folder, [-1]
        self.control = Control.create(folder / "control", 5)
        self.maps = [ChangeMap.create(folder / "0.map", size, CHUNK)]
        disk = SimpleNamespace(size=size, chunk_size=CHUNK)
        self.record = cast(MountRecord, SimpleNamespace(disks=[disk]))

    def captured(self, since: int) -> CapturedSource:
        capture = Capture(str(self.state), self.control, 1 << 20, CHUNK)
        capture.open(since)
        assert capture.closed()
        return CapturedSource(self, capture)


def chunks(ranges: Iterable[tuple[int, int]], size: int) -> list[int]:
    found: list[int] = []
    for start, end in ranges:
        assert start % CHUNK == 0 and (end % CHUNK == 0 or end == size) and start < end
        found += range(start // CHUNK, -(-end // CHUNK))
    assert found == sorted(set(found))
    return found


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=40),
    st.integers(1, CHUNK),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 40 * CHUNK)), max_size=3),
)
def test_what_is_left_is_right_chunk_by_chunk(
    tmp_path_factory: pytest.TempPathFactory,
    marks: list[int],
    tail: int,
    since: int,
    claimed: list[tuple[int, int]],
) -> None:
    """A mark of 6 or 7 is of after the capture of epoch 5, which made no copies of those."""
    size = (len(marks) - 1) * CHUNK + tail
    source = Marked(tmp_path_factory.mktemp("m"), size)
    for chunk, epoch in enumerate(marks):
        if epoch:
            source.maps[0].mark(epoch, chunk * CHUNK, 1)
    claims = [m.Reached("gen", epoch, 0, min(at, size)) for epoch, at in claimed]
    left = Remainder(source, since, claims)
    captured = source.captured(left.since)

    def wanted(chunk: int) -> bool:
        end = min((chunk + 1) * CHUNK, size)
        reaching = [claim for claim in claims if claim.offset >= end]
        nearest = min(reaching, key=lambda claim: claim.offset, default=None)
        bound = left.since if nearest is None else max(nearest.epoch, left.since)
        return bound < marks[chunk] <= captured.epoch

    expected = [chunk for chunk in range(len(marks)) if wanted(chunk)]
    assert chunks(left.ranges(captured, 0), size) == expected
    assert left.captured_bytes(captured) == [
        sum(min(CHUNK, size - chunk * CHUNK) for chunk in expected)
    ]


def peak(work: Iterator[object]) -> int:
    tracemalloc.start()
    try:
        assert sum(1 for _ in work) == COUNT
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_however_many_ranges_there_are_none_is_held(tmp_path: Path) -> None:
    size = 2 * COUNT * CHUNK
    source = Marked(tmp_path, size)
    for chunk in range(0, 2 * COUNT, 2):
        source.maps[0].mark(4, chunk * CHUNK, 1)
    claims = [m.Reached("gen", 3, 0, size // 2)]
    left, captured = Remainder(source, 2, claims), source.captured(2)
    assert peak(left.ranges(captured, 0)) < 3 << 20
    assert peak(captured.ranges(0, 0, size)) < 3 << 20
    assert peak(source.changed_ranges(0, 2)) < 3 << 20
    apart = ((2 * n * BLOCK, (2 * n + 1) * BLOCK) for n in range(COUNT))
    assert peak(steps(apart, 2 * COUNT * BLOCK)) < 1 << 20
