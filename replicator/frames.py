"""The frames of the replication protocol: one event to bytes, and bytes to one event after another.

A frame is a header of 24 bytes, little-endian, and a payload:

    ======  =====  ==========================================================
    offset  size   field
    ======  =====  ==========================================================
    0       4      magic and version of the framing, b"FDW1"
    4       1      frame type
    5       1      flags, 0
    6       2      disk (Data and Zero; 0 in all others)
    8       4      length of the payload
    12      4      reserved, 0
    16      8      xxh3-64 of bytes 0 to 15 and the payload; of a Data frame's
                   payload only the prefix is included
    ======  =====  ==========================================================

A Data payload is a prefix of 32 bytes (u64 offset, u64 packed, xxh3-128 of the disk's bytes) and
the data. Where packed is 0 the data is the disk's bytes. Else it is one zstd frame that states and
holds so many bytes of the disk, and is shorter than they are. A Zero payload is u64 offset, u64
length. Every other payload is one msgpack map.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import msgspec
import xxhash

from replicator import messages as m
from replicator.messages import (
    DATA_BYTES_MAX,
    DIGEST_BYTES,
    DISKS_MAX,
    KIB,
    MESSAGE_BYTES_MAX,
    OFFSET_MAX,
    Data,
    Event,
    LocalProtocolError,
    PeerSpeaksTls,
    RemoteProtocolError,
    Zero,
)

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC: Final = b"FDW1"
_HEADER: Final = struct.Struct("<4sBBHII")
_CHECKSUM: Final = struct.Struct("<Q")
_PREFIX: Final = struct.Struct(f"<QQ{DIGEST_BYTES}s")
_ZERO: Final = struct.Struct("<QQ")
_HEAD_BYTES: Final = _HEADER.size + _CHECKSUM.size
assert (_HEADER.size, _HEAD_BYTES, _PREFIX.size) == (16, 24, 32)
HEADER_BYTES: Final = _HEAD_BYTES

# The numbers are the format: never reuse one.
FRAME_TYPES: Final[Mapping[int, type[Event]]] = {
    1: m.Hello,
    2: m.Welcome,
    3: m.Open,
    4: m.Opened,
    5: m.Begin,
    6: Data,
    7: Zero,
    8: m.HashRequest,
    9: m.Hashes,
    10: m.Commit,
    11: m.Committed,
    12: m.Promote,
    13: m.Promoted,
    14: m.Abort,
    15: m.Aborted,
    16: m.Resolve,
    17: m.Ping,
    18: m.Pong,
    19: m.Failed,
    20: m.Bye,
    21: m.Restore,
    22: m.Restorable,
    23: m.ReadRequest,
    27: m.Checkpoint,
}
_FRAME_NUMBERS: Final = {kind: number for number, kind in FRAME_TYPES.items()}
_DECODERS: Final[Mapping[type[Event], msgspec.msgpack.Decoder[m.Message]]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in FRAME_TYPES.values()
    if issubclass(kind, m.Message)
}
# What a frame of a kind may make us allocate, before its sender is known to be honest.
_SMALL_BYTES_MAX: Final = 8 * KIB
MESSAGE_BYTES_BY_KIND: Final[Mapping[type[Event], int]] = {
    **dict.fromkeys(_DECODERS, _SMALL_BYTES_MAX),
    m.Open: 128 * KIB,
    m.Restorable: 128 * KIB,
    m.Hashes: MESSAGE_BYTES_MAX,
}
# Buffers that are used again have a few sizes alone; smaller ones are not worth keeping.
_SPARE_BYTES_MIN: Final = 64 * KIB
_SPARE_BYTES_MAX: Final = 16 * DATA_BYTES_MAX
_ENCODER: Final = msgspec.msgpack.Encoder()


def encode(event: Event) -> list[bytes | memoryview]:
    """Return the buffers that make up an event's frame.

    Raises:
        LocalProtocolError: a value in the event is out of bounds.
    """
    kind = type(event)
    if isinstance(event, Data):
        data = memoryview(event.data)
        if not data.c_contiguous or not 1 <= data.nbytes <= DATA_BYTES_MAX:
            raise LocalProtocolError(f"data must be 1 to {DATA_BYTES_MAX} contiguous bytes")
        if len(event.digest) != DIGEST_BYTES:
            raise LocalProtocolError(f"a digest has {DIGEST_BYTES} bytes")
        _check_packed(event.packed_from, data.nbytes, LocalProtocolError)
        _check_extent(event.disk, event.offset, event.length, LocalProtocolError)
        prefix = _PREFIX.pack(event.offset, event.packed_from, event.digest)
        return [_frame(kind, event.disk, prefix, data.nbytes), data.cast("B")]
    if isinstance(event, Zero):
        _check_extent(event.disk, event.offset, event.length, LocalProtocolError)
        return [_frame(kind, event.disk, _ZERO.pack(event.offset, event.length))]
    try:
        payload = _ENCODER.encode(event)
        # Constructing a Struct checks no types or bounds; decoding does, as the peer will.
        _DECODERS[kind].decode(payload)
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError) as error:
        raise LocalProtocolError(f"{kind.__name__} cannot be sent: {error}") from error
    if len(payload) > MESSAGE_BYTES_BY_KIND[kind]:
        raise LocalProtocolError(
            f"{kind.__name__} is longer than {MESSAGE_BYTES_BY_KIND[kind]} bytes"
        )
    return [_frame(kind, 0, payload)]


def _frame(kind: type[Event], disk: int, covered: bytes, bulk_bytes: int = 0) -> bytes:
    header = _HEADER.pack(MAGIC, _FRAME_NUMBERS[kind], 0, disk, len(covered) + bulk_bytes, 0)
    return header + _CHECKSUM.pack(_checksum(header, covered)) + covered


def _checksum(header: Buffer, covered: Buffer) -> int:
    state = xxhash.xxh3_64(header)
    state.update(covered)
    return state.intdigest()


def _check_packed(packed_from: int, packed: int, error: type[Exception]) -> None:
    if packed_from and not packed < packed_from <= DATA_BYTES_MAX:
        raise error(f"{packed} bytes of packed data cannot stand for {packed_from}")


def _check_extent(disk: int, offset: int, length: int, error: type[Exception]) -> None:
    if not 0 <= disk < DISKS_MAX:
        raise error(f"disk {disk} is beyond the {DISKS_MAX} there can be")
    if offset < 0 or length < 1 or offset + length > OFFSET_MAX:
        raise error(f"offset {offset}, length {length} is not a range of a disk")


class Reader:
    """Cuts the stream into frames, each part received straight into a buffer of its own.

    The parts are the header, what the checksum covers, and for Data the bulk bytes. A part's buffer
    is allocated only when its length has been checked, and bulk only under a valid checksum.
    """

    def __init__(self) -> None:
        self._head = memoryview(bytearray(_HEAD_BYTES))
        self._spare: list[bytearray] = []
        self._spare_bytes = 0
        self._restart()

    def recycle(self, data: memoryview) -> None:
        """Use the buffer of a Data again, which nobody may look at any more."""
        buffer = data.obj
        if not isinstance(buffer, bytearray) or len(buffer) < _SPARE_BYTES_MIN:
            return
        self._spare.append(buffer)
        self._spare_bytes += len(buffer)
        while self._spare_bytes > _SPARE_BYTES_MAX:
            # The one that was of no use for longest: frames are of another size by now.
            self._spare_bytes -= len(self._spare.pop(0))

    def _bulk(self) -> memoryview:
        # Fresh pages cost more than all else that is done with the bytes in them.
        if self._bulk_bytes < _SPARE_BYTES_MIN:
            return memoryview(bytearray(self._bulk_bytes))
        # Invariant: what is received takes less than twice its length, however it is cut.
        size = 1 << (self._bulk_bytes - 1).bit_length()
        return memoryview(self._reused(size) or bytearray(size))[: self._bulk_bytes]

    def _reused(self, size: int) -> bytearray | None:
        for at in reversed(range(len(self._spare))):
            if len(self._spare[at]) == size:
                self._spare_bytes -= size
                return self._spare.pop(at)
        return None

    def _restart(self) -> None:
        self._kind: type[Event] | None = None
        self._covered: memoryview | None = None
        self._bulk_bytes = 0
        self._expect(self._head)

    def _expect(self, part: memoryview) -> None:
        self._part = part
        self._filled = 0

    @property
    def inside_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self._part is not self._head or self._filled > 0

    def vacant(self) -> memoryview:
        """Return where the next bytes belong; never empty."""
        return self._part[self._filled :]

    def advance(self, count: int, check_kind: Callable[[type[Event]], None]) -> Event | None:
        """Count bytes placed in `vacant()`; return the event if they complete one.

        `check_kind` is called with the type of a frame before its payload gets a buffer, and may
        refuse it by raising.

        Raises:
            RemoteProtocolError: these are not the bytes of a valid frame. The reader is of no
                further use.
        """
        self._filled += count
        if self._part is self._head:
            # At once: a foreign peer may say less than a header and then wait for an answer.
            _check_magic(bytes(self._head[: min(self._filled, len(MAGIC))]))
        if self._filled < len(self._part):
            return None
        if self._kind is None:
            self._begin(check_kind)
            return None
        if self._covered is None:
            self._covered = self._part
            self._check_covered(self._covered)
            if self._bulk_bytes:
                # The event keeps it until it is given back.
                self._expect(self._bulk())
                return None
        event = self._event(self._kind, self._covered)
        self._restart()
        return event

    def _begin(self, check_kind: Callable[[type[Event]], None]) -> None:
        _, number, flags, disk, length, reserved = _HEADER.unpack_from(self._head)
        kind = FRAME_TYPES.get(number)
        if kind is None:
            raise RemoteProtocolError(f"peer sent a frame of unknown type {number}")
        if flags or reserved or disk >= (DISKS_MAX if kind in (Data, Zero) else 1):
            raise RemoteProtocolError(f"peer sent a malformed {kind.__name__} header")
        least, most = _length_bounds(kind)
        if not least <= length <= most:
            raise RemoteProtocolError(f"peer sent a {kind.__name__} with a length of {length}")
        check_kind(kind)
        self._kind, self._disk = kind, disk
        self._bulk_bytes = length - _PREFIX.size if kind is Data else 0
        self._expect(memoryview(bytearray(length - self._bulk_bytes)))

    def _check_covered(self, covered: memoryview) -> None:
        (expected,) = _CHECKSUM.unpack_from(self._head, _HEADER.size)
        if _checksum(self._head[: _HEADER.size], covered) != expected:
            raise RemoteProtocolError("a frame was damaged on the way: its checksum does not match")
        if self._kind is Data:
            offset, packed_from, _ = _PREFIX.unpack(covered)
            _check_packed(packed_from, self._bulk_bytes, RemoteProtocolError)
            _check_extent(self._disk, offset, packed_from or self._bulk_bytes, RemoteProtocolError)

    def _event(self, kind: type[Event], covered: memoryview) -> Event:
        if kind is Data:
            offset, packed_from, digest = _PREFIX.unpack(covered)
            return Data(self._disk, offset, digest, self._part.toreadonly(), packed_from)
        if kind is Zero:
            offset, length = _ZERO.unpack(covered)
            _check_extent(self._disk, offset, length, RemoteProtocolError)
            return Zero(self._disk, offset, length)
        try:
            return _DECODERS[kind].decode(covered)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            # The text may quote the peer's bytes: repr keeps it to one line.
            detail = repr(str(error)[:200])
            raise RemoteProtocolError(f"peer sent a bad {kind.__name__}: {detail}") from error


def _length_bounds(kind: type[Event]) -> tuple[int, int]:
    if kind is Data:
        return _PREFIX.size + 1, _PREFIX.size + DATA_BYTES_MAX
    if kind is Zero:
        return _ZERO.size, _ZERO.size
    return 1, MESSAGE_BYTES_BY_KIND[kind]


def _check_magic(start: bytes) -> None:
    if MAGIC.startswith(start):
        return
    # A record of TLS, handshake or alert (RFC 8446, 5.1): the likeliest mistake has a remedy.
    if start[0] in (0x15, 0x16):
        raise PeerSpeaksTls("peer speaks TLS: write tls:// on both sides, or on none")
    if start[:3] == MAGIC[:3]:
        raise RemoteProtocolError("peer speaks another version of the fusedisk framing")
    raise RemoteProtocolError("peer does not speak the fusedisk protocol")
