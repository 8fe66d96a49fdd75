"""One session of the sending end: handshake, compare or fill, then epoch after epoch."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import islice
from typing import Literal

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import Sent
from replicator import messages as m
from replicator.batches import Batch, BatchReader, Unread
from replicator.captured import SPILL_BYTES, CapturedSource, GivenUp, claim, unchanged
from replicator.chain import Chain
from replicator.compression import Compressor
from replicator.freeze import Instant
from replicator.lineage import holds_base
from replicator.link import Link
from replicator.progress import Progress
from replicator.questions import Questions
from replicator.rates import Rates
from replicator.remainder import Remainder, can_go_on, remainder
from replicator.running import first_error
from replicator.source import Source
from replicator.transfers import Readable, TransferDigest, differing

log = logging.getLogger("replicator.sender")

_ANSWER_SECONDS_MAX = 60.0
_CHECKPOINT_SECONDS = 2.0
_HASHES_AHEAD = 8
_REREAD_SECONDS_MIN, _REREAD_SECONDS_MAX = 0.5, 30.0
_REREAD_PING_SECONDS = 5.0
# A target's journal keeps every round of a pass, so that one is begun anew at last.
_TIMES_SENT_MAX = 3


class Session(Questions):
    """Sends one replica over one link. ``committed`` is the last epoch the target has durably."""

    def __init__(
        self,
        source: Source,
        link: Link,
        name: str,
        instance: str,
        progress: Progress,
        sent: Sent,
        rates: Rates | None = None,
        compressor: Compressor | None = None,
        chain: Chain | None = None,
    ) -> None:
        super().__init__(link)
        self._source = source
        self._name, self._instance = name, instance
        self._sent = sent
        self._rates = rates or Rates()
        self._working_since = trio.current_time()
        self._compressor = compressor or Compressor("none")
        self._reader = BatchReader(source, self._compressor)
        self._unread: list[Unread] = []
        self._checkpointed_at = 0.0
        self._pass_bytes = 0
        self.seed = secrets.randbits(63)
        self._digest = TransferDigest()
        self.chain = chain or Chain()
        self.progress = progress
        self.committed: int | None = None
        self.closed_at: float | None = None
        """Wall clock just before the committed epoch was closed here; None for an older one."""
        self.commit_seconds = 0.0
        """How long the target took to answer the last commit."""
        self._frozen = False
        self.instant: float | None = None
        """The same by the clock that only goes forward."""
        self._closing: tuple[int, float, float] | None = None
        self.cause: str | None = None
        self.captured: CapturedSource | None = None
        self.given_up = GivenUp()
        self._instants_only = False
        self._kept: Remainder | None = None
        self.repairs: list[tuple[int, int, int]] = []
        """(disk, start, end) to send with the next pass, whether it changed or not."""
        self.spill_bytes = SPILL_BYTES
        self.on_phase: Callable[[str], None] = lambda _: None
        self.on_further: Callable[[int, int], None] = lambda *_: None
        """Told now and then the disk and the byte that a fill or a comparison is at."""
        self.on_unread: Callable[[list[Unread]], None] = lambda _: None
        """Told what a pass lacks because it cannot be read, and at last that it lacks nothing."""
        self.frozen: Callable[[], AbstractAsyncContextManager[Instant | None]] = nullcontext
        """Entered around the instant of a pass."""
        self.held: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited before each piece of work; returns at once unless replication is paused."""

    async def open(self, purpose: Literal["replicate", "verify"] = "replicate") -> m.Opened:
        """Shake hands; to verify, nothing is created. Raises Refused, LinkLost, TooSlowError or
        RemoteProtocolError.
        """
        record = self._source.record
        with trio.fail_after(_ANSWER_SECONDS_MAX):
            await self._link.send(m.Hello([1], purpose, self.seed))
            await self._link.expect(m.Welcome)
        disks = [m.DiskInfo(d.name, d.size, d.chunk_size) for d in record.disks]
        await self._link.send(
            m.Open(
                self._name,
                record.source_id,
                self._instance,
                record.generation,
                self._source.control.epoch,
                disks,
            )
        )
        # However long the target recovers the replica, it says meanwhile that it lives.
        return await self._link.expect(m.Opened)

    async def synchronise(self, opened: m.Opened) -> None:
        """Bring the target to a committed epoch of this generation.

        A target with a history that is not ours is compared by hash; nothing is believed.
        """
        self._instants_only = opened.state == "following"
        as_sent = self.chain.meet(opened, self._source.record.generation)
        reached = opened.reached
        if opened.state == "new":
            self.cause = "the target has no replica of that name"
            await self._fill()
        elif reached is not None and can_go_on(self._source, reached):
            name = self._source.record.disks[reached.disk].name
            self.cause = f"the first copy was cut off at byte {reached.offset} of {name}"
            await self._compare(reached)
        elif opened.generation == self._source.record.generation and opened.epoch is not None:
            if opened.epoch >= self._source.control.epoch:
                raise FuseDiskError(
                    f"replica {self._name} is ahead of its source; was an old copy of the state "
                    "directory put back? Remove the replica, or the state directory"
                )
            if as_sent:
                self.committed = opened.epoch
                self._kept = remainder(self._source, opened)
            else:
                self.cause = "the replica is not what was sent (was a store put back?)"
                await self._compare()
        elif await holds_base(self, self._source, opened):
            self.on_phase("comparing")
            self.committed = opened.epoch
            await self.next_pass()
        else:
            self.cause = "what the target holds is not known"
            if opened.generation:
                self.cause = self._source.new_generation
            await self._compare()
        if not self._instants_only:
            # What the target has is of no single instant yet.
            await self.next_pass()

    async def next_pass(self) -> None:
        """Close an epoch and send what changed since the committed one, as it was at that instant.

        A pass that was cut off goes on with what the target has of it. Raises FuseDiskError when
        the mount is gone.
        """
        assert self.committed is not None
        left = self._kept
        while True:
            if left is None or self.repairs:
                left = Remainder(self._source, self.committed)
            self._kept = None
            data = await trio.to_thread.run_sync(left.data_bytes)
            if left.continues:
                log.info("going on with a pass that was cut off; about %d bytes are left", data)
            data += sum(end - start for _, start, end in self.repairs)
            await self._begin(self._source.control.epoch, "pass", data, continues=left.continues)
            if (epoch := await self._send_instant(left)) is not None:
                await self._commit(epoch)
                self._instants_only = True
                return
            left = None

    async def _send_instant(self, left: Remainder) -> int | None:
        """Send what is left up to one instant; return its epoch.

        Where the guest overwrites more than the spill holds before it was read, the capture is
        given up: what was sent of it is a base, and only what changed meanwhile is captured next.
        Returns None where the pass has grown too much by that and is to be begun anew.
        """
        disks = range(len(self._source.fds))
        while True:
            # A place may have to be waited for, so it is there before the guest is frozen.
            async with await claim(self._source, self.spill_bytes) as captured:
                before = time.time(), trio.current_time()
                async with self.frozen() as closing:
                    await captured.close_epoch(left.since)
                self._closing = captured.epoch, *before
                self.captured = captured
                try:
                    totals = await trio.to_thread.run_sync(left.captured_bytes, captured)
                    self.progress.begin("pass", totals)
                    for disk in disks:
                        await self._send_ranges(
                            *(disk, left.ranges(captured, disk)),
                            holes=True,
                            readable=captured,
                            epoch=captured.epoch if self._may_go_on else None,
                        )
                    # Last, since no copies are made of what a capture has passed.
                    for disk, start, end in await trio.to_thread.run_sync(
                        unchanged, self._source.maps, self.repairs, left.since
                    ):
                        await self._send_ranges(
                            disk, [(start, end)], holes=True, count=False, readable=captured
                        )
                finally:
                    self.captured = None
                if not self._source.mounted:
                    # Invariant: who writes to another mount of the disks marks another map.
                    raise FuseDiskError("the mount is gone; mount it again and start again")
                if captured.intact and not self._unread:
                    self.given_up.reason = None
                    self._frozen = closing is not None and closing.frozen
                    return captured.epoch
                # Or a copy could not be written, or would have left the guest too little room.
                reason = "a part of it could not be read" if self._unread else "the spill is full"
            self.given_up.captures += 1
            self.given_up.reason = reason
            log.warning("epoch %d is not captured: %s; trying the next", captured.epoch, reason)
            whole = await trio.to_thread.run_sync(self._source.whole, self.committed, self.repairs)
            if not self._unread and self._pass_bytes > _TIMES_SENT_MAX * whole:
                log.warning("the guest outruns spill and link; the pass is begun anew")
                return None
            # Read live, so no part of an instant: if it changed since, it is part of the next.
            await self._read_again()
            left = Remainder(self._source, captured.epoch)
            if self._may_go_on:
                end = self._source.record.disks[-1].size
                await self._say_reached(captured.epoch, len(disks) - 1, end)

    @property
    def _may_go_on(self) -> bool:
        """Whether what is sent is worth noting: marks alone say what the target then lacks.

        Not so for repairs, which are sent whatever the marks say.
        """
        return not self.repairs

    async def _fill(self) -> None:
        await self.held()
        self.on_phase("filling")
        epoch = await self._close_epoch()
        disks = self._source.record.disks
        todo = await trio.to_thread.run_sync(self._source.allocated)
        self.progress.begin("fill", todo)
        log.info("filling with %d bytes, as %s", sum(todo), self.cause)
        await self._begin(epoch, "fill")
        for disk in range(len(disks)):
            extents = self._source.data_extents(disk, 0, disks[disk].size)
            ranges = ((o, o + n) for o, n in extents)
            await self._send_ranges(disk, ranges, holes=False, epoch=epoch)
        log.info("all is sent; the target makes it durable")
        await self._commit(epoch, consistent=False)

    async def _compare(self, reached: m.Reached | None = None) -> None:
        """Compare all, or go on from a point that a pass before had reached, towards its epoch.

        Invariant: going on commits the epoch E of the pass that was cut off and closes no other.
        All before the point was durable and as at E or newer. Beyond it the target has holes, what
        it was adopted with, or what the pass had sent and a crash may have torn: nothing of that is
        believed, holes and zeros included; where it is one hole, comparing costs no more than
        filling. Whatever was written after E, on either side of the point, is in the captured pass
        that follows, and only that makes the target an instant.
        """
        await self.held()
        disks = self._source.record.disks
        starts = [0] * len(disks)
        if reached is None:
            self.on_phase("comparing")
            epoch = await self._close_epoch()
        else:
            self.on_phase("filling")
            epoch = reached.epoch
            starts[: reached.disk] = [d.size for d in disks[: reached.disk]]
            starts[reached.disk] = reached.offset // m.HASH_BLOCK_BYTES * m.HASH_BLOCK_BYTES
        self.progress.begin("compare", [d.size for d in disks], starts)
        log.info("comparing %d bytes, because %s", sum(self.progress.left), self.cause)
        await self._begin(epoch, "compare", continues=reached is not None)
        asking = (
            (disk, offset, min(m.HASH_LENGTH_MAX, d.size - offset))
            for disk, d in enumerate(disks)
            for offset in range(starts[disk], d.size, m.HASH_LENGTH_MAX)
        )
        # Several at a time: the target hashes while we do, and the link's delay is waited for once.
        asked = deque(islice(asking, _HASHES_AHEAD))
        await self._link.send(*(m.HashRequest(*one) for one in asked))
        while asked:
            await self.held()
            for one in islice(asking, 1):
                asked.append(one)
                await self._link.send(m.HashRequest(*one))
            disk, offset, length = asked.popleft()
            segments = await self.take_hashes(disk, offset, length)
            ranges = await trio.to_thread.run_sync(
                differing, self._source, disk, segments, self.seed
            )
            await self._send_ranges(disk, ranges, holes=True, count=False)
            self._advance(disk, length)
            await self._checkpoint(epoch, disk, offset + length)
        if self._instants_only:
            # Invariant: a target that has been one instant goes from there to another one.
            await self._read_again()
            if (instant := await self._send_instant(Remainder(self._source, epoch))) is None:
                return await self._compare()
            epoch = instant
        await self._commit(epoch, consistent=self._instants_only)

    async def _checkpoint(self, epoch: int, disk: int, offset: int) -> None:
        """Let the target note now and then how far a long pass has come."""
        now = trio.current_time()
        if not self._unread and now >= self._checkpointed_at + _CHECKPOINT_SECONDS:
            self.on_further(disk, offset)
            await self._say_reached(epoch, disk, offset)

    async def _say_reached(self, epoch: int, disk: int, offset: int) -> None:
        self._checkpointed_at = trio.current_time()
        reached = m.Reached(self._source.record.generation, epoch, disk, offset)
        self.chain.checkpoint(self._digest.value())
        await self._link.send(m.Checkpoint(reached, self._digest.count, self._digest.value()))

    async def _close_epoch(self) -> int:
        before = time.time(), trio.current_time()
        epoch = await self._source.close_epoch()
        self._closing = epoch, *before
        return epoch

    def _advance(self, disk: int, count: int) -> None:
        now = trio.current_time()
        self.progress.advance(disk, count, now)
        self._rates.sent(count, now - self._working_since)
        self._working_since = now

    async def _begin(
        self, epoch: int, kind: str, data_bytes: int = 0, *, continues: bool = False
    ) -> None:
        self._digest, root = self.chain.begin(kind, continues=continues)
        self._unread = []
        self._pass_bytes = 0
        self._frozen = False
        self._checkpointed_at = trio.current_time()
        self._working_since = trio.current_time()
        await self._link.send(
            m.Begin(epoch, kind, data_bytes, continues, root)  # type: ignore[arg-type]
        )

    async def _commit(self, epoch: int, *, consistent: bool = True) -> None:
        # Invariant: an epoch is not committed while anything of it could not be read.
        await self._read_again()
        generation = self._source.record.generation
        begun = trio.current_time()
        digest = self._digest
        self.chain.committing(generation, epoch, digest)
        await self._link.send(
            m.Commit(
                *(generation, epoch, digest.count, digest.value(), consistent),
                frozen=consistent and self._frozen,
            )
        )
        # However long the target syncs, it says meanwhile that it lives.
        answer = await self._link.expect(m.Committed)
        if (answer.generation, answer.epoch) != (generation, epoch):
            raise m.RemoteProtocolError("peer committed another epoch")
        self.chain.committed()
        self.committed = epoch
        self._rates.sent(0, trio.current_time() - self._working_since)
        self.commit_seconds = trio.current_time() - begun
        if self._closing is not None and self._closing[0] == epoch:
            self.closed_at, self.instant = self._closing[1:]
        self.repairs.clear()
        self.progress.finish()

    async def _read_again(self) -> None:
        delay = _REREAD_SECONDS_MIN
        while self._unread:
            unread, self._unread = self._unread, []
            self.on_unread(unread)
            until = trio.current_time() + delay
            while trio.current_time() < until:
                await self.held()
                await self.ping()
                left = max(0.0, until - trio.current_time())
                await trio.sleep(min(left, _REREAD_PING_SECONDS))
            delay = min(2 * delay, _REREAD_SECONDS_MAX)
            for one in unread:
                # What is a hole by now may have been data when it was sent before.
                await self._send_ranges(one.disk, [(one.start, one.end)], holes=True, count=False)
            if not self._unread:
                self.on_unread([])

    async def _send_ranges(
        self,
        disk: int,
        ranges: Iterable[tuple[int, int]],
        *,
        holes: bool,
        count: bool = True,
        readable: Readable | None = None,
        epoch: int | None = None,
    ) -> None:
        """Read and send; with an epoch the disk is sent from its begin, and checkpoints go out."""
        try:
            async with self._reader.reading(disk, ranges, readable) as batches:
                waiting = trio.current_time()
                async for batch in batches:
                    came = trio.current_time()
                    await self.held()
                    begun = trio.current_time()
                    await self._send_batch(batch, holes=holes)
                    sent = trio.current_time()
                    self._compressor.waited(batch.transfers, came - waiting, sent - begun)
                    waiting = sent
                    if count:
                        self._advance(disk, batch.covered)
                    if epoch is not None:
                        await self._checkpoint(epoch, disk, batch.end)
                    self._reader.give_back(batch)
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _send_batch(self, batch: Batch, *, holes: bool) -> None:
        going: list[m.Event] = []
        for transfer in batch.transfers:
            if isinstance(transfer, m.Zero):
                self._sent.zero_bytes += transfer.length
                if not holes:
                    # A new target is one hole.
                    continue
            else:
                self._sent.data_bytes += transfer.length
                self._pass_bytes += transfer.length
            self._digest.add(transfer)
            going.append(transfer)
        await self._link.send(*going)
        self._unread += batch.unread
