"""Proof, before a cutover switches, that the replica is the source: both sides are read again.

``verified`` is an epoch such that every chunk whose mark is not newer was compared and found equal,
as it was read from both images. Each step compares the chunks with newer marks and moves it on, so
that inside the downtime only what the last pass sent is left. By induction the whole disk is equal:

- ``full`` begins with a comparison of everything;
- ``last`` trusts what was committed before the cutover began, whose transfers were checked by their
  digests.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal, TypeAlias

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.units import format_size
from replicator.messages import HASH_BLOCK_BYTES, Segment
from replicator.progress import Progress
from replicator.sender import Session
from replicator.source import Source
from replicator.verify import (
    EXIT_DIFFERS,
    Findings,
    Verification,
    VerifyOptions,
    changed_chunks,
    touched_blocks,
    unequal_blocks,
)

Level: TypeAlias = Literal["none", "last", "full"]

_STEP_BYTES_MAX = 16 << 20
# Answers on their way, so that many small ranges do not cost a round trip each.
_ASKED_AT_ONCE_MAX = 8
_STEPS_AT_ONCE = 256
_BETWEEN_PASSES_SECONDS = 1.0
_NAMED_RANGES_MAX = 4


class Differs(FuseDiskError):
    """The replica is not what the source is; nothing was switched."""

    exit_code = EXIT_DIFFERS


class Proof:
    """The comparison of one cutover; see the module."""

    def __init__(self, source: Source, level: Level, committed: int) -> None:
        """``committed``: what the target has as the cutover begins."""
        self._source, self.level = source, level
        self.verified = committed

    async def everything(self, session: Session, progress: Progress) -> None:
        """Compare all disks while the guest runs, with passes in between. Raises Differs."""
        since = self.verified
        verification = Verification(self._source, VerifyOptions(), progress)
        while not verification.ended:
            until = trio.current_time() + _BETWEEN_PASSES_SECONDS
            await verification.work(session, until, trio.Event())
            await session.next_pass()
        _require_equal(await verification.result())
        # Invariant: what was left out bears a newer mark than this, and is compared from here on.
        self.verified = since

    async def changed(self, session: Session) -> None:
        """Compare what was committed since the last step. Raises Differs."""
        if self.level == "none":
            return
        epoch = session.committed
        assert epoch is not None
        findings = Findings()
        for disk in range(len(self._source.fds)):
            await self._compare_disk(session, disk, self.verified, epoch, findings)
        _require_equal(findings)
        self.verified = epoch

    async def _compare_disk(
        self, session: Session, disk: int, since: int, epoch: int, findings: Findings
    ) -> None:
        ranges = self._source.changed_ranges(disk, since)
        ahead = steps(ranges, self._source.record.disks[disk].size)
        asked: deque[tuple[int, int]] = deque()

        async def take() -> None:
            start, end = asked.popleft()
            segments = await session.take_hashes(disk, start, end - start)
            await trio.to_thread.run_sync(
                self._compare, disk, start, end, segments, session.seed, epoch, findings
            )

        while some := await trio.to_thread.run_sync(list, islice(ahead, _STEPS_AT_ONCE)):
            for start, end in some:
                await session.ask_hashes(disk, start, end - start)
                asked.append((start, end))
                if len(asked) == _ASKED_AT_ONCE_MAX:
                    await take()
        while asked:
            await take()

    def _compare(
        self,
        disk: int,
        start: int,
        end: int,
        segments: list[Segment],
        seed: int,
        epoch: int,
        findings: Findings,
    ) -> None:
        changes = self._source.maps[disk]
        unequal, _ = unequal_blocks(self._source.fds[disk], segments, seed, frozenset())
        # Invariant: the marks are looked at after the data was read, as in replicator.verify.
        newer = changed_chunks(changes, start, end, epoch)
        left_out = touched_blocks(newer, changes.chunk_size, start, end)
        for first, last in unequal:
            if left_out.isdisjoint(range(first // HASH_BLOCK_BYTES, -(-last // HASH_BLOCK_BYTES))):
                findings.add(self._source.record.disks[disk].name, first, last)


def steps(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Ranges in ascending order, widened to whole hash blocks, joined, and cut into steps."""
    begun = reached = 0
    for start, end in ranges:
        first = start // HASH_BLOCK_BYTES * HASH_BLOCK_BYTES
        if first > reached:
            yield from _cut(begun, reached)
            begun = first
        reached = max(reached, min(-(-end // HASH_BLOCK_BYTES) * HASH_BLOCK_BYTES, size))
    yield from _cut(begun, reached)


def _cut(first: int, last: int) -> Iterator[tuple[int, int]]:
    for at in range(first, last, _STEP_BYTES_MAX):
        yield at, min(at + _STEP_BYTES_MAX, last)


def _require_equal(findings: Findings) -> None:
    if findings.outcome == "equal":
        return
    named = [f"{r.disk} {r.offset}+{r.length}" for r in findings.differing[:_NAMED_RANGES_MAX]]
    more = findings.differing_ranges - len(named)
    if more > 0:
        named.append(f"{more} more")
    raise Differs(
        f"the replica differs from the source in {format_size(findings.differing_bytes)} "
        f"({', '.join(named)}); nothing was switched, the guest goes on at the source: look at "
        "'replicator verify', then replicate under a new --name"
    )
