"""What crosses the wire for a range of a disk: data, or runs of zeros, and a digest over a pass."""

import os
from collections.abc import Iterator, Sequence

import xxhash

from fusedisk.extents import data_extents
from replicator.messages import DATA_BYTES_MAX, HASH_BLOCK_BYTES, Data, Segment, Zero

ZERO_BLOCK_BYTES = 4096
_ZEROS = bytes(ZERO_BLOCK_BYTES)


class TransferDigest:
    """Count and digest of the transfers of one pass, the same at both ends."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = xxhash.xxh3_128()

    def add(self, transfer: Data | Zero) -> None:
        """Take in one transfer, in the order of the wire."""
        self.count += 1
        if isinstance(transfer, Data):
            length, content = len(transfer.data), transfer.digest
        else:
            length, content = transfer.length, b""
        self._hash.update(f"{transfer.disk} {transfer.offset} {length} ".encode() + content)

    def value(self) -> bytes:
        """xxh3-128 of the pass so far."""
        return self._hash.digest()


def pieces(fd: int, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is data) covering [start, end); data at most DATA_BYTES_MAX bytes each."""
    position = start
    for offset, length in data_extents(fd, start, end):
        if offset > position:
            yield position, offset - position, False
        for at in range(offset, offset + length, DATA_BYTES_MAX):
            yield at, min(DATA_BYTES_MAX, offset + length - at), True
        position = offset + length
    if position < end:
        yield position, end - position, False


def read_transfers(fd: int, disk: int, offset: int, length: int) -> list[Data | Zero]:
    """Read a piece of at most DATA_BYTES_MAX bytes; blocks of 4 KiB that are zero become runs.

    Raises OSError when the image cannot be read or ended early.
    """
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise OSError(f"the image ended at {offset + len(data)}, before its size")
    view = memoryview(data)
    result: list[Data | Zero] = []
    for first, last, zero in _zero_runs(data):
        if zero:
            result.append(Zero(disk, offset + first, last - first))
        else:
            result.append(Data.of(disk, offset + first, view[first:last]))
    return result


def _zero_runs(data: bytes) -> Iterator[tuple[int, int, bool]]:
    start, kind = 0, None
    for at in range(0, len(data), ZERO_BLOCK_BYTES):
        whole = at + ZERO_BLOCK_BYTES <= len(data)
        zero = data.startswith(_ZEROS, at) if whole else not any(data[at:])
        if kind is not None and zero != kind:
            yield start, at, kind
            start = at
        kind = zero
    if kind is not None:
        yield start, len(data), kind


def differing(fd: int, segments: Sequence[Segment], seed: int) -> list[tuple[int, int]]:
    """Ranges (start, end) of a source whose content is not what the target hashed."""
    ranges: list[tuple[int, int]] = []
    for segment in segments:
        if segment.zero:
            end = segment.offset + segment.length
            found = [(o, o + n) for o, n in data_extents(fd, segment.offset, end)]
        else:
            found = _differing_blocks(fd, segment, seed)
        for start, end in found:
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
    return ranges


def _differing_blocks(fd: int, segment: Segment, seed: int) -> list[tuple[int, int]]:
    found = []
    for index in range(0, len(segment.digests) // 16):
        offset = segment.offset + index * HASH_BLOCK_BYTES
        length = min(HASH_BLOCK_BYTES, segment.offset + segment.length - offset)
        data = os.pread(fd, length, offset)
        if xxhash.xxh3_128_digest(data, seed) != segment.digests[index * 16 : index * 16 + 16]:
            found.append((offset, offset + length))
    return found
