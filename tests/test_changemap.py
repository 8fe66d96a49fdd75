"""The change map against a simple model: never a missed chunk, never one too many."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk.changemap import PAGE, ChangeMap, Control

CHUNK = 4096
SIZES = [1, 4095, 4096, 4097, 10 * 4096 + 17, 3 * 1024 * 4096 + 5]
serial = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("maps")


def edges(size: int) -> st.SearchStrategy[int]:
    """Offsets that sit on, just before or just after a chunk's edge, and any others."""
    near = st.integers(0, -(-size // CHUNK)).flatmap(
        lambda c: st.sampled_from([c * CHUNK - 1, c * CHUNK, c * CHUNK + 1])
    )
    return st.one_of(near, st.integers(0, size), st.just(size - 1)).map(
        lambda x: min(max(x, 0), size)
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, int] | None]]:
    size = draw(st.sampled_from(SIZES))
    write = st.tuples(edges(size), edges(size)).map(lambda p: (min(p), max(p) - min(p)))
    return size, draw(st.lists(st.one_of(st.none(), write), max_size=30))


@settings(max_examples=150, deadline=None)
@given(histories())
def test_agrees_with_the_model(folder: Path, history: tuple[int, list[tuple[int, int] | None]]):
    size, steps = history
    n = next(serial)
    control = Control.create(folder / f"control{n}", 1)
    changes = ChangeMap.create(folder / f"map{n}", size, CHUNK)
    model = [0] * changes.chunks
    epoch = 1
    for step in steps:
        if step is None:
            assert control.advance() == epoch
            assert control.quiet(epoch)
            epoch += 1
            continue
        offset, length = step
        changes.mark(epoch, offset, length)
        for c in range(changes.chunks):
            if offset < (c + 1) * CHUNK and c * CHUNK < offset + length and length:
                model[c] = epoch
    reader = ChangeMap(folder / f"map{n}")
    assert [reader.last(c) for c in range(reader.chunks)] == model
    for since in range(epoch + 1):
        expected = {c for c, last in enumerate(model) if last > since}
        assert reader.count(since) == len(expected)
        runs = reader.runs(since)
        assert [c for first, count in runs for c in range(first, first + count)] == sorted(expected)
        # Runs are as long as they can be: no two touch.
        assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs))
    reader.close()
    changes.close()
    control.close()


def test_a_mark_never_goes_back(tmp_path: Path):
    changes = ChangeMap.create(tmp_path / "map", 8 * CHUNK, CHUNK)
    changes.mark(7, 0, 1)
    changes.mark(5, 0, CHUNK + 1)
    assert [changes.last(0), changes.last(1), changes.last(2)] == [7, 5, 0]


def test_an_announced_writer_keeps_its_epoch_open(tmp_path: Path):
    control = Control.create(tmp_path / "control", 3)
    slot, epoch = control.announce()
    assert epoch == 3
    assert control.advance() == 3
    assert not control.quiet(3)
    late, newer = control.announce()
    assert newer == 4
    control.withdraw(slot)
    assert control.quiet(3)
    assert not control.quiet(4)
    control.withdraw(late)
    assert control.quiet(4)


def test_little_written_costs_little(tmp_path: Path):
    changes = ChangeMap.create(tmp_path / "map", 16 << 40, 64 << 10)
    changes.mark(1, 0, 1)
    changes.mark(1, (16 << 40) - 1, 1)
    assert changes.runs(0) == [(0, 1), (changes.chunks - 1, 1)]
    assert (tmp_path / "map").stat().st_blocks * 512 < 2 << 20


@pytest.mark.parametrize("damage", [b"", b"garbage" * 1000, b"FDMAP01\0" + b"\xff" * 5000])
def test_a_damaged_map_is_refused(tmp_path: Path, damage: bytes):
    (tmp_path / "map").write_bytes(damage)
    with pytest.raises(ValueError):
        ChangeMap(tmp_path / "map")


def test_a_truncated_map_is_refused(tmp_path: Path):
    ChangeMap.create(tmp_path / "map", 1 << 30, CHUNK).close()
    with (tmp_path / "map").open("r+b") as file:
        file.truncate(PAGE)
    with pytest.raises(ValueError, match="shorter"):
        ChangeMap(tmp_path / "map")


@pytest.mark.parametrize("offset,length", [(-1, 1), (0, CHUNK + 1), (CHUNK, 1), (1 << 70, 1)])
def test_ranges_outside_the_disk_are_refused(tmp_path: Path, offset: int, length: int):
    changes = ChangeMap.create(tmp_path / "map", CHUNK, CHUNK)
    with pytest.raises(ValueError):
        changes.mark(1, offset, length)
