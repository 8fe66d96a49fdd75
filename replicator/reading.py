"""The receiver's side of a restore: one point of a replica, read for whoever asks.

It holds nothing that a pass needs: replication of the same replica goes on meanwhile.
"""

from __future__ import annotations

import trio

from replicator import messages as m
from replicator.beating import saying_that_it_lives
from replicator.link import Link, LinkLost
from replicator.livepoint import LivePoint
from replicator.store import Store

# A peer that asks for nothing for so long is gone, and its point need not be kept.
_SILENCE_SECONDS_MAX = 900.0


async def serve_reads(link: Link, store: Store, asked: m.Restore, seed: int) -> None:
    """Answer until the peer's last word. Raises FuseDiskError, LinkLost, OSError."""
    point: LivePoint | None = None
    try:
        async with saying_that_it_lives(link):
            point = await trio.to_thread.run_sync(LivePoint, store, asked.name, asked.point)
        disks = [m.DiskInfo(d.name, d.size, d.chunk_size) for d in point.disks]
        chosen = point.point
        await link.send(m.Restorable(chosen.id, chosen.generation, chosen.epoch, disks))
        while True:
            event = None
            with trio.move_on_after(_SILENCE_SECONDS_MAX):
                event = await link.receive()
            match event:
                case m.ReadRequest():
                    await _send_range(link, point, event)
                case m.HashRequest():
                    async with saying_that_it_lives(link):
                        hashes = await trio.to_thread.run_sync(_hash, point, event, seed)
                    await link.send(hashes)
                case m.Ping():
                    await link.send(m.Pong(event.nonce))
                case None:
                    raise LinkLost("a restore asked for nothing any more")
                case m.Bye() | m.Failed():
                    return
    finally:
        if point is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(point.close)


async def _send_range(link: Link, point: LivePoint, asked: m.ReadRequest) -> None:
    end = asked.offset + asked.length
    point.check_range(asked.disk, asked.offset, asked.length)
    planned = await trio.to_thread.run_sync(point.plan, asked.disk, asked.offset, end)
    position = asked.offset
    for start, stop in [*planned, (end, end)]:
        if position < start:
            await link.send(m.Zero(asked.disk, position, start - position))
        for at in range(start, stop, m.DATA_BYTES_MAX):
            length = min(m.DATA_BYTES_MAX, stop - at)
            await link.send(await trio.to_thread.run_sync(_read, point, asked.disk, at, length))
        position = stop


def _read(point: LivePoint, disk: int, offset: int, length: int) -> m.Data | m.Zero:
    data = point.read(disk, offset, length)
    return m.Data.of(disk, offset, data) if any(data) else m.Zero(disk, offset, length)


def _hash(point: LivePoint, asked: m.HashRequest, seed: int) -> m.Hashes:
    found = point.hashes(asked.disk, asked.offset, asked.length, seed, m.HASH_BLOCK_BYTES)
    segments = [m.Segment(s.offset, s.length, s.zero, s.digests) for s in found]
    return m.Hashes(asked.disk, asked.offset, asked.length, segments)
