"""Restoring over the wire: a receiver reads a point for us, and only what differs crosses.

Window after window of each disk: where there is data already it is compared by hash and only
differing ranges are asked for, elsewhere all is; holes cost nothing on either side. When all is
synced, every hash is compared once more with what is on disk. Run again it goes on where it was,
because what is there already compares as equal.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from replicator import messages as m
from replicator.files import Files
from replicator.link import Link, LinkLost, raise_failed, say_last
from replicator.manifest import ReplicaDisk, check_disks
from replicator.restore import check_fits, opened
from replicator.transfers import OneImage, differing

_WINDOW_BYTES = 64 * m.MIB
# Asked for at once: few enough that the requests fit in any socket buffer while answers come.
_READS_MAX = 16

assert _WINDOW_BYTES <= m.HASH_LENGTH_MAX


async def restore_from(
    link: Link,
    name: str,
    point: int | None,
    directory: Path,
    begin: Callable[[int], None],
    advance: Callable[[int], None],
) -> tuple[m.Restorable, int]:
    """Make `directory/<disk>` the disks of a replica at a point: (the point, bytes written).

    `begin` is told how many bytes there are to do, each counted once copied and once verified, and
    `advance` what was done. Raises FuseDiskError, with nothing changed where an image that is there
    does not fit, LinkLost, RemoteProtocolError, OSError.
    """
    seed = secrets.randbits(63)
    await link.send(m.Hello([1], "restore", seed))
    await link.expect(m.Welcome)
    await link.send(m.Restore(name, point))
    found = await link.expect(m.Restorable)
    # Invariant: no name that the receiver sends can lead out of the directory.
    check_disks([ReplicaDisk(disk.name, disk.size, disk.chunk_size) for disk in found.disks])
    paths = [directory / disk.name for disk in found.disks]
    directory.mkdir(parents=True, exist_ok=True)
    for path, disk in zip(paths, found.disks, strict=True):
        check_fits(path, disk.size)
    begin(2 * sum(disk.size for disk in found.disks))
    fds = [opened(path, disk.size) for path, disk in zip(paths, found.disks, strict=True)]
    try:
        copy = _Copy(link, seed, fds, [disk.size for disk in found.disks], advance)
        await copy.all()
        for fd in fds:
            await trio.to_thread.run_sync(os.fsync, fd)
        await trio.to_thread.run_sync(Files().sync_directory, directory)
        await copy.verify(paths)
    finally:
        for fd in fds:
            os.close(fd)
    await say_last(link, m.Bye())
    return found, copy.written


class _Copy:
    """Disks that are being made what the receiver reads."""

    def __init__(
        self,
        link: Link,
        seed: int,
        fds: list[int],
        sizes: list[int],
        advance: Callable[[int], None],
    ) -> None:
        self._link, self._seed, self._fds, self._sizes = link, seed, fds, sizes
        self._advance, self._files = advance, Files()
        self.written = 0

    async def all(self) -> None:
        """Copy what differs."""
        for disk, size in enumerate(self._sizes):
            for start in range(0, size, _WINDOW_BYTES):
                length = min(_WINDOW_BYTES, size - start)
                ranges = await self._to_read(disk, start, length)
                for first in range(0, len(ranges), _READS_MAX):
                    await self._read(disk, ranges[first : first + _READS_MAX])
                self._advance(length)

    async def verify(self, paths: list[Path]) -> None:
        """Compare all with the receiver once more, from the disk where the kernel drops its pages.

        Raises FuseDiskError for a difference.
        """
        for disk, size in enumerate(self._sizes):
            os.posix_fadvise(self._fds[disk], 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, size, _WINDOW_BYTES):
                length = min(_WINDOW_BYTES, size - start)
                wrong = await self._differing(disk, start, length)
                if wrong:
                    raise FuseDiskError(
                        f"{paths[disk]} differs from the point at byte {wrong[0][0]} after "
                        "copying; check the disk it is on and run it again"
                    )
                self._advance(length)

    async def _to_read(self, disk: int, start: int, length: int) -> list[tuple[int, int]]:
        if next(data_extents(self._fds[disk], start, start + length), None) is None:
            return [(start, start + length)]
        return await self._differing(disk, start, length)

    async def _differing(self, disk: int, start: int, length: int) -> list[tuple[int, int]]:
        await self._link.send(m.HashRequest(disk, start, length))
        answer = await self._link.expect(m.Hashes)
        if (answer.disk, answer.offset, answer.length) != (disk, start, length):
            raise m.RemoteProtocolError("peer hashed another range")
        return await trio.to_thread.run_sync(
            _really_differing, self._fds[disk], answer.segments, self._seed
        )

    async def _read(self, disk: int, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            await self._link.send(m.ReadRequest(disk, start, end - start))
        for start, end in ranges:
            position = start
            while position < end:
                event = await self._link.receive_soon()
                match event:
                    case m.Data() | m.Zero():
                        length = event.length
                        where = (event.disk, event.offset)
                        if where != (disk, position) or length > end - position:
                            raise m.RemoteProtocolError("peer sent another range than asked for")
                        await trio.to_thread.run_sync(self._store, event)
                        position += length
                    case m.Pong():
                        pass
                    case m.Failed():
                        raise_failed(event)
                    case _:
                        raise LinkLost("the receiver is shutting down")

    def _store(self, event: m.Data | m.Zero) -> None:
        fd = self._fds[event.disk]
        if isinstance(event, m.Zero):
            self._files.zero(fd, event.offset, event.length)
            return
        # Invariant: nothing is written that is not what the receiver read.
        self.written += self._files.write(fd, [event.content()], event.offset)


def _really_differing(fd: int, segments: list[m.Segment], seed: int) -> list[tuple[int, int]]:
    """As `differing`; data of zeros where the receiver has a hole is no difference."""
    found = []
    for start, end in differing(OneImage(fd), 0, segments, seed):
        hole = any(s.zero and s.offset <= start and end <= s.offset + s.length for s in segments)
        if not hole or any(
            any(os.pread(fd, min(m.MIB, end - at), at)) for at in range(start, end, m.MIB)
        ):
            found.append((start, end))
    return found
