"""Runs of zero blocks, as the native search finds them and as one block after the other says."""

import random
from itertools import groupby

import pytest

from fusedisk.zeros import zero_runs


def one_by_one(data: bytes, block: int) -> list[tuple[int, int, bool]]:
    places = range(0, len(data), block)
    runs = groupby(places, key=lambda at: not any(data[at : at + block]))
    found = [(list(group), zero) for zero, group in runs]
    return [(at[0], min(at[-1] + block, len(data)), zero) for at, zero in found]


def test_every_block_is_in_the_run_of_its_kind() -> None:
    noise = random.Random(1)
    for _ in range(500):
        data = bytearray(noise.randrange(1, 300))
        for _ in range(noise.randrange(4)):
            # One byte makes a block no zeros, wherever in it that is.
            data[noise.randrange(len(data))] = noise.randrange(256)
        block = noise.choice([1, 2, 16, 64])
        assert zero_runs(data, block) == one_by_one(data, block)


@pytest.mark.parametrize("at", [0, 1, 4094, 4095])
def test_a_byte_in_a_block_that_begins_with_zero_is_seen(at: int) -> None:
    data = bytearray(3 * 4096)
    data[4096 + at] = 1
    assert zero_runs(data, 4096) == [(0, 4096, True), (4096, 8192, False), (8192, 12288, True)]


def test_of_nothing_there_are_no_runs_and_a_block_has_bytes() -> None:
    assert zero_runs(b"", 4096) == []
    with pytest.raises(ValueError, match="at least one byte"):
        zero_runs(b"x", 0)
