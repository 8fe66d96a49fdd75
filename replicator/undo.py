"""Recovery points as undo records: what the images held where they were overwritten since.

`STORE/NAME/.fusedisk/points/ID` belongs to point ID: records of the content at that point of ranges
that were overwritten between it and the next newer point kept. The first record of a range counts.
So a point is the images, overlaid by the undo files from the newest back to its own.

The file only grows. The manifest says up to where it is known to be durable and whole; what is
beyond was being added when a crash came, and holds up to its first record that does not check.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from fusedisk.direct import read_into
from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from replicator.files import Buffer, Files
from replicator.manifest import PRIVATE_DIRECTORY, Point, ReplicaDisk
from replicator.records import DATA, HEAD_BYTES, NO_DIGEST, ZERO, Head, decode_head, encode_head
from replicator.writeback import Writeback

_PIECE_BYTES_MAX = 1 << 20
# Of records written in one call: their bytes, and their buffers (IOV_MAX).
_PENDING_BYTES_MAX, _PENDING_MAX = 4 << 20, 1022


class PointDamaged(FuseDiskError):
    """An undo file is not what was written."""


class Place(NamedTuple):
    """Where the content of a range is: at byte `at` of `fd`, or zeros where `fd` is -1."""

    fd: int
    at: int


class Overlay:
    """Disjoint ranges of a disk and where their content is; what is there first stays."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Place]] = []

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that are not there, in order."""
        found = []
        for low, high, place in self.pieces(start, end):
            if place is None:
                found.append((low, high))
        return found

    def add(self, start: int, end: int, place: Place) -> None:
        """Add what is not there yet of a range whose content begins at `place`."""
        for low, high in self.missing(start, end):
            index = bisect_right(self._starts, low)
            self._starts.insert(index, low)
            self._ranges.insert(index, (low, high, Place(place.fd, place.at + low - start)))

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, Place | None]]:
        """Yield (start, end, place) that cover a range in order; None where nothing is there."""
        index = max(0, bisect_right(self._starts, start) - 1)
        position = start
        while position < end and index < len(self._ranges):
            low, high, place = self._ranges[index]
            index += 1
            if high <= position:
                continue
            if low >= end:
                break
            if low > position:
                yield position, low, None
                position = low
            stop = min(high, end)
            yield position, stop, Place(place.fd, place.at + position - low)
            position = stop
        if position < end:
            yield position, end, None


def undo_path(directory: Path, point_id: int) -> Path:
    """Return where the undo records of a point are."""
    return directory / PRIVATE_DIRECTORY / "points" / str(point_id)


class UndoLog:
    """The undo file of one point, open for adding to it and for reading."""

    def __init__(
        self, files: Files, directory: Path, point: Point, disks: Sequence[ReplicaDisk]
    ) -> None:
        """Open it, made if missing. Raises PointDamaged, or OSError."""
        self._files = files
        self.path = undo_path(directory, point.id)
        self._seed = point.id
        self._made = not self.path.exists()
        if self._made and point.undo_bytes:
            raise PointDamaged(f"undo file {self.path} is missing")
        if self._made and not self.path.parent.is_dir():
            files.mkdir(self.path.parent)
            files.sync_directory(self.path.parent.parent)
        self.overlays = [Overlay() for _ in disks]
        if self._made:
            self.fd = files.create(self.path)
        else:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._writeback = Writeback(files, self.fd)
        self._pending: list[Buffer] = []
        # What is read goes here, so that no memory is found and given back for each record.
        self._buffer: memoryview | None = None
        self._used = 0
        try:
            self.end = self._written = self._scan(point.undo_bytes, disks)
            if os.fstat(self.fd).st_size > self.end:
                files.truncate(self.fd, self.end)
        except BaseException:
            self.close()
            raise

    def _scan(self, durable: int, disks: Sequence[ReplicaDisk]) -> int:
        end = 0
        for head, at in read_heads(self.fd, self._seed):
            stop = at + (head.length if head.kind == DATA else 0)
            inside = head.disk < len(disks) and head.offset + head.length <= disks[head.disk].size
            if not inside or (stop > durable and not _matches(self.fd, head, at)):
                break
            place = Place(self.fd, at) if head.kind == DATA else Place(-1, 0)
            self.overlays[head.disk].add(head.offset, head.offset + head.length, place)
            end = stop
        if end < durable:
            raise PointDamaged(f"undo file {self.path} is damaged at byte {end}")
        return end

    def save(self, disk: int, fd: int, start: int, end: int) -> None:
        """Add what `fd` holds in those parts of a range that are not there. Raises OSError."""
        for low, high in self.overlays[disk].missing(start, end):
            position = low
            for offset, length in data_extents(fd, low, high):
                self._zero(disk, position, offset)
                for at in range(offset, offset + length, _PIECE_BYTES_MAX):
                    self.add(disk, at, fd, at, min(_PIECE_BYTES_MAX, offset + length - at))
                position = offset + length
            self._zero(disk, position, high)

    def absorb(self, newer: UndoLog) -> None:
        """Take in the records of the next newer point, which is to go. Raises OSError."""
        for head, at in read_heads(newer.fd, newer._seed):
            for low, high in self.overlays[head.disk].missing(
                head.offset, head.offset + head.length
            ):
                if head.kind == ZERO:
                    self._zero(head.disk, low, high)
                else:
                    self.add(head.disk, low, newer.fd, at + low - head.offset, high - low)

    def add(self, disk: int, offset: int, fd: int, at: int, length: int) -> None:
        """Add a record of what `fd` has at byte `at`; it may wait for others. Raises OSError."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_PENDING_BYTES_MAX))
        if self._used + length > len(self._buffer):
            self.flush()
        data = self._buffer[self._used : self._used + length]
        read_into(fd, data, at)
        self._used += length
        head = Head(DATA, disk, offset, length, xxhash.xxh3_128_digest(data))
        place = Place(self.fd, self.end + HEAD_BYTES)
        self.overlays[disk].add(offset, offset + length, place)
        self._append(head, data)

    def _zero(self, disk: int, start: int, end: int) -> None:
        if start < end:
            self.overlays[disk].add(start, end, Place(-1, 0))
            self._append(Head(ZERO, disk, start, end - start, NO_DIGEST), b"")

    def _append(self, head: Head, data: Buffer) -> None:
        if len(self._pending) >= _PENDING_MAX:
            self.flush()
        self._pending += [encode_head(head, self._seed), data]
        self.end += HEAD_BYTES + len(data)

    def flush(self) -> None:
        """Write the records that wait; repeat it where it fails. Raises OSError."""
        if not self._pending:
            return
        # What could not be written stays and is written to the same place by the next call: it
        # counts as saved already.
        length = self._files.write(self.fd, self._pending, self._written)
        self._writeback.wrote(self._written, length)
        self._written += length
        self._pending, self._used = [], 0

    def check(self) -> None:
        """Compare all data with its digests. Raises PointDamaged, or OSError."""
        for head, at in read_heads(self.fd, self._seed):
            if not _matches(self.fd, head, at):
                raise PointDamaged(f"undo file {self.path} is damaged at byte {at}")

    def sync(self) -> None:
        """Make all of it durable. Raises OSError."""
        self.flush()
        self._files.sync(self.fd)
        # Its maker may have died before it synced the name.
        self._files.sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self.fd)


def read_more(fd: int, seed: int, position: int) -> Iterator[tuple[Head, int]]:
    """Yield the heads from a byte on, and where their data is, of records that are whole.

    One that is being added ends it, as damage does.
    """
    for head, at in read_heads(fd, seed, position):
        if not _matches(fd, head, at):
            return
        yield head, at


def read_heads(fd: int, seed: int, position: int = 0) -> Iterator[tuple[Head, int]]:
    """Yield the heads of an undo file, and where their data is, up to the first that is bad."""
    while True:
        head = decode_head(os.pread(fd, HEAD_BYTES, position), seed)
        if head is None or head.kind not in (DATA, ZERO):
            return
        position += HEAD_BYTES
        yield head, position
        if head.kind == DATA:
            position += head.length


def _matches(fd: int, head: Head, at: int) -> bool:
    if head.kind == ZERO:
        return True
    if head.length > _PIECE_BYTES_MAX:
        return False
    return xxhash.xxh3_128_digest(os.pread(fd, head.length, at)) == head.digest


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """Read a range. Raises OSError where the file ends in it."""
    data = b""
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(5, f"the file ends at byte {offset + len(data)}")
        data += more
    return data
