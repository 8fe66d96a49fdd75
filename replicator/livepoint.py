"""Reading a recovery point while passes go on, without the lock of the replica.

The images change under the reader, but never unseen: what a pass overwrites is in an undo file
before (docs/crash-model.md). So a range is read from the image first; then the undo files are read
on from where they ended last time, and what they hold by now of that range replaces what was read.
Where the filesystem clones, the manifest names clones of the images before these change: then the
range is read again from those.
The point is pinned, so that it stays listed; that it still is, is checked after each read as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from replicator.clones import open_clones
from replicator.images import HashSegment, open_images
from replicator.manifest import Manifest, Point, load_manifest, manifest_path, read_manifest
from replicator.overlay import Overlay
from replicator.pins import Pin
from replicator.points import chain
from replicator.replica import Replica
from replicator.store import ReplicaBusy, Store
from replicator.undo import (
    PointDamaged,
    place_of,
    read_exactly,
    read_more,
    record_end,
    undo_path,
)

_WINDOW_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_WAIT_SECONDS_MAX = 60.0
_WAIT_POLL_SECONDS = 0.05
# Undo files that were merged into older ones and are open still, each with its room.
_MERGED_MAX = 16


class PointGone(FuseDiskError):
    """The point was let go before it was pinned, or for want of room."""


class LivePoint:
    """A point of a replica, for reading from one thread at a time."""

    def __init__(self, store: Store, name: str, point_id: int | None = None) -> None:
        """Open a point, by default the newest. Raises FuseDiskError if there is none, OSError."""
        self._directory = store.replica_path(name)
        self._logs: dict[int, tuple[int, int]] = {}
        self._images: list[int] = []
        self._listed: list[Point] = []
        self._manifest_fd = -1
        deadline = time.monotonic() + _WAIT_SECONDS_MAX
        while True:
            manifest = _readable(store, name)
            if not manifest.points and manifest.state == "promoted":
                raise FuseDiskError(f"replica {name!r} is promoted and has no recovery point")
            if not manifest.points:
                # A pass is being applied, and its predecessor is not kept.
                if time.monotonic() > deadline:
                    raise FuseDiskError(f"replica {name!r} is busy with a long pass; try again")
                _recover_if_abandoned(store, name)
                time.sleep(_WAIT_POLL_SECONDS)
                continue
            self.point = _choose(name, manifest, point_id)
            self._clone: int | None = None
            self._pin = Pin(store.path, name, self.point.id)
            try:
                self.disks = manifest.disks
                self._overlays = [Overlay() for _ in self.disks]
                self._over = open_images(self._directory, self.disks)
                self._images = list(self._over)
                self._refresh()
            except PointGone:
                self.close()
                if point_id is not None or time.monotonic() > deadline:
                    raise
                continue
            except BaseException:
                self.close()
                raise
            return

    def _refresh(self) -> None:
        """Take in what was added to the undo files. Raises PointGone, PointDamaged, OSError."""
        for _ in range(100):
            try:
                points = self._points()
                self._let_go_of_merged(points)
                for point in points:
                    self._scan(point)
                # Invariant: a file is missing only because it never had a record, or was merged
                # into one that was looked at already; then the manifest is another one by now.
                if self._points() is points:
                    return
            except FileNotFoundError:
                # It was merged into an older one, which the manifest says by now.
                self._forget_manifest()
        raise PointGone(f"undo records of recovery point {self.point.id} are missing")

    def _points(self) -> list[Point]:
        """The point and those after it, as they are listed now; the same list if they were then."""
        path = manifest_path(self._directory)
        # Held open, so that no other manifest is given its inode.
        if self._manifest_fd < 0 or not os.path.samestat(path.stat(), os.fstat(self._manifest_fd)):
            self._forget_manifest()
            self._manifest_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._listed = self._take_in(load_manifest(self._manifest_fd, path))
            except BaseException:
                self._forget_manifest()
                raise
        return self._listed

    def _take_in(self, manifest: Manifest) -> list[Point]:
        points = [] if manifest.state == "filling" else manifest.points
        listed, clone = chain(points, self.point.id)
        if manifest.state == "promoted" and clone is None:
            raise PointGone(_taken(self._directory.name))
        if not listed or listed[0].id != self.point.id:
            raise PointGone(
                f"recovery point {self.point.id} of replica {self._directory.name!r} is no "
                "longer kept; run it again for another one"
            )
        if clone is not None and self._clone is None:
            # Invariant: on record before the images change. The old descriptors stay open, for
            # whoever has their numbers.
            self._over = open_clones(self._directory, manifest, clone)
            self._images += self._over
            self._clone = clone
        return listed

    def _forget_manifest(self) -> None:
        if self._manifest_fd >= 0:
            os.close(self._manifest_fd)
        self._manifest_fd = -1

    def _let_go_of_merged(self, points: Sequence[Point]) -> None:
        """Begin anew once many files are not those of points any more: older ones hold it all."""
        if len(self._logs.keys() - {point.id for point in points}) <= _MERGED_MAX:
            return
        for fd, _ in self._logs.values():
            os.close(fd)
        self._logs = {}
        self._overlays = [Overlay() for _ in self.disks]

    def _scan(self, point: Point) -> None:
        fd, position = self._logs.get(point.id, (-1, 0))
        path = undo_path(self._directory, point.id)
        if fd < 0:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                if point.undo_bytes:
                    raise
                return
            self._logs[point.id] = fd, 0
        if os.fstat(fd).st_size <= position:
            return
        for head, at in read_more(fd, point.id, position):
            inside = head.disk < len(self.disks)
            if not inside or head.offset + head.length > self.disks[head.disk].size:
                break
            overlay, end = self._overlays[head.disk], head.offset + head.length
            overlay.add(head.offset, end, place_of(fd, head, at))
            position = record_end(head, at)
            self._logs[point.id] = fd, position
        if position < point.undo_bytes:
            raise PointDamaged(f"undo file {path} is damaged at byte {position}")

    def _steadily(self) -> Iterator[list[int]]:
        """The files that the point lies over, once more if they are others after the block.

        Invariant: what was overwritten in the block is in the undo files taken in after it.
        """
        over: list[int] = []
        while over is not self._over:
            over = self._over
            yield over
            self._refresh()

    def read(self, disk: int, offset: int, length: int) -> bytes:
        """Return a range of a disk as it was at the point. Raises FuseDiskError, OSError."""
        data = bytearray()
        for over in self._steadily():
            data = bytearray(read_exactly(over[disk], length, offset))
        for start, end, place in self._overlays[disk].pieces(offset, offset + length):
            if place is None:
                continue
            old = bytes(end - start)
            if place.fd >= 0:
                old = read_exactly(place.fd, end - start, place.at)
            data[start - offset : end - offset] = old
        return bytes(data)

    def plan(self, disk: int, start: int, end: int) -> list[tuple[int, int]]:
        """(start, end) of what may be data in a range, in order, joined where they touch."""
        extents: list[tuple[int, int]] = []
        for over in self._steadily():
            # An extent that came or went is covered by an undo record.
            extents = list(data_extents(over[disk], start, end))
        found: list[tuple[int, int]] = []
        for low, high, place in self._overlays[disk].pieces(start, end):
            if place is None:
                inside = ((max(o, low), min(o + n, high)) for o, n in extents)
                parts = [(a, b) for a, b in inside if a < b]
            else:
                parts = [(low, high)] if place.fd >= 0 else []
            for a, b in parts:
                if found and found[-1][1] == a:
                    found[-1] = found[-1][0], b
                else:
                    found.append((a, b))
        return found

    def data(self, disk: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may be data on a disk, in order; the rest is zeros."""
        size = self.disks[disk].size
        for start in range(0, size, _WINDOW_BYTES):
            yield from self.plan(disk, start, min(start + _WINDOW_BYTES, size))

    def hashes(
        self, disk: int, offset: int, length: int, seed: int, block: int
    ) -> list[HashSegment]:
        """As `Replica.hashes`, of the point. Raises FuseDiskError outside the disk, OSError."""
        end = offset + length
        size = self.check_range(disk, offset, length)
        if offset % block or (end % block and end != size):
            raise FuseDiskError(f"hash range of {length} bytes at {offset} is not aligned")
        segments, position = [], offset
        for first, stop in _blocks(self.plan(disk, offset, end), block, end):
            if first > position:
                segments.append(HashSegment(position, first - position, True, b""))
            digests = bytearray()
            for base in range(first, stop, _READ_BYTES):
                data = memoryview(self.read(disk, base, min(_READ_BYTES, stop - base)))
                for at in range(0, len(data), block):
                    digests += xxhash.xxh3_128_digest(data[at : at + block], seed)
            segments.append(HashSegment(first, stop - first, False, bytes(digests)))
            position = stop
        if position < end:
            segments.append(HashSegment(position, end - position, True, b""))
        return segments

    def check_range(self, disk: int, offset: int, length: int) -> int:
        """The size of a disk that a range lies within. Raises FuseDiskError where it does not."""
        if not 0 <= disk < len(self.disks) or offset + length > self.disks[disk].size:
            raise FuseDiskError(f"{length} bytes at {offset} are outside disk number {disk}")
        return self.disks[disk].size

    def file(self, disk: int) -> int:
        """An open file that has the allocated size and the times of a disk, near enough."""
        return self._images[disk]

    def close(self) -> None:
        """Close all files and let the point go."""
        for fd in [*self._images, *(fd for fd, _ in self._logs.values())]:
            os.close(fd)
        self._images, self._logs = [], {}
        self._forget_manifest()
        self._pin.close()


