"""What the two ends of a replication say to each other.

Everything structured is a msgspec Struct carried as msgpack, one frame type each. Two events
are not: `Data` and `Zero`, whose frames are fixed so that bulk bytes are never encoded. How any of
them becomes bytes is `replicator.wire`'s business.

Every string and list has a bound, so that what the peer sends can make us allocate only so much.
msgspec checks the bounds when it decodes; `replicator.wire` decodes what it is about to send, so
that a value out of bounds is the fault of the side that made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import xxhash
import zstandard
from msgspec import Meta, Struct

KIB = 1024
MIB = 1024 * KIB

DATA_BYTES_MAX = MIB
"""Bulk bytes in one `Data`."""
MESSAGE_BYTES_MAX = MIB
"""Encoded bytes of one structured message."""
DISKS_MAX = 64
OFFSET_MAX = 2**63 - 1
"""The largest offset, and the largest end of a range: what a signed file offset can hold."""
DIGEST_BYTES = 16
HASH_BLOCK_BYTES = 64 * KIB
HASH_LENGTH_MAX = 256 * MIB
"""Bytes of disk one `HashRequest` may cover."""
RECEIVED_MAX = 16
"""Points that an `Opened` names of a pass to go on with."""
HASH_SEGMENTS_MAX = HASH_LENGTH_MAX // HASH_BLOCK_BYTES

# What an encoded Segment takes besides its digests: four names (31 bytes with their lengths), a map
# byte, two u64 (18), a bool and the head of a bin (3), rounded up.
_SEGMENT_OVERHEAD_BYTES_MAX = 64

# The relations between the limits, asserted here and nowhere else. Each segment may end in a short
# block, so there can be as many blocks again as there are segments.
assert DISKS_MAX <= 2**16, "a frame header holds a disk in a u16"
assert DATA_BYTES_MAX + 32 < 2**32 and MESSAGE_BYTES_MAX < 2**32, "lengths are u32"
assert DATA_BYTES_MAX % HASH_BLOCK_BYTES == 0
assert (
    HASH_SEGMENTS_MAX * (_SEGMENT_OVERHEAD_BYTES_MAX + 2 * DIGEST_BYTES) + KIB <= MESSAGE_BYTES_MAX
), "the largest legal Hashes must fit in a message"
assert DISKS_MAX * 2 * KIB < MESSAGE_BYTES_MAX, "the largest legal Open must fit in a message"


class LocalProtocolError(Exception):
    """This side tried something the protocol does not allow; the peer has seen nothing of it."""


class RemoteProtocolError(Exception):
    """The peer broke the rules, or bytes were damaged on the way; the text is one line."""


class PeerSpeaksTls(RemoteProtocolError):
    """The peer's first bytes are TLS."""


# msgspec takes no bound above a signed 64-bit integer; msgpack itself ends at a u64.
U64: TypeAlias = Annotated[int, Meta(ge=0)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=OFFSET_MAX)]
Length: TypeAlias = Annotated[int, Meta(ge=1, le=OFFSET_MAX)]
DiskIndex: TypeAlias = Annotated[int, Meta(ge=0, le=DISKS_MAX - 1)]
Version: TypeAlias = Annotated[int, Meta(ge=1, le=2**16 - 1)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=255)]
Ident: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128)]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything that travels as msgpack."""


Digest: TypeAlias = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Hello(Message, frozen=True):
    """The sender's first word: the versions it speaks and the seed for hashes of disk blocks."""

    versions: Annotated[list[Version], Meta(min_length=1, max_length=16)]
    purpose: Literal["replicate", "verify", "resolve", "list", "restore"]
    seed: U64


class Welcome(Message, frozen=True):
    """The receiver's choice among the versions offered."""

    version: Version


class DiskInfo(Message, frozen=True):
    """One disk of an `Open`; later frames name it by its place in the list."""

    name: Name
    size: Count
    chunk_size: Length


class Open(Message, frozen=True):
    """Which replica the sender means, and the state of its source."""

    name: Name
    source_id: Ident
    instance: Ident
    generation: Ident
    epoch: Count
    disks: Annotated[list[DiskInfo], Meta(min_length=1, max_length=DISKS_MAX)]


