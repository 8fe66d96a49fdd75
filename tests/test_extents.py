"""Data runs of sparse files, against a model that remembers what was written."""

import errno
import os
from pathlib import Path

import pytest

from fusedisk import extents
from fusedisk.extents import allocated_bytes, data_extents

BLOCK = 65536


@pytest.fixture
def sparse(tmp_path: Path):
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 16 * BLOCK)
    os.pwrite(fd, b"a" * BLOCK, 2 * BLOCK)
    os.pwrite(fd, b"b" * 2 * BLOCK, 7 * BLOCK)
    yield fd
    os.close(fd)


def test_runs_lie_where_data_was_written(sparse: int) -> None:
    runs = list(data_extents(sparse, 0, 16 * BLOCK))
    assert runs == [(2 * BLOCK, BLOCK), (7 * BLOCK, 2 * BLOCK)]
    assert allocated_bytes(sparse, 16 * BLOCK) == 3 * BLOCK
    assert allocated_bytes(sparse, 3 * BLOCK) == BLOCK


def test_runs_are_cut_to_the_range(sparse: int) -> None:
    runs = list(data_extents(sparse, 2 * BLOCK + 5, 7 * BLOCK + 9))
    assert runs == [(2 * BLOCK + 5, BLOCK - 5), (7 * BLOCK, 9)]


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, BLOCK), (9 * BLOCK, 99 * BLOCK)])
def test_no_data_in_holes_and_past_the_end(sparse: int, start: int, end: int) -> None:
    assert list(data_extents(sparse, start, end)) == []


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4)])
def test_impossible_range_is_refused(sparse: int, start: int, end: int) -> None:
    with pytest.raises(ValueError, match="no such range"):
        list(data_extents(sparse, start, end))


def test_all_is_data_where_the_filesystem_cannot_tell(
    sparse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(*_: int) -> int:
        raise OSError(errno.EINVAL, "no SEEK_DATA here")

    monkeypatch.setattr(extents.os, "lseek", lseek)
    assert list(data_extents(sparse, 3, 99)) == [(3, 96)]


def test_other_errors_are_raised(sparse: int) -> None:
    fd = os.dup(sparse)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        list(data_extents(fd, 0, 1))
