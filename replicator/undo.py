"""Recovery points as undo records: what the images held where they were overwritten since.

`STORE/NAME/.fusedisk/points/ID` belongs to point ID: records of the content at that point of ranges
that were overwritten between it and the next newer point kept. The first record of a range counts.
So a point is the images, overlaid by the undo files from the newest back to its own.

Blocks of 4 KiB are saved whole, so that a bit for each tells what is saved. Where a file has less
of a block, as those of other versions may, the whole block is saved once more, behind what counts.

The file only grows. The manifest says up to where it is known to be durable and whole; what is
beyond was being added when a crash came, and holds up to its first record that does not check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from fusedisk.direct import read_into
from fusedisk.errors import FuseDiskError
from replicator.blocks import BLOCK_BYTES, Blocks
from replicator.files import Buffer, Files
from replicator.images import block_runs
from replicator.manifest import PRIVATE_DIRECTORY, Point, ReplicaDisk
from replicator.overlay import Place
from replicator.records import DATA, HEAD_BYTES, NO_DIGEST, ZERO, Head, decode_head, encode_head
from replicator.writeback import Writeback

_PIECE_BYTES_MAX = 1 << 20
# Of records written in one call: their bytes, and their buffers (IOV_MAX).
_PENDING_BYTES_MAX, _PENDING_MAX = 4 << 20, 1022


class PointDamaged(FuseDiskError):
    """An undo file is not what was written."""


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
        self._saved = [Blocks(disk.size) for disk in disks]
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
            self.end = 0
            for head, at in whole_records(self.fd, self.path, point, disks):
                self._saved[head.disk].add(head.offset, head.offset + head.length)
                self.end = record_end(head, at)
            self._written = self.end
            if os.fstat(self.fd).st_size > self.end:
                files.truncate(self.fd, self.end)
        except BaseException:
            self.close()
            raise

    def save(self, disk: int, fd: int, start: int, end: int) -> None:
        """Add what `fd` holds of those blocks of a range that are not there. Raises OSError."""
        for low, high in self._saved[disk].missing(start, end):
            position = low
            for offset, stop in block_runs(fd, low, high, BLOCK_BYTES):
                self._zero(disk, position, offset)
                for at in range(offset, stop, _PIECE_BYTES_MAX):
                    self.add(disk, at, fd, at, min(_PIECE_BYTES_MAX, stop - at))
                position = stop
            self._zero(disk, position, high)

    def absorb(self, newer: UndoLog) -> None:
        """Take in the records of the next newer point, which is to go. Raises OSError."""
        for head, at in read_heads(newer.fd, newer._seed):
            start, end = head.offset, head.offset + head.length
            for low, high in self._saved[head.disk].missing(start, end):
                # Of a block that the record has in part there is no more.
                low, high = max(low, start), min(high, end)
                if head.kind == ZERO:
                    self._zero(head.disk, low, high)
                else:
                    self.add(head.disk, low, newer.fd, at + low - start, high - low)

    def add(self, disk: int, offset: int, fd: int, at: int, length: int) -> None:
        """Add a record of what `fd` has at byte `at`; it may wait for others. Raises OSError."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_PENDING_BYTES_MAX))
        self._make_room(length)
        data = self._buffer[self._used : self._used + length]
        read_into(fd, data, at)
        self._used += length
        self._append(Head(DATA, disk, offset, length, xxhash.xxh3_128_digest(data)), data)

    def _zero(self, disk: int, start: int, end: int) -> None:
        if start < end:
            self._make_room(0)
            self._append(Head(ZERO, disk, start, end - start, NO_DIGEST), b"")

    def _make_room(self, length: int) -> None:
        """Write what waits, unless one more of so much data can wait with it. Raises OSError."""
        if self._used + length > _PENDING_BYTES_MAX or len(self._pending) >= _PENDING_MAX:
            self.flush()

    def _append(self, head: Head, data: Buffer) -> None:
        """Let a record wait, for which there is room."""
        # Invariant: what counts as saved is written or waits, and what waits stays in the buffer.
        self._pending += [encode_head(head, self._seed), data]
        self.end += HEAD_BYTES + len(data)
        self._saved[head.disk].add(head.offset, head.offset + head.length)

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


def whole_records(
    fd: int, path: Path, point: Point, disks: Sequence[ReplicaDisk], *, check: bool = False
) -> Iterator[tuple[Head, int]]:
    """Yield the heads of an undo file that count, and where their data is.

    Those that the manifest promises, of which the data is compared with its digest only to `check`,
    and what is whole beyond them. Raises PointDamaged where one of the former does not match.
    """
    end = 0
    for head, at in read_heads(fd, point.id):
        stop = record_end(head, at)
        inside = head.disk < len(disks) and head.offset + head.length <= disks[head.disk].size
        doubtful = check or stop > point.undo_bytes
        if not inside or (doubtful and not _matches(fd, head, at)):
            break
        end = stop
        yield head, at
    if end < point.undo_bytes:
        raise PointDamaged(f"undo file {path} is damaged at byte {end}")


def record_end(head: Head, at: int) -> int:
    """Return where a record ends whose data is at byte `at`."""
    return at + (head.length if head.kind == DATA else 0)


def place_of(fd: int, head: Head, at: int) -> Place:
    """Return where the content of a record is."""
    return Place(fd, at) if head.kind == DATA else Place(-1, 0)


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
        position = record_end(head, position)


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
