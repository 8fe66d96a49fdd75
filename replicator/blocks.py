"""Which blocks of a disk are in a set: a bit each, so that the disk bounds it and not the ranges.

32 MiB of the disk share one integer; what has none holds nothing, and all that are full are one.
Each takes 1.3 KiB at most: 40 MiB for 1 TiB of disk.
"""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_BYTES = 4096
_WORD_BLOCKS = 1 << 13
_FULL = (1 << _WORD_BLOCKS) - 1


class Blocks:
    """Blocks of 4 KiB of a disk, of which the last may be cut off by its end."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._words: dict[int, int] = {}

    def missing(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of those that a range touches and that are not in it, in order.

        Neighbours are joined. What was yielded may be added meanwhile.
        """
        pending: tuple[int, int] | None = None
        stop = -(-min(end, self._size) // BLOCK_BYTES)
        for index, base, mask in _words(start // BLOCK_BYTES, stop):
            for low, high in _runs(mask & ~self._words.get(index, 0)):
                if pending is not None and pending[1] == base + low:
                    pending = pending[0], base + high
                    continue
                if pending is not None:
                    yield self._bytes(pending)
                pending = base + low, base + high
        if pending is not None:
            yield self._bytes(pending)

    def add(self, start: int, end: int) -> None:
        """Add those that lie within a range whole."""
        stop = -(-end // BLOCK_BYTES) if end >= self._size else end // BLOCK_BYTES
        for index, _, mask in _words(-(-start // BLOCK_BYTES), stop):
            word = self._words.get(index, 0) | mask
            self._words[index] = _FULL if word == _FULL else word

    def _bytes(self, blocks: tuple[int, int]) -> tuple[int, int]:
        return blocks[0] * BLOCK_BYTES, min(blocks[1] * BLOCK_BYTES, self._size)


def _words(first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(index, its first block, bits) of the words that blocks are in."""
    position = first
    while position < stop:
        index = position // _WORD_BLOCKS
        base = index * _WORD_BLOCKS
        end = min(stop, base + _WORD_BLOCKS)
        yield index, base, (1 << (end - base)) - (1 << (position - base))
        position = end


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """Runs [low, high) of bits that are set."""
    position = 0
    while bits:
        low = (bits & -bits).bit_length() - 1
        bits >>= low
        count = (~bits & (bits + 1)).bit_length() - 1
        bits >>= count
        position += low + count
        yield position - count, position
