"""Compare a replica with its source by hash, in steps that leave room for passes between them.

What is compared is the committed epoch. A disk that is being written differs from it where it was
written since, and only there: those chunks are left out and counted. A block counts as differing
only if all of its chunks bear marks no newer than the committed epoch *after* the source was read.

The steps go over the session's one ordered link between passes, so that the target holds one and
the same epoch for the whole of a step; another step may see a later one.
"""

from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import msgspec
import trio
import xxhash

from fusedisk.changemap import ChangeMap
from fusedisk.direct import read_into
from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents
from fusedisk.replicas import Verified
from replicator.link import LinkLost, Refused
from replicator.messages import (
    DIGEST_BYTES,
    HASH_BLOCK_BYTES,
    HASH_LENGTH_MAX,
    MIB,
    Opened,
    Segment,
)
from replicator.progress import Progress
from replicator.sender import Session
from replicator.source import Source

EXIT_DIFFERS = 5
RANGES_MAX = 1000
_STEP_BYTES_MAX = 64 * MIB
_BANDWIDTH_MAX = 2**61
_REPAIRS_MAX = 3
"""How often the same step is repaired: what differs after that is damaged again and again."""

assert _STEP_BYTES_MAX <= HASH_LENGTH_MAX


class VerifyOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What the one who asks may choose. ``bandwidth``: bytes of data compared each second.

    With ``repair`` what differs is sent again with the next pass, and compared once more.
    """

    bandwidth: Annotated[int, msgspec.Meta(ge=1, le=_BANDWIDTH_MAX)] | None = None
    repair: bool = False


class DifferingRange(msgspec.Struct):
    """Bytes of a disk whose content is not the same on both sides."""

    disk: str
    offset: int
    length: int


class Findings(msgspec.Struct):
    """The outcome so far: bytes, and at most RANGES_MAX ranges of those that differ.

    What is a hole on both sides counts as compared; the epoch is that of the last step.
    """

    outcome: Literal["equal", "differs", "repaired"] = "equal"
    compared_bytes: int = 0
    left_out_bytes: int = 0
    left_out_chunks: int = 0
    epoch: int = 0
    differing_bytes: int = 0
    differing_ranges: int = 0
    repaired_bytes: int = 0
    differing: list[DifferingRange] = []
    _end: tuple[str, int] | None = None

    def add(self, disk: str, start: int, end: int) -> None:
        """Note a range that differs. Ranges come in ascending order; neighbours are joined."""
        self.outcome = "differs"
        self.differing_bytes += end - start
        if self._end != (disk, start):
            self.differing_ranges += 1
            if self.differing_ranges <= RANGES_MAX:
                self.differing.append(DifferingRange(disk, start, 0))
        if self.differing_ranges <= RANGES_MAX:
            self.differing[-1].length += end - start
        self._end = disk, end

    def summary(self, at: float) -> Verified:
        """What the status keeps of it."""
        counts = self.compared_bytes, self.differing_bytes, self.repaired_bytes
        return Verified(at, self.outcome, self.epoch, *counts)

    def report(self) -> dict[str, object]:
        """What ``verify --json`` prints."""
        found = msgspec.to_builtins(self)
        assert isinstance(found, dict)
        del found["_end"]
        return found


def changed_chunks(changes: ChangeMap, start: int, end: int, since: int) -> list[int]:
    """Numbers of the chunks that touch [start, end) and were written after epoch ``since``."""
    chunks = range(start // changes.chunk_size, -(-end // changes.chunk_size))
    return [chunk for chunk in chunks if changes.last(chunk) > since]


def touched_blocks(chunks: Sequence[int], chunk_size: int, start: int, end: int) -> frozenset[int]:
    """Numbers of the hash blocks of [start, end) that share a byte with one of ``chunks``."""
    blocks: set[int] = set()
    for chunk in chunks:
        first = max(chunk * chunk_size, start)
        stop = min((chunk + 1) * chunk_size, end)
        blocks.update(_block_numbers(first, stop))
    return frozenset(blocks)


def blocks_bytes(blocks: Collection[int], end: int) -> int:
    """Bytes that hash blocks cover on a range, or disk, that ends at ``end``."""
    return sum(min((b + 1) * HASH_BLOCK_BYTES, end) - b * HASH_BLOCK_BYTES for b in blocks)


def _block_numbers(start: int, end: int) -> range:
    return range(start // HASH_BLOCK_BYTES, -(-end // HASH_BLOCK_BYTES))


def unequal_blocks(
    fd: int, segments: Sequence[Segment], seed: int, skip: frozenset[int]
) -> tuple[list[tuple[int, int]], int]:
    """((start, end) of each block that is not what the target hashed, bytes of data looked at).

    Blocks in ``skip`` are not read. What the target has as a hole is compared with zeros, and only
    where the source has data. Raises OSError when the image cannot be read or ended early.
    """
    found, seen = [], 0
    for segment in segments:
        blocks = _zero_blocks(fd, segment) if segment.zero else _data_blocks(segment)
        for start, end, digest in blocks:
            if not skip.isdisjoint(_block_numbers(start, end)):
                continue
            data = bytearray(end - start)
            read_into(fd, data, start)
            seen += len(data)
            if digest is None:
                equal = data == bytes(len(data))
            else:
                equal = xxhash.xxh3_128_digest(data, seed) == digest
            if not equal:
                found.append((start, end))
    return found, seen


def _data_blocks(segment: Segment) -> list[tuple[int, int, bytes | None]]:
    stop = segment.offset + segment.length
    return [
        (
            start,
            min(start + HASH_BLOCK_BYTES, stop),
            segment.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES],
        )
        for index, start in enumerate(range(segment.offset, stop, HASH_BLOCK_BYTES))
    ]


def _zero_blocks(fd: int, segment: Segment) -> list[tuple[int, int, bytes | None]]:
    stop = segment.offset + segment.length
    numbers: set[int] = set()
    for offset, length in data_extents(fd, segment.offset, stop):
        numbers.update(_block_numbers(offset, offset + length))
    return [
        (
            max(number * HASH_BLOCK_BYTES, segment.offset),
            min((number + 1) * HASH_BLOCK_BYTES, stop),
            None,
        )
        for number in sorted(numbers)
    ]


class Verification:
    """One comparison of all disks. A cancelled step leaves an answer on the way: end the link."""

    def __init__(
        self, source: Source, options: VerifyOptions, progress: Progress | None = None
    ) -> None:
        self._source, self._bandwidth = source, options.bandwidth
        self._disk = self._offset = 0
        self._ready_at = 0.0
        self._ended = trio.Event()
        self._error: FuseDiskError | None = None
        self._repair = options.repair
        self._repairs = 0
        self._mending = 0
        self.findings = Findings()
        self.progress = progress or Progress()
        self.progress.begin("verify", [disk.size for disk in source.record.disks])

    @property
    def ended(self) -> bool:
        """Whether there is a result."""
        return self._ended.is_set()

    async def result(self) -> Findings:
        """Wait for the end. Raises the FuseDiskError it failed with."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return self.findings

    def fail(self, error: FuseDiskError) -> None:
        """End without an outcome."""
        if not self._ended.is_set():
            self._error = error
            self._ended.set()

    async def work(self, session: Session, until: float, wake: trio.Event) -> None:
        """Take steps until the end, the time ``until``, or ``wake``.

        Raises LinkLost where the target ended the session.
        """
        while not self._ended.is_set() and not wake.is_set() and trio.current_time() < until:
            if session.repairs:
                # The next pass sends them; then this step is taken once more.
                return
            if self._ready_at > trio.current_time():
                with trio.move_on_at(min(self._ready_at, until)):
                    await wake.wait()
                continue
            try:
                await self._step(session)
            except Refused as error:
                self.fail(error)
                raise LinkLost(f"the target could not hash its disk: {error}") from None
            except FuseDiskError as error:
                self.fail(error)

    async def _step(self, session: Session) -> None:
        disk, start, source = self._disk, self._offset, self._source
        fd, changes, epoch = source.fds[disk], source.maps[disk], session.committed
        assert epoch is not None
        end = await trio.to_thread.run_sync(self._step_end)
        changed = changed_chunks(changes, start, end, epoch)
        skip = touched_blocks(changed, changes.chunk_size, start, end)
        segments = await session.hashes(disk, start, end - start)
        unequal, seen = await trio.to_thread.run_sync(
            unequal_blocks, fd, segments, session.seed, skip
        )
        # Invariant: a write marks its chunk before it touches the data. What was read as of a later
        # epoch therefore bears its mark by now, and marks never go back: all of `skip` is in it.
        changed = changed_chunks(changes, start, end, epoch)
        left_out = touched_blocks(changed, changes.chunk_size, start, end)
        # Without a mount nobody marks, and what was read may be anybody's write.
        if not source.mounted:
            raise FuseDiskError("the mount is gone; mount it again and verify again")
        self._pace(max(seen, sum(s.length for s in segments if not s.zero)))
        differing = [one for one in unequal if left_out.isdisjoint(_block_numbers(*one))]
        if self._repair and differing and self._repairs < _REPAIRS_MAX:
            self._repairs += 1
            self._mending = max(self._mending, sum(b - a for a, b in differing))
            session.repairs = [(disk, first, last) for first, last in differing]
            return
        still = sum(b - a for a, b in differing)
        self.findings.repaired_bytes += max(0, self._mending - still)
        self._repairs = self._mending = 0
        if self.findings.outcome == "equal" and self.findings.repaired_bytes:
            self.findings.outcome = "repaired"
        self._note(start, end, epoch, left_out, len(changed), unequal)

    def _step_end(self) -> int:
        """Where the next step ends; all steps begin at a chunk and at a block."""
        disk, start = self._source.record.disks[self._disk], self._offset
        if start % HASH_LENGTH_MAX == 0:
            # A hole here is most likely one there, and then costs nothing.
            end = min(start + HASH_LENGTH_MAX, disk.size)
            if next(data_extents(self._source.fds[self._disk], start, end), None) is None:
                return end
        step = _STEP_BYTES_MAX
        if self._bandwidth is not None:
            # Small enough that a second's worth does not come in one burst.
            unit = max(disk.chunk_size, HASH_BLOCK_BYTES)
            step = min(step, max(self._bandwidth // 8 // unit, 1) * unit)
        return min(start + step, disk.size)

    def _note(
        self,
        start: int,
        end: int,
        epoch: int,
        left_out: frozenset[int],
        chunks: int,
        unequal: list[tuple[int, int]],
    ) -> None:
        findings, disk = self.findings, self._source.record.disks[self._disk]
        left_out_bytes = blocks_bytes(left_out, end)
        findings.left_out_bytes += left_out_bytes
        findings.left_out_chunks += chunks
        findings.compared_bytes += end - start - left_out_bytes
        findings.epoch = epoch
        for first, last in unequal:
            if left_out.isdisjoint(_block_numbers(first, last)):
                findings.add(disk.name, first, last)
        self.progress.advance(self._disk, end - start, trio.current_time())
        self._offset = end
        if end == disk.size:
            self._disk, self._offset = self._disk + 1, 0
            if self._disk == len(self._source.record.disks):
                self._ended.set()

    def _pace(self, looked_at: int) -> None:
        if self._bandwidth is not None:
            now = trio.current_time()
            self._ready_at = max(now, self._ready_at) + looked_at / self._bandwidth


def committed_epoch(opened: Opened, name: str, generation: str, current: int) -> int:
    """The epoch that a target holds of this generation of the source, now at epoch ``current``.

    Raises FuseDiskError where there is none to compare with.
    """
    if opened.applying:
        raise FuseDiskError(
            f"replica {name} is in the middle of a pass; run 'replicator start' until it follows, "
            "then verify"
        )
    if opened.generation != generation or opened.epoch is None:
        raise FuseDiskError(
            f"replica {name} has nothing committed of this source's generation to compare with; "
            "run 'replicator start' until it follows, then verify"
        )
    if opened.epoch >= current:
        raise FuseDiskError(
            f"replica {name} is ahead of its source; was an old copy of the state directory put "
            "back? Remove the replica, or the state directory"
        )
    return opened.epoch


async def verify_directly(
    session: Session, source: Source, name: str, options: VerifyOptions
) -> Findings:
    """Compare over a session of our own, where no sender runs.

    Raises FuseDiskError where there is nothing to compare with, and LinkLost.
    """
    opened = await session.open("verify")
    generation, current = source.record.generation, source.control.epoch
    session.committed = committed_epoch(opened, name, generation, current)
    verification = Verification(source, options)
    await verification.work(session, float("inf"), trio.Event())
    return await verification.result()