class Reached(Message, frozen=True):
    """A point on the way of a pass: all before it that was not written since is as at the epoch.

    "Before" counts the disks in the order of `Open`.
    """

    generation: Ident
    epoch: Count
    disk: DiskIndex
    offset: Count


class Opened(Message, frozen=True):
    """What the receiver has under that name. ``applying``: its images are between two points.

    ``reached`` is durable, of a fill or comparison that was cut off. ``received`` is of a pass on
    top of the committed epoch: each holds by itself. ``kept`` is the digest of the
    pass that either is of, as it was noted. ``root`` is the committed epoch's, if it is known.

    Where a pass is kept in a journal, which takes ``kept_bytes``, the target has ``room`` for so
    many bytes more.
    """

    state: Literal["new", "existing", "filling", "following", "promoted"]
    generation: Ident | None
    epoch: Count | None
    token: Ident | None
    applying: bool = False
    reached: Reached | None = None
    received: Annotated[list[Reached], Meta(max_length=RECEIVED_MAX)] = []
    root: Digest | None = None
    kept: Digest | None = None
    room: Count | None = None
    kept_bytes: Count = 0


class Begin(Message, frozen=True):
    """A pass starts: what follows until `Commit` belongs to this epoch.

    `data_bytes`: about how much data it will have; 0 where that is not known, or little.
    `continues`: on top of what Opened said to be `received`, which is dropped otherwise, or towards
    the epoch that was `reached`. `root`: a chain begins anew with it, which the pass goes into.
    """

    epoch: Count
    kind: Literal["fill", "compare", "pass"]
    data_bytes: Count = 0
    continues: bool = False
    root: Digest | None = None


class HashRequest(Message, frozen=True):
    """Ask the receiver what it holds in a range."""

    disk: DiskIndex
    offset: Count
    length: Annotated[int, Meta(ge=1, le=HASH_LENGTH_MAX)]

    def __post_init__(self) -> None:
        _check_range(self.offset, self.length)


