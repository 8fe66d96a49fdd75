"""The redo journal: one pass of a replica, kept whole beside the images until it can be applied.

`STORE/NAME/.fusedisk/journal/SLOT`, SLOT being 0 or 1: one committed and being applied, one being
received. All numbers are little-endian.

    header   magic "FDREDO1\\n", u32 version, u32 length of the body; the body (JSON: id, source id,
             the point the pass starts from, the epoch it goes to); xxh3-128 of all that
    record   a head as replicator.records has it, seeded with the id; its data
    trailer  a record of kind 3 whose offset is the number of records and whose data is JSON: the
             point reached and the xxh3-128 over all record heads

A journal is committed when the manifest names its id, which happens only after it was synced whole.
So one that is not named may be torn anywhere and is dropped; one that is named and does not check
was damaged afterwards.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec
import xxhash

from fusedisk.errors import FuseDiskError
from replicator.files import Buffer, Files
from replicator.manifest import PRIVATE_DIRECTORY, Epoch, JournalRef, ReplicaDisk, Text
from replicator.records import (
    DATA,
    HEAD_BYTES,
    NO_DIGEST,
    TRAILER,
    ZERO,
    Head,
    Piece,
    decode_head,
    encode_head,
)
from replicator.writeback import Writeback

_MAGIC, _VERSION = b"FDREDO1\n", 1
_HEADER = struct.Struct("<8sII")
_DATA_BYTES_MAX = 1 << 20
_BODY_BYTES_MAX = 1 << 16
# Of a journal being read, at least a record's data.
_WINDOW_BYTES = 2 << 20
# Of records written in one call, each of which is two buffers of 1024 at most (IOV_MAX).
_APPENDED_MAX = 512
_LENGTHS_MAX = {DATA: _DATA_BYTES_MAX, ZERO: 2**63 - 1}
SLOTS = (0, 1)


class JournalDamaged(FuseDiskError):
    """A committed journal is not what was written."""


class JournalHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose pass a journal holds: from which point, towards which epoch."""

    id: Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern="^[0-9a-f]*$")]
    source_id: Text
    base_generation: Text | None
    base_epoch: Epoch | None
    epoch: Epoch


class _Trailer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    generation: Text
    epoch: Epoch
    heads: str


class Record(NamedTuple):
    """One change of a pass in bytes of a disk; without data it is zeros."""

    disk: int
    offset: int
    length: int
    data: memoryview | None


ChangedRange: TypeAlias = tuple[int, int, int]
"""Disk, offset and length."""


def journal_directory(directory: Path) -> Path:
    """Return where the replica in `directory` keeps its journals."""
    return directory / PRIVATE_DIRECTORY / "journal"


def remove_journals(files: Files, directory: Path, slots: Sequence[int] = SLOTS) -> int:
    """Remove whatever lies in the slots and return how many; none may be committed.

    The removal need not be durable: a journal that comes back is still not named by a manifest.
    """
    removed = 0
    for slot in slots:
        with suppress(FileNotFoundError):
            files.unlink(journal_directory(directory) / str(slot))
            removed += 1
    return removed


