"""Whether a target holds the very state that this source was born from: then nothing old is sent.

The names agree if both come from one cutover (replicator.adoption, fusedisk.lineage). They are
believed only after a sample of what nobody wrote since has the same hashes on both sides; a
`replicator verify` compares all of it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from fusedisk.extents import data_extents
from replicator.adoption import cutover_point
from replicator.messages import HASH_BLOCK_BYTES, Opened
from replicator.source import Source

if TYPE_CHECKING:
    from replicator.sender import Session

log = logging.getLogger("replicator.sender")

_SAMPLES = 32
_SAMPLE_BYTES = 4 * HASH_BLOCK_BYTES


async def holds_base(session: Session, source: Source, opened: Opened) -> bool:
    """Whether the target is at the promotion that the source's generation began from.

    Raises what the session's link raises.
    """
    base = source.record.base
    if base is None or opened.applying or (opened.generation, opened.epoch) != cutover_point(base):
        return False
    # Not with a seed: which places are looked at must not be known before.
    places = await trio.to_thread.run_sync(lambda: list(_sample(source, random.SystemRandom())))
    for disk, offset, length in places:
        if await differs(session, source, disk, offset, length):
            log.warning(
                "%s differs at byte %d from the state that this source began from, though nobody "
                "wrote there; everything is compared",
                source.record.disks[disk].name,
                offset,
            )
            return False
    log.info("the target holds the state that this source began from: only changes are sent")
    return True


def _sample(source: Source, chance: random.Random) -> Iterator[tuple[int, int, int]]:
    """(disk, offset, length) of places to look at, mostly where there is data."""
    for disk, fd in enumerate(source.fds):
        size = source.record.disks[disk].size
        blocks = -(-size // _SAMPLE_BYTES)
        for _ in range(min(_SAMPLES, blocks)):
            offset = chance.randrange(blocks) * _SAMPLE_BYTES
            # The next data from there on; in a hole the last resort is the place itself.
            start, _ = next(data_extents(fd, offset, size), (offset, 0))
            offset = start // _SAMPLE_BYTES * _SAMPLE_BYTES
            yield disk, offset, min(_SAMPLE_BYTES, size - offset)


async def differs(session: Session, source: Source, disk: int, offset: int, length: int) -> bool:
    """Whether a range differs where nothing was written since the birth of the generation."""
    # verify imports the session.
    from replicator.verify import changed_chunks, touched_blocks, unequal_blocks

    segments = await session.hashes(disk, offset, length)
    unequal, _ = await trio.to_thread.run_sync(
        unequal_blocks, source.fds[disk], segments, session.seed, frozenset()
    )
    changes = source.maps[disk]
    # Invariant: the marks are read after the data, so what was being written bears one.
    changed = changed_chunks(changes, offset, offset + length, 0)
    left_out = touched_blocks(changed, changes.chunk_size, offset, offset + length)
    return any(start // HASH_BLOCK_BYTES not in left_out for start, _ in unequal)
