"""The room that a pass takes on the target, and what goes where there is not enough of it.

First what is applied gives its journal back, then the oldest recovery points go. Where that is not
enough, the pass ends and waits for room: what a checkpoint noted of it stays, as when the link is
cut, so that it goes on from there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from itertools import takewhile

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.units import format_size
from replicator.holding import HeldReplica
from replicator.manifest import Point, clear_errors
from replicator.messages import OFFSET_MAX
from replicator.points import remove_files, report_lost

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errors of a filesystem without room."""


class TargetFull(FuseDiskError):
    """There is no room for a pass; what is noted of it stays, and points may have been dropped."""


class BoundedReplica(HeldReplica):
    """Passes that make room for themselves, or end where there is none."""

    def _as_room_is_made(self, step: Callable[[], None]) -> None:
        """Take a step of a pass, again and again while room can be made for it.

        So a pass that needs the room of many points is sent once and not once for each of them.
        """
        while True:
            dropped = self._dropped
            try:
                return step()
            except FuseDiskError as error:
                if not _is_full(error) or not self._make_room(dropped):
                    raise

    def _make_room(self, dropped: int) -> bool:
        """Whether there is more room than when so many points had been dropped."""
        with self._condition:
            applying = self._manifest.journal is not None
        if applying:
            # Its journal goes with that.
            with self._at_rest():
                return True
        return self._dropped != dropped or self._drop_oldest_point() is not None

    def _make_room_for(self, needed: int) -> None:
        """Drop the oldest points until a journal fits; refuse it where that would not do either."""
        missing = needed - self._room()
        if missing > 0:
            # What is committed gives the room of its journal back.
            with self._at_rest():
                missing = needed - self._room()
        pinned = self._pinned() if missing > 0 else frozenset[int]()
        points = self._spare_points(pinned)
        if missing > sum(point.undo_bytes for point in points):
            raise TargetFull(
                f"target full: the next pass of replica {self.name!r} needs {format_size(needed)} "
                f"for its journal and there are {format_size(needed - missing)} left; free some at "
                "the target, or keep the store on a filesystem with reflinks"
            )
        for point in points:
            if missing <= 0:
                return
            self._drop_oldest_point()
            # Not measured: a filesystem may give room back a moment later.
            missing -= point.undo_bytes

    def room_for_rest(self) -> int:
        """How many bytes of a pass a journal can take, with what points give back for it.

        Raises FuseDiskError on an I/O error.
        """
        spare = sum(point.undo_bytes for point in self._spare_points(self._pinned()))
        # A filesystem may say anything, and no disk is larger than a message can say.
        return min(self._room() + spare, OFFSET_MAX)

    def _spare_points(self, pinned: Set[int]) -> list[Point]:
        """The points that may go to make room, oldest first."""
        return list(takewhile(lambda point: point.id not in pinned, self._manifest.points[:-1]))

    def _room(self) -> int:
        with clear_errors(f"cannot look how much room replica {self.name!r} has"):
            return self._files.room(self._directory)

    @contextmanager
    def _leaving_if_full(self) -> Iterator[None]:
        """End a pass where the target is full; what is noted of it stays, to be gone on with."""
        try:
            yield
        except FuseDiskError as error:
            if not _is_full(error):
                raise
            with self._alone():
                self._leave_pass()
                kept = self._manifest.received is not None or self._manifest.filled is not None
            freed = self._drop_oldest_point()
            raise TargetFull(
                f"target full: no room for {'the rest of ' if kept else ''}a pass of replica "
                f"{self.name!r}; "
                + (f"recovery point {freed} was dropped" if freed else "free some at the target")
            ) from error

    def _drop_oldest_point(self) -> int | None:
        """Give the room of the oldest point back; its id, or None where only the newest is left."""
        if self._unusable is not None:
            # Nothing will be written: the first error is not to wait for what is being applied.
            return None
        with self._apply_mutex, self._alone():
            points = self._manifest.points
            if self._unusable is not None or len(points) < 2:
                return None
            oldest = points[0]
            # Before the record, which needs room too: a listed oldest point without its file is
            # taken for dropped.
            with suppress(OSError):
                remove_files(self._files, self._directory, oldest)
            report_lost(self._directory, [oldest], "target full")
            self._dropped += 1
            self._record(msgspec.structs.replace(self._manifest, points=points[1:]))
            return oldest.id


def _is_full(error: FuseDiskError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in FULL
