"""Restoring over the wire: a receiver reads a point for us, and only what differs crosses.

Window after window of each disk: where there is data already it is compared by hash and only
differing ranges are asked for, elsewhere all is; holes cost nothing on either side. A few windows
are asked for ahead, and answered in that order, so that the link is never idle. When all is
synced, every hash is compared once more with what is on disk. Run again it goes on where it was,
because what is there already compares as equal.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

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
# Asked for ahead, so that a link's delay is waited for once: few enough requests to fit in any
# socket buffer while answers come, and few enough bytes to bound the hashes that wait there.
_REQUESTS_MAX = 64
_AHEAD_BYTES = 4 * _WINDOW_BYTES

assert _WINDOW_BYTES <= m.HASH_LENGTH_MAX

_Request: TypeAlias = m.HashRequest | m.ReadRequest


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
        windows = self._windows()
        to_read: deque[m.ReadRequest] = deque()
        asked: deque[_Request] = deque()
        while await self._ask_ahead(asked, to_read, windows):
            request = asked.popleft()
            if isinstance(request, m.ReadRequest):
                await self._take(request)
                self._advance(request.length)
                continue
            ranges = await self._differing(request)
            to_read += [m.ReadRequest(request.disk, at, end - at) for at, end in ranges]
            self._advance(request.length - sum(end - at for at, end in ranges))

    async def _ask_ahead(
        self,
        asked: deque[_Request],
        to_read: deque[m.ReadRequest],
        windows: Iterator[m.HashRequest],
    ) -> int:
        """Ask for what is known to differ, then about the next windows; how much is asked for."""
        going: list[_Request] = []
        count = sum(request.length for request in asked)
        while len(asked) < _REQUESTS_MAX and count < _AHEAD_BYTES:
            request: _Request | None
            if to_read:
                request = to_read.popleft()
            elif (window := next(windows, None)) is None:
                break
            else:
                request = await trio.to_thread.run_sync(self._to_ask, window)
            asked.append(request)
            going.append(request)
            count += request.length
        if going:
            await self._link.send(*going)
        return len(asked)

    async def verify(self, paths: list[Path]) -> None:
        """Compare all with the receiver once more, from the disk where the kernel drops its pages.

        Raises FuseDiskError for a difference.
        """
        for fd in self._fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        windows = self._windows()
        asked = deque(islice(windows, _AHEAD_BYTES // _WINDOW_BYTES))
        await self._link.send(*asked)
        while asked:
            for window in islice(windows, 1):
                asked.append(window)
                await self._link.send(window)
            window = asked.popleft()
            wrong = await self._differing(window)
            if wrong:
                raise FuseDiskError(
                    f"{paths[window.disk]} differs from the point at byte {wrong[0][0]} after "
                    "copying; check the disk it is on and run it again"
                )
            self._advance(window.length)

    def _windows(self) -> Iterator[m.HashRequest]:
        for disk, size in enumerate(self._sizes):
            for start in range(0, size, _WINDOW_BYTES):
                yield m.HashRequest(disk, start, min(_WINDOW_BYTES, size - start))

    def _to_ask(self, window: m.HashRequest) -> _Request:
        """Its hashes, or all of it where there is nothing to compare with."""
        end = window.offset + window.length
        if next(data_extents(self._fds[window.disk], window.offset, end), None) is None:
            return m.ReadRequest(window.disk, window.offset, window.length)
        return window

    async def _differing(self, asked: m.HashRequest) -> list[tuple[int, int]]:
        answer = await self._link.expect(m.Hashes)
        if (answer.disk, answer.offset, answer.length) != (asked.disk, asked.offset, asked.length):
            raise m.RemoteProtocolError("peer hashed another range")
        return await trio.to_thread.run_sync(
            _really_differing, self._fds[asked.disk], answer.segments, self._seed
        )

    async def _take(self, asked: m.ReadRequest) -> None:
        position, end = asked.offset, asked.offset + asked.length
        while position < end:
            event = await self._link.receive_soon()
            match event:
                case m.Data() | m.Zero():
                    length = event.length
                    where = (event.disk, event.offset)
                    if where != (asked.disk, position) or length > end - position:
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
