"""The file of the activity log (STATE/activity): its format, making and checked reading.

Two copies of each block of 4096 bytes, one behind the other. A block has 32384 regions of 16 MiB:

    0   8 bytes   b"FDACT01\\0"
    8   16 bytes  generation of the mount (UUID)
    24  u64       sequence number: of the copies that check, the higher one counts
    32  u64       regions of all disks together
    40  u32       number of the block
    44  u32       CRC-32 (zlib) of the block with 0 in this place
    48            one bit for each region, the lowest bit of a byte first; 1 is in use

Numbers are little-endian. A copy is written only while the other one is known to be durable and is
older by one, so a write that was torn, and therefore never answered, costs nothing. Disks follow
one another, each begins with a region of its own. The length never changes: no write can lack room.
"""

import struct
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fusedisk.state import write_durably

MAGIC = b"FDACT01\0"
BLOCK = 4096
HEAD = 48
REGIONS_IN_BLOCK = (BLOCK - HEAD) * 8
REGION_BYTES = 16 << 20

# 4 PiB. The server needs one byte of memory for each.
REGIONS_MAX = 1 << 28

_FIELDS = struct.Struct("<8s16sQQII")


class Parsed(NamedTuple):
    """A checked file: for each block its number of writes and which copy is the newest."""

    generation: bytes
    regions: int
    sequences: list[int]
    newest: list[int]
    hot: list[int]


def first_regions(sizes: Sequence[int]) -> list[int]:
    """For disks of these bytes: the first region of each, and the number of all regions."""
    firsts = [0]
    for size in sizes:
        firsts.append(firsts[-1] + -(-size // REGION_BYTES))
    return firsts


def encode(generation: str, regions: int, hot: Iterable[int] = ()) -> bytes:
    """A new file's content."""
    if not 0 < regions <= REGIONS_MAX:
        raise ValueError(f"{regions} regions are out of range")
    blocks = -(-regions // REGIONS_IN_BLOCK)
    bits = [bytearray(BLOCK - HEAD) for _ in range(blocks)]
    for region in hot:
        block, bit = divmod(region, REGIONS_IN_BLOCK)
        bits[block][bit // 8] |= 1 << bit % 8
    identity = uuid.UUID(generation).bytes
    content = bytearray()
    for block in range(blocks):
        for sequence in (0, 1):
            head = _FIELDS.pack(MAGIC, identity, sequence, regions, block, 0)
            crc = zlib.crc32(head + bits[block])
            content += _FIELDS.pack(MAGIC, identity, sequence, regions, block, crc) + bits[block]
    return bytes(content)


def parse(content: bytes, generation: str) -> Parsed:
    """Check a file's content. Raises ValueError where a block has no copy of this generation."""
    identity = uuid.UUID(generation).bytes
    blocks, rest = divmod(len(content), 2 * BLOCK)
    if rest or not blocks:
        raise ValueError("the activity log has a wrong length")
    found = Parsed(identity, _regions(content, identity), [], [], [])
    if -(-found.regions // REGIONS_IN_BLOCK) != blocks:
        raise ValueError("the activity log has a wrong length")
    for block in range(blocks):
        sequence, copy, bits = _newest(content, identity, found.regions, block)
        found.sequences.append(sequence)
        found.newest.append(copy)
        for at, byte in enumerate(bits):
            if byte:
                first = block * REGIONS_IN_BLOCK + at * 8
                found.hot.extend(first + bit for bit in range(8) if byte >> bit & 1)
    if found.hot and found.hot[-1] >= found.regions:
        raise ValueError("the activity log names a region beyond the disks")
    return found


def _copy(content: bytes, identity: bytes, at: int) -> tuple[int, int, int, bytes] | None:
    """(sequence, regions, block, bits) of the copy at an offset, None where it does not check."""
    page = content[at : at + BLOCK]
    magic, owner, sequence, regions, block, crc = _FIELDS.unpack_from(page)
    if magic != MAGIC or owner != identity:
        return None
    if zlib.crc32(page[: HEAD - 4] + bytes(4) + page[HEAD:]) != crc:
        return None
    return sequence, regions, block, page[HEAD:]


def _regions(content: bytes, identity: bytes) -> int:
    for at in (0, BLOCK):
        if found := _copy(content, identity, at):
            return found[1]
    raise ValueError("the activity log is damaged or of another mount")


def _newest(content: bytes, identity: bytes, regions: int, block: int) -> tuple[int, int, bytes]:
    best: tuple[int, int, bytes] | None = None
    for copy in (0, 1):
        found = _copy(content, identity, (2 * block + copy) * BLOCK)
        if found and found[1:3] == (regions, block) and (best is None or found[0] > best[0]):
            best = found[0], copy, found[3]
    if best is None:
        raise ValueError("the activity log is damaged or of another mount")
    return best


def create(path: Path, generation: str, regions: int, hot: Iterable[int] = ()) -> None:
    """Make or replace the log, durably. Raises OSError."""
    write_durably(path, encode(generation, regions, hot))


def read(path: Path, generation: str, regions: int) -> list[int]:
    """The regions on record. Raises OSError, or ValueError for a log that is not this one."""
    size = 2 * BLOCK * -(-regions // REGIONS_IN_BLOCK)
    with path.open("rb") as file:
        content = file.read(size + 1)
    found = parse(content, generation)
    if found.regions != regions:
        raise ValueError("the activity log is of other disks")
    return found.hot