def _readable(store: Store, name: str) -> Manifest:
    directory: Path = store.replica_path(name)
    manifest = read_manifest(directory)
    if manifest is None:
        raise FuseDiskError(f"no replica {name!r} in store {store.path}; check the name")
    if manifest.state == "filling":
        raise FuseDiskError(f"replica {name!r} has no recovery point yet; let its fill finish")
    return manifest


def _taken(name: str) -> str:
    return (
        f"replica {name!r} is promoted and belongs to its guest, who overwrites what this recovery "
        "point was read through; points that are clones can still be read, where the filesystem "
        "has them"
    )


def _choose(name: str, manifest: Manifest, point_id: int | None) -> Point:
    wanted = manifest.points[-1].id if point_id is None else point_id
    for point in manifest.points:
        if point.id == wanted:
            if manifest.state == "promoted" and chain(manifest.points, wanted)[1] is None:
                raise FuseDiskError(_taken(name))
            return point
    raise FuseDiskError(
        f"replica {name!r} has no recovery point {point_id}; 'replicator points' lists them"
    )


def _recover_if_abandoned(store: Store, name: str) -> None:
    """Finish what a receiver that died left half applied; one that lives does it itself."""
    try:
        Replica.load(store, name).close()
    except ReplicaBusy:
        return


def _blocks(ranges: list[tuple[int, int]], block: int, end: int) -> list[tuple[int, int]]:
    """Runs of whole blocks that hold any of the ranges, joined where they touch."""
    runs: list[tuple[int, int]] = []
    for start, stop in ranges:
        first, last = start // block * block, min(-(-stop // block) * block, end)
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(last, runs[-1][1])
        else:
            runs.append((first, last))
    return runs