class Segment(Message, frozen=True):
    """A part of a hashed range: all zero, or one digest for each block of 64 KiB.

    Blocks are counted from the segment's own offset; the last may be short.
    """

    offset: Count
    length: Annotated[int, Meta(ge=1, le=HASH_LENGTH_MAX)]
    zero: bool
    digests: Annotated[bytes, Meta(max_length=HASH_SEGMENTS_MAX * DIGEST_BYTES)]

    def __post_init__(self) -> None:
        blocks = 0 if self.zero else -(-self.length // HASH_BLOCK_BYTES)
        if len(self.digests) != blocks * DIGEST_BYTES:
            raise ValueError("a segment's digests do not match its length")


class Hashes(Message, frozen=True):
    """The answer to a `HashRequest`: segments that cover the range without gap or overlap."""

    disk: DiskIndex
    offset: Count
    length: Annotated[int, Meta(ge=1, le=HASH_LENGTH_MAX)]
    segments: Annotated[list[Segment], Meta(min_length=1, max_length=HASH_SEGMENTS_MAX)]

    def __post_init__(self) -> None:
        _check_range(self.offset, self.length)
        position = self.offset
        for segment in self.segments:
            if segment.offset != position:
                raise ValueError("segments leave a gap or overlap")
            position += segment.length
        if position != self.offset + self.length:
            raise ValueError("segments do not cover the range")


class Checkpoint(Message, frozen=True):
    """All transfers of the pass before this point have been sent; worth noting durably.

    How many there were since Begin, and a digest over them.
    """

    reached: Reached
    transfers: Count
    digest: Annotated[bytes, Meta(max_length=64)]


class Commit(Message, frozen=True):
    """The pass is complete: how many transfers it had, and a digest over them.

    `consistent`: with it the disks are as they were at one instant, the end of that epoch. A first
    fill reads them while they change, so it is not. `frozen`: the guest was frozen at that instant.
    """

    generation: Ident
    epoch: Count
    transfers: Count
    digest: Annotated[bytes, Meta(max_length=64)]
    consistent: bool = True
    frozen: bool = False


class Committed(Message, frozen=True):
    """The pass is durable at the receiver."""

    generation: Ident
    epoch: Count


class Promote(Message, frozen=True):
    """Make the replica the one that runs; the token says by whose decision.

    `root`: to be refused where it is not the replica's own.
    """

    token: Ident
    epoch: Count
    root: Digest | None = None


class Promoted(Message, frozen=True):
    """The replica is promoted under this token, at this epoch."""

    token: Ident
    epoch: Count


class Abort(Message, frozen=True):
    """Never promote under this token."""

    token: Ident


class Aborted(Message, frozen=True):
    """The token is void for good; without one, the replica is not promoted."""

    token: Ident | None


class Resolve(Message, frozen=True):
    """Ask how a promotion ended whose answer was lost; without a token, whether there was one.

    The token of the answer is that of the promotion, which may be another: `replicator promote`.
    """

    name: Name
    source_id: Ident
    token: Ident | None


class Restore(Message, frozen=True):
    """Ask to read a replica as it was at a recovery point, by default the newest."""

    name: Name
    point: Count | None


class Restorable(Message, frozen=True):
    """The point that is read from now on, and the disks, which later frames name by their place."""

    point: Count
    generation: Ident
    epoch: Count
    disks: Annotated[list[DiskInfo], Meta(min_length=1, max_length=DISKS_MAX)]


class ReadRequest(Message, frozen=True):
    """Ask for a range of the point: the answer is Data and Zero that cover it in order."""

    disk: DiskIndex
    offset: Count
    length: Annotated[int, Meta(ge=1, le=HASH_LENGTH_MAX)]

    def __post_init__(self) -> None:
        _check_range(self.offset, self.length)


class Ping(Message, frozen=True):
    """Is anybody there?"""

    nonce: U64


SIGN_OF_LIFE = 0
"""The nonce of a `Pong` that answers nothing."""


class Pong(Message, frozen=True):
    """The answer to a `Ping`, with its nonce, or a sign of life during a long step."""

    nonce: U64


class Failed(Message, frozen=True):
    """The last word of a side that cannot go on."""

    code: Annotated[str, Meta(min_length=1, max_length=64)]
    message: Annotated[str, Meta(max_length=1024)]


class Bye(Message, frozen=True):
    """The last word of a side that is done."""


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a disk, with the xxh3-128 of them.

    Where `packed_from` is not 0, `data` is one zstd frame of that many bytes of the disk.
    """

    disk: int
    offset: int
    digest: bytes
    data: memoryview
    packed_from: int = 0

    @classmethod
    def of(cls, disk: int, offset: int, data: bytes | bytearray | memoryview) -> Data:
        """Make one with the digest computed here. The bytes are not copied."""
        view = memoryview(data)
        return cls(disk, offset, xxhash.xxh3_128_digest(view), view)

    @property
    def length(self) -> int:
        """Bytes of the disk."""
        return self.packed_from or len(self.data)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that it keeps: the whole buffer that its bytes are a part of."""
        return memoryview(self.data.obj).nbytes

    def content(self) -> memoryview | bytes:
        """The disk's bytes, unpacked and compared with their digest.

        Apart from decoding, because it is work that a session may want on a thread.

        Raises:
            RemoteProtocolError: they are not the bytes that were sent.
        """
        content: memoryview | bytes = self.data
        if self.packed_from:
            content = _unpacked(self.data, self.packed_from)
        if xxhash.xxh3_128_digest(content) != self.digest:
            raise RemoteProtocolError(
                f"data of disk {self.disk} at offset {self.offset} does not match its digest"
            )
        return content


def _unpacked(data: memoryview, length: int) -> bytes:
    try:
        # Checked before anything is allocated: the frame's own word is what the library believes.
        if zstandard.frame_content_size(data) != length:
            raise RemoteProtocolError("packed data does not say its length")
        content = zstandard.ZstdDecompressor(max_window_size=2 * DATA_BYTES_MAX).decompress(
            data, max_output_size=length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(f"packed data cannot be unpacked: {error}") from None
    if len(content) != length:
        raise RemoteProtocolError("packed data is not as long as it says")
    return content


@dataclass(frozen=True, slots=True)
class Zero:
    """A run of a disk that reads as zeros."""

    disk: int
    offset: int
    length: int


Event: TypeAlias = Message | Data | Zero


def _check_range(offset: int, length: int) -> None:
    if offset + length > OFFSET_MAX:
        raise ValueError("the range ends beyond the largest offset")