class JournalWriter:
    """A pass being received. Methods may be called from any thread."""

    def __init__(
        self, files: Files, directory: Path, slot: int, header: JournalHeader, kept: int = 0
    ) -> None:
        """Start a journal in a slot that no manifest names, or go on after its `kept` bytes.

        Raises OSError, and JournalDamaged where these are not what was written.
        """
        self._files = files
        self.id, self.slot = header.id, slot
        self.path = journal_directory(directory) / str(slot)
        self._key = _key(header.id)
        self._heads = xxhash.xxh3_128()
        self._mutex = threading.Lock()
        self.records = 0
        self._kept = 0, kept
        if kept:
            self._go_on(header, kept)
            return
        if not self.path.parent.is_dir():
            files.mkdir(self.path.parent)
            files.sync_directory(self.path.parent.parent)
        with suppress(FileNotFoundError):
            files.unlink(self.path)
        self._fd = files.create(self.path)
        try:
            self._end = files.write(self._fd, [_encode_header(header)], 0)
        except BaseException:
            self.drop()
            raise
        self._writeback = Writeback(files, self._fd)

    def _go_on(self, header: JournalHeader, kept: int) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise JournalDamaged(f"journal {self.path} is missing") from error
        try:
            begin = _check_header(self.path, self._fd, header.id, header.source_id)
            self._kept = begin, kept
            for raw, _, _ in _heads(self.path, self._fd, self._key, begin, kept):
                self._heads.update(raw)
                self.records += 1
            # What is beyond was not synced, and may be torn.
            self._files.truncate(self._fd, kept)
        except BaseException:
            self.close()
            raise
        self._end = kept
        self._writeback = Writeback(self._files, self._fd)

    def data(self, pieces: Sequence[Piece]) -> None:
        """Append data. Raises OSError."""
        records: list[tuple[Head, Buffer]] = []
        for disk, offset, data, digest in pieces:
            if digest is not None and data.nbytes <= _DATA_BYTES_MAX:
                records.append((Head(DATA, disk, offset, data.nbytes, digest), data))
                continue
            for at in range(0, data.nbytes, _DATA_BYTES_MAX):
                part = data[at : at + _DATA_BYTES_MAX]
                known = xxhash.xxh3_128_digest(part)
                records.append((Head(DATA, disk, offset + at, part.nbytes, known), part))
        for at in range(0, len(records), _APPENDED_MAX):
            self._append(records[at : at + _APPENDED_MAX])

    def zero(self, disk: int, offset: int, length: int) -> None:
        """Append a run of zeros. Raises OSError."""
        if length:
            self._append([(Head(ZERO, disk, offset, length, NO_DIGEST), b"")])

    def sync(self) -> int:
        """Make durable what was appended before, and return its length. Raises OSError."""
        with self._mutex:
            end = self._end
        self._files.sync(self._fd)
        self._files.sync_directory(self.path.parent)
        return end

    def seal(self, generation: str, epoch: int, time: float) -> JournalRef:
        """Make the journal whole and durable; what to name in the manifest.

        Raises OSError, and JournalDamaged where what was kept is not what was written.
        """
        # Invariant: what lay here since a pass was cut off is looked at before it is committed;
        # damage that is found later costs the point.
        for _, head, at in _heads(self.path, self._fd, self._key, *self._kept):
            if head.kind == DATA:
                data = _read_exactly(self.path, self._fd, head.length, at)
                if xxhash.xxh3_128_digest(data) != head.digest:
                    raise JournalDamaged(f"journal {self.path} is damaged at byte {at}")
        trailer = _Trailer(generation, epoch, self._heads.hexdigest())
        body = msgspec.json.encode(trailer)
        digest = xxhash.xxh3_128_digest(body)
        self._append([(Head(TRAILER, 0, self.records, len(body), digest), body)])
        # Invariant: content and name are durable before a manifest names this journal.
        self._files.sync(self._fd)
        self._files.sync_directory(self.path.parent)
        return JournalRef(self.slot, self.id, generation, epoch, time)

    def close(self) -> None:
        """Close the file and leave it as it is. Repeating it is fine."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def drop(self) -> None:
        """Remove a journal that is not to be committed, to give its room back."""
        self.close()
        # One that cannot be removed now is removed when the replica is opened next.
        with suppress(OSError):
            self._files.unlink(self.path)

    def _append(self, records: Sequence[tuple[Head, Buffer]]) -> None:
        buffers: list[Buffer] = []
        for head, data in records:
            buffers += [encode_head(head, self._key), data]
        with self._mutex:
            length = self._files.write(self._fd, buffers, self._end)
            self._writeback.wrote(self._end, length)
            self._end += length
            if records[0][0].kind != TRAILER:
                for raw in buffers[::2]:
                    self._heads.update(raw)
                self.records += len(records)


def read_journal(
    directory: Path, ref: JournalRef, source_id: str, disks: Sequence[ReplicaDisk]
) -> Iterator[Record]:
    """Yield the records of a committed journal in order, each checked before it is yielded.

    The data of one is void once the next is asked for. Raises JournalDamaged, which may come after
    good records.
    """
    with _opened(directory, ref) as (path, fd):
        reader = _Reader(path, fd, _WINDOW_BYTES)
        for head, position, count in _read_heads(reader, path, fd, ref, source_id, disks):
            data = None
            if head.kind == DATA:
                data = reader.take(position, head.length)
                if xxhash.xxh3_128_digest(data) != head.digest:
                    raise JournalDamaged(
                        f"journal {path} is damaged at byte {position - HEAD_BYTES} "
                        f"(data of record {count} is not what was written)"
                    )
            yield Record(head.disk, head.offset, head.length, data)


def read_ranges(
    directory: Path, ref: JournalRef, source_id: str, disks: Sequence[ReplicaDisk]
) -> Iterator[ChangedRange]:
    """Yield the ranges that a committed journal changes, in order; what they get is not looked at.

    Raises as `read_journal` does.
    """
    with _opened(directory, ref) as (path, fd):
        reader = _Reader(path, fd, HEAD_BYTES)
        for head, _, _ in _read_heads(reader, path, fd, ref, source_id, disks):
            yield head.disk, head.offset, head.length


@contextmanager
def _opened(directory: Path, ref: JournalRef) -> Iterator[tuple[Path, int]]:
    path = journal_directory(directory) / str(ref.slot)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise JournalDamaged(f"journal {path} cannot be opened: {error.strerror}") from error
    try:
        yield path, fd
    finally:
        os.close(fd)


class _Reader:
    """Reads a journal through one buffer, which spares a copy and a call for each record."""

    def __init__(self, path: Path, fd: int, window: int) -> None:
        self._path, self._fd, self._window = path, fd, window
        self._buffer = memoryview(bytearray(max(window, HEAD_BYTES)))
        self._begin = self._end = 0

    def take(self, position: int, length: int) -> memoryview:
        """What is at a place; void with the next call. Raises JournalDamaged."""
        if position < self._begin or position + length > self._end:
            self._fill(position, length)
        return self._buffer[position - self._begin : position - self._begin + length]

    def _fill(self, position: int, length: int) -> None:
        self._begin = self._end = position
        try:
            while self._end < position + length:
                free = self._buffer[self._end - position :]
                done = os.preadv(self._fd, [free], self._end)
                if not done:
                    raise JournalDamaged(f"journal {self._path} ends at byte {self._end}")
                self._end += done
        except OSError as error:
            problem = f"journal {self._path} cannot be read: {error.strerror}"
            raise JournalDamaged(problem) from error


def _read_heads(
    reader: _Reader,
    path: Path,
    fd: int,
    ref: JournalRef,
    source_id: str,
    disks: Sequence[ReplicaDisk],
) -> Iterator[tuple[Head, int, int]]:
    """Yield the heads of a committed journal, checked, each with its data's place and its number.

    Ends with a trailer that belongs to them.
    """
    position = _check_header(path, fd, ref.id, source_id)
    key = _key(ref.id)
    heads = xxhash.xxh3_128()
    count = 0
    while True:
        where = f"journal {path} is damaged at byte {position}"
        raw = bytes(reader.take(position, HEAD_BYTES))
        head = decode_head(raw, key)
        if head is None:
            raise JournalDamaged(f"{where} (record {count} does not match its checksum)")
        kind, disk, offset, length, digest = head
        position += HEAD_BYTES
        if kind == TRAILER:
            _check_trailer(path, fd, ref, position, length, digest, (offset, count), heads)
            return
        heads.update(raw)
        if kind not in (DATA, ZERO) or disk >= len(disks) or offset + length > disks[disk].size:
            raise JournalDamaged(f"{where} (record {count} is outside the disks)")
        if kind == DATA and length > _DATA_BYTES_MAX:
            raise JournalDamaged(f"{where} (record {count} is too large)")
        yield head, position, count
        if kind == DATA:
            position += length
        count += 1


def _heads(
    path: Path, fd: int, key: int, position: int, end: int
) -> Iterator[tuple[bytes, Head, int]]:
    """Yield the heads of the records between two places, checked, each with where its data is."""
    while position < end:
        raw = _read_exactly(path, fd, HEAD_BYTES, position)
        head = decode_head(raw, key)
        if head is None or head.kind not in (DATA, ZERO) or head.length > _LENGTHS_MAX[head.kind]:
            raise JournalDamaged(f"journal {path} is damaged at byte {position}")
        yield raw, head, position + HEAD_BYTES
        position += HEAD_BYTES + (head.length if head.kind == DATA else 0)
    if position > end:
        raise JournalDamaged(f"journal {path} is damaged (a record goes beyond byte {end})")


def _check_header(path: Path, fd: int, journal_id: str, source_id: str) -> int:
    """Check that this is the journal meant; return where its records begin."""
    fixed = _read_exactly(path, fd, _HEADER.size, 0)
    magic, version, length = _HEADER.unpack(fixed)
    begin: int = _HEADER.size + length + 16
    if magic != _MAGIC or version != _VERSION or length > _BODY_BYTES_MAX:
        raise JournalDamaged(f"journal {path} is damaged (no header of version {_VERSION})")
    body = _read_exactly(path, fd, length + 16, _HEADER.size)
    if xxhash.xxh3_128_digest(fixed + body[:length]) != body[length:]:
        raise JournalDamaged(f"journal {path} is damaged (header does not match its checksum)")
    try:
        header = msgspec.json.decode(body[:length], type=JournalHeader)
    except msgspec.DecodeError as error:
        raise JournalDamaged(f"journal {path} is damaged ({error})") from error
    if header.id != journal_id or header.source_id != source_id:
        raise JournalDamaged(f"journal {path} is not the one that the manifest names")
    return begin


def _check_trailer(
    path: Path,
    fd: int,
    ref: JournalRef,
    position: int,
    length: int,
    digest: bytes,
    counts: tuple[int, int],
    heads: xxhash.xxh3_128,
) -> None:
    body = _read_exactly(path, fd, min(length, _BODY_BYTES_MAX), position)
    problem = None
    if xxhash.xxh3_128_digest(body) != digest:
        problem = "trailer does not match its checksum"
    elif counts[0] != counts[1]:
        problem = f"{counts[1]} records where there were {counts[0]}"
    elif body != msgspec.json.encode(_Trailer(ref.generation, ref.epoch, heads.hexdigest())):
        problem = "trailer is of another pass"
    if problem is not None:
        raise JournalDamaged(f"journal {path} is damaged ({problem})")


def _encode_header(header: JournalHeader) -> bytes:
    body = msgspec.json.encode(header)
    content = _HEADER.pack(_MAGIC, _VERSION, len(body)) + body
    return content + xxhash.xxh3_128_digest(content)


def _key(journal_id: str) -> int:
    """Return a seed, so that no record left over from another journal in the slot checks."""
    return int(journal_id[16:], 16)


def _read_exactly(path: Path, fd: int, length: int, offset: int) -> bytes:
    data = b""
    try:
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                raise JournalDamaged(f"journal {path} ends at byte {offset + len(data)}")
            data += more
    except OSError as error:
        raise JournalDamaged(f"journal {path} cannot be read: {error.strerror}") from error
    return data
