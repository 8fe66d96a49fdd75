"""Where the content of ranges of a disk is, in columns: 24 bytes and a little for each range.

Ranges that come in ascending order are appended; others go into a block of at most a thousand, so
that no insertion moves more than that.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK_ROWS_MAX = 1024
# What the column of lengths can hold; longer ranges are zeros, and become several rows.
_ROW_BYTES_MAX = 1 << 30


class Place(NamedTuple):
    """Where the content of a range is: at byte `at` of `fd`, or zeros where `fd` is -1."""

    fd: int
    at: int


class _Rows:
    """A block of disjoint ranges in ascending order, by columns."""

    __slots__ = ("ats", "fds", "lengths", "starts")

    def __init__(self) -> None:
        self.starts, self.ats = array("Q"), array("Q")
        self.lengths, self.fds = array("I"), array("i")

    def insert(self, row: int, start: int, length: int, place: Place) -> None:
        self.starts.insert(row, start)
        self.lengths.insert(row, length)
        self.fds.insert(row, place.fd)
        self.ats.insert(row, place.at)

    def extend(self, row: int, start: int, length: int) -> bool:
        """Make a row of zeros longer, if it is one that ends there and has room for it."""
        fits = (
            row >= 0
            and self.fds[row] < 0
            and self.starts[row] + self.lengths[row] == start
            and self.lengths[row] + length <= _ROW_BYTES_MAX
        )
        if fits:
            self.lengths[row] += length
        return fits

    def split(self) -> _Rows:
        """Give the second half away."""
        other, half = _Rows(), len(self.starts) // 2
        for name in self.__slots__:
            column = getattr(self, name)
            setattr(other, name, column[half:])
            setattr(self, name, column[:half])
        return other


class Overlay:
    """Disjoint ranges of a disk and where their content is; what is there first stays."""

    def __init__(self) -> None:
        # Each block has what begins at its first byte or after it, and before the next one's.
        self._blocks = [_Rows()]
        self._firsts = [0]

    def add(self, start: int, end: int, place: Place) -> None:
        """Add what is not there yet of a range whose content begins at `place`."""
        position = start
        while position < end:
            _, stop, there = next(self.pieces(position, end))
            if there is None:
                stop = min(stop, position + _ROW_BYTES_MAX)
                at = place.at + position - start if place.fd >= 0 else 0
                self._insert(position, stop - position, Place(place.fd, at))
            position = stop

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, Place | None]]:
        """Yield (start, end, place) that cover a range in order; None where nothing is there."""
        position = start
        for low, high, place in self._from(start):
            if low >= end:
                break
            if high <= position:
                continue
            if low > position:
                yield position, low, None
                position = low
            stop = min(high, end)
            yield position, stop, Place(place.fd, place.at + position - low)
            position = stop
        if position < end:
            yield position, end, None

    def _from(self, start: int) -> Iterator[tuple[int, int, Place]]:
        """All rows from the one that a byte may be in."""
        for index in range(max(0, bisect_right(self._firsts, start) - 1), len(self._blocks)):
            rows = self._blocks[index]
            for row in range(max(0, bisect_right(rows.starts, start) - 1), len(rows.starts)):
                low = rows.starts[row]
                yield low, low + rows.lengths[row], Place(rows.fds[row], rows.ats[row])

    def _insert(self, start: int, length: int, place: Place) -> None:
        index = bisect_right(self._firsts, start) - 1
        rows = self._blocks[index]
        row = bisect_right(rows.starts, start)
        if place.fd < 0 and rows.extend(row - 1, start, length):
            return
        if len(rows.starts) < _BLOCK_ROWS_MAX:
            rows.insert(row, start, length, place)
            return
        # What ascends fills its blocks.
        other = _Rows() if row == _BLOCK_ROWS_MAX else rows.split()
        self._blocks.insert(index + 1, other)
        self._firsts.insert(index + 1, other.starts[0] if other.starts else start)
        self._insert(start, length, place)
