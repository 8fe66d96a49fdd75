"""What crosses the wire for a range of a disk: data, or runs of zeros, and a digest over a pass."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import xxhash

from fusedisk.direct import read_into
from fusedisk.extents import data_extents
from fusedisk.zeros import zero_runs
from replicator.messages import (
    DATA_BYTES_MAX,
    DIGEST_BYTES,
    HASH_BLOCK_BYTES,
    Data,
    Segment,
    Zero,
)

ZERO_BLOCK_BYTES = 4096


class TransferDigest:
    """Count and digest of the transfers of one pass, the same at both ends."""

    def __init__(self, kept: bytes = b"") -> None:
        """``kept``: the digest of what the pass goes on from, if it was cut off before."""
        self.count = 0
        self._hash = xxhash.xxh3_128(kept)

    def add(self, transfer: Data | Zero) -> None:
        """Take in one transfer, in the order of the wire."""
        content = transfer.digest if isinstance(transfer, Data) else b""
        self.take(transfer.disk, transfer.offset, transfer.length, content)

    def take(self, disk: int, offset: int, length: int, content: bytes) -> None:
        """The same, by its parts: the digest of its data, none for zeros."""
        self.count += 1
        self._hash.update(f"{disk} {offset} {length} ".encode() + content)

    def value(self) -> bytes:
        """xxh3-128 of the pass so far."""
        return self._hash.digest()


class Readable(Protocol):
    """What transfers are read from, which is a Source or stands in for one."""

    def data_extents(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run of data in a range. Raises OSError."""

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a byte of a disk. Raises OSError."""


class OneImage:
    """A lone image, as disk 0, that transfers can be read from."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def data_extents(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run of data in a range. Raises OSError."""
        return data_extents(self._fd, start, end)

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a byte of the image. Raises OSError."""
        read_into(self._fd, buffer, offset)


def pieces(source: Readable, disk: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is data) covering [start, end); data at most DATA_BYTES_MAX bytes each."""
    position = start
    for offset, length in source.data_extents(disk, start, end):
        if offset > position:
            yield position, offset - position, False
        for at in range(offset, offset + length, DATA_BYTES_MAX):
            yield at, min(DATA_BYTES_MAX, offset + length - at), True
        position = offset + length
    if position < end:
        yield position, end - position, False


def read_transfers(source: Readable, disk: int, offset: int, view: memoryview) -> list[Data | Zero]:
    """Read a piece into ``view``, at most DATA_BYTES_MAX; blocks of 4 KiB of zeros become runs.

    The transfers refer to the view. Raises OSError.
    """
    source.read(disk, view, offset)
    return [
        Zero(disk, offset + first, last - first)
        if zero
        else Data.of(disk, offset + first, view[first:last])
        for first, last, zero in zero_runs(view, ZERO_BLOCK_BYTES)
    ]


def differing(
    source: Readable, disk: int, segments: Sequence[Segment], seed: int
) -> list[tuple[int, int]]:
    """Ranges (start, end) of a source whose content is not what the target hashed.

    A range that cannot be read counts as differing.
    """
    ranges: list[tuple[int, int]] = []
    found: Iterator[tuple[int, int]]
    for segment in segments:
        if segment.zero:
            end = segment.offset + segment.length
            extents = source.data_extents(disk, segment.offset, end)
            found = ((o, o + n) for o, n in extents)
        else:
            found = _differing_blocks(source, disk, segment, seed)
        for start, end in found:
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
    return ranges


def _differing_blocks(
    source: Readable, disk: int, segment: Segment, seed: int
) -> Iterator[tuple[int, int]]:
    buffer = memoryview(bytearray(min(DATA_BYTES_MAX, segment.length)))
    end = segment.offset + segment.length
    index = 0
    for base in range(segment.offset, end, DATA_BYTES_MAX):
        view = buffer[: min(DATA_BYTES_MAX, end - base)]
        try:
            source.read(disk, view, base)
        except OSError:
            # Whoever sends the range reads it again, and says what is wrong.
            yield base, base + len(view)
            index += -(-len(view) // HASH_BLOCK_BYTES)
            continue
        for at in range(0, len(view), HASH_BLOCK_BYTES):
            block = view[at : at + HASH_BLOCK_BYTES]
            expected = segment.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            if xxhash.xxh3_128_digest(block, seed) != expected:
                yield base + at, base + at + len(block)
            index += 1
