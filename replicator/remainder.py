"""What is still to be sent of a pass, where the target keeps a part of one that was cut off.

A claim (epoch, disk, offset) says: whatever lies before that place and was not written after that
epoch is at the target. Claims of several connections stand beside each other, the newer ones of
later epochs and nearer places, until one reaches as far as the older. What no claim covers has to
be sent; beyond all of them what was written after the committed epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from replicator import messages as m
from replicator.captured import CapturedSource
from replicator.source import Source

Range = tuple[int, int]

# Of a journal beside its data: the heads of its records, its header and trailer, and a manifest.
_SPARE_BYTES = 64 << 10


@dataclass(frozen=True)
class Room:
    """What a target has for a pass, in bytes: ``free``, and what it ``kept`` of it."""

    free: int
    kept: int

    def is_only_anew(self, rest: int, whole: int) -> bool:
        """Whether a pass has no room for its ``rest``, but would have if it were begun anew.

        What is kept may have chunks that the guest overwrote since, several times over. An eighth
        more than the ``whole`` has to fit, so that what is sent again is not sent in vain: the
        guest goes on writing, and room may come for the rest.
        """
        fits = whole + whole // 8 + _SPARE_BYTES <= self.free + self.kept
        return fits and rest + _SPARE_BYTES > self.free


class Remainder:
    """What a target at epoch ``committed`` lacks, with the claims that hold there besides."""

    def __init__(
        self,
        source: Source,
        committed: int,
        claims: Sequence[m.Reached] = (),
        room: Room | None = None,
    ) -> None:
        """``room`` is what the target said, where what is kept takes some."""
        self._source = source
        self.room = room
        self._claims = sorted(claims, key=lambda claim: (claim.disk, claim.offset))
        end = len(source.fds) - 1, source.record.disks[-1].size
        whole = [c.epoch for c in claims if (c.disk, c.offset) >= end]
        self.since = max([committed, *whole])
        """What was not written after this epoch is there, on all disks."""

    @property
    def continues(self) -> bool:
        """Whether there is a part of a pass to go on with."""
        return bool(self._claims)

    @property
    def kept_bytes(self) -> int:
        """How much room that part takes, as far as the target says so."""
        return 0 if self.room is None else self.room.kept

    def ranges(self, captured: CapturedSource, disk: int) -> Iterator[Range]:
        """(start, end) of what has to be sent of a capture since :attr:`since`. A thread's work."""
        return self._missing(disk, partial(captured.ranges, disk))

    def captured_bytes(self, captured: CapturedSource) -> list[int]:
        """For each disk, how many bytes that is. A thread's work, before any of it is read."""
        return [
            sum(end - start for start, end in self.ranges(captured, disk))
            for disk in range(len(self._source.fds))
        ]

    def data_bytes(self) -> int:
        """About how much data that is, as of now. A thread's work. Raises OSError."""
        if not self._claims:
            return self._source.changed_data(self.since)
        return sum(
            length
            for disk in range(len(self._source.fds))
            for start, end in self._missing(
                disk, partial(self._source.changed_ranges, disk, self.since)
            )
            for _, length in self._source.data_extents(disk, start, end)
        )

    def _missing(self, disk: int, ranges: Callable[[int, int], Iterator[Range]]) -> Iterator[Range]:
        """What no claim covers of ``ranges(start, end)``, which are of whole chunks, ascending."""
        of_disk = self._source.record.disks[disk]
        begun = 0
        for claim in self._claims:
            end = 0
            if claim.disk > disk or (claim.disk == disk and claim.offset >= of_disk.size):
                end = of_disk.size
            elif claim.disk == disk:
                # A chunk of which only a part was sent is sent again.
                end = claim.offset // of_disk.chunk_size * of_disk.chunk_size
            if end > begun:
                # Invariant: looked at after the epoch to be sent was closed. A chunk whose mark is
                # no newer than the claim was not written until now, so it is as the target has it.
                newer = self._source.changed_ranges(disk, claim.epoch, begun, end)
                yield from _common(ranges(begun, end), newer)
                begun = end
        yield from ranges(begun, of_disk.size)


def remainder(source: Source, since: int, opened: m.Opened) -> Remainder:
    """What a target lacks that is as the source at the end of epoch ``since``, or newer.

    What it has of a pass besides is not believed where that is no part of our history.
    """
    if not all(can_go_on(source, claim) for claim in opened.received):
        return Remainder(source, since)
    room = None if opened.room is None else Room(opened.room, opened.kept_bytes)
    return Remainder(source, since, opened.received, room)


def can_go_on(source: Source, reached: m.Reached) -> bool:
    """Whether what a target has of a pass that was cut off is part of our history."""
    record = source.record
    return (
        reached.generation == record.generation
        and reached.epoch < source.control.epoch
        and reached.disk < len(record.disks)
        and reached.offset <= record.disks[reached.disk].size
    )


def _common(ranges: Iterator[Range], others: Iterator[Range]) -> Iterator[Range]:
    """What is in both of two that ascend."""
    one, other = next(ranges, None), next(others, None)
    while one is not None and other is not None:
        start, end = max(one[0], other[0]), min(one[1], other[1])
        if start < end:
            yield start, end
        if one[1] < other[1]:
            one = next(ranges, None)
        else:
            other = next(others, None)
