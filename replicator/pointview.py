"""Reading a recovery point of a replica that stands still."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from replicator.clones import open_clones
from replicator.images import open_images
from replicator.manifest import Manifest, Point
from replicator.overlay import Overlay
from replicator.points import chain
from replicator.undo import PointDamaged, place_of, read_exactly, undo_path, whole_records


class PointView:
    """A point of a replica, for reading. Nothing else may change the replica meanwhile."""

    def __init__(self, directory: Path, manifest: Manifest, point_id: int) -> None:
        """Open the point. Raises FuseDiskError if there is none, or it is damaged."""
        ids = [point.id for point in manifest.points]
        if point_id not in ids:
            raise FuseDiskError(
                f"replica {directory.name!r} has no recovery point {point_id}; "
                "'replicator points' lists them"
            )
        self.point = manifest.points[ids.index(point_id)]
        self.disks = manifest.disks
        self._overlays = [Overlay() for _ in manifest.disks]
        self._logs: list[int] = []
        over, self.clone = chain(manifest.points, point_id)
        """The clone that it lies over, None for the images."""
        self._images = self._below(directory, manifest)
        try:
            for point in over:
                if point.undo_bytes:
                    self._take_in(undo_path(directory, point.id), point)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise FuseDiskError(f"cannot read undo records: {error.strerror}") from error
            raise

    def _below(self, directory: Path, manifest: Manifest) -> list[int]:
        if self.clone is None:
            return open_images(directory, manifest.disks)
        try:
            return open_clones(directory, manifest, self.clone)
        except OSError as error:
            raise FuseDiskError(
                f"cannot read clones of recovery point {self.point.id}: {error.strerror}"
            ) from error

    def _take_in(self, path: Path, point: Point) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise PointDamaged(f"undo file {path} is missing") from error
        self._logs.append(fd)
        # Older points come first, and what is there first stays.
        for head, at in whole_records(fd, path, point, self.disks, check=True):
            overlay, end = self._overlays[head.disk], head.offset + head.length
            overlay.add(head.offset, end, place_of(fd, head, at))

    def read(self, disk: int, offset: int, length: int) -> bytes:
        """Return a range of a disk as it was at the point. Raises OSError."""
        parts = []
        for start, end, place in self._overlays[disk].pieces(offset, offset + length):
            if place is None:
                parts.append(read_exactly(self._images[disk], end - start, start))
            elif place.fd < 0:
                parts.append(bytes(end - start))
            else:
                parts.append(read_exactly(place.fd, end - start, place.at))
        return b"".join(parts)

    def overwritten(self, disk: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is data) of what was overwritten since the point, in order."""
        for start, end, place in self._overlays[disk].pieces(0, self.disks[disk].size):
            if place is not None:
                yield start, end, place.fd >= 0

    def data(self, disk: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may be data, in order; the rest is zeros. Raises OSError."""
        for start, end, place in self._overlays[disk].pieces(0, self.disks[disk].size):
            if place is None:
                for offset, length in data_extents(self._images[disk], start, end):
                    yield offset, offset + length
            elif place.fd >= 0:
                yield start, end

    def file(self, disk: int) -> int:
        """The open file that a disk of the point lies over."""
        return self._images[disk]

    def close(self) -> None:
        """Close all files."""
        for fd in [*self._images, *self._logs]:
            os.close(fd)
        self._images, self._logs = [], []
