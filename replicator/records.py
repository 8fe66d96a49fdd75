"""The records that journals and undo files are made of: a range of a disk and what it holds.

A head of 48 bytes, little-endian: u8 kind (1 data, 2 zeros, 3 a journal's trailer), u8 0, u16
disk, u32 0, u64 offset, u64 length, xxh3-128 of the data (zeros for kind 2), xxh3-64 of all that,
seeded by the file. The data follows it.
"""

import struct
from typing import NamedTuple

import xxhash

_HEAD = struct.Struct("<BBHIQQ16s")
HEAD_BYTES = _HEAD.size + 8
DATA, ZERO, TRAILER = 1, 2, 3
NO_DIGEST = bytes(16)


class Piece(NamedTuple):
    """Data for byte `offset` of disk number `disk`, with its xxh3-128 where that is known."""

    disk: int
    offset: int
    data: memoryview
    digest: bytes | None = None


class Head(NamedTuple):
    """A range of `length` bytes at byte `offset` of disk number `disk`."""

    kind: int
    disk: int
    offset: int
    length: int
    digest: bytes


def encode_head(head: Head, seed: int) -> bytes:
    """Return the bytes of a head with its checksum."""
    raw = _HEAD.pack(head.kind, 0, head.disk, 0, head.offset, head.length, head.digest)
    return raw + xxhash.xxh3_64_digest(raw, seed)


def decode_head(raw: bytes, seed: int) -> Head | None:
    """Return the head in `raw`; None where it is short or does not match its checksum."""
    if (
        len(raw) != HEAD_BYTES
        or xxhash.xxh3_64_digest(raw[: _HEAD.size], seed) != raw[_HEAD.size :]
    ):
        return None
    kind, _, disk, _, offset, length, digest = _HEAD.unpack_from(raw)
    return Head(kind, disk, offset, length, digest)
