"""One session of the sending end: handshake, compare or fill, then epoch after epoch."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import islice
from typing import Literal

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import Sent
from replicator import messages as m
from replicator.captured import SPILL_BYTES, CapturedSource, GivenUp, claim, unchanged
from replicator.chain import Chain
from replicator.compression import Compressor
from replicator.freeze import Instant
from replicator.lineage import holds_base
from replicator.link import Link
from replicator.passing import Passes
from replicator.progress import Progress
from replicator.rates import Rates
from replicator.remainder import Remainder, Room, can_go_on, remainder
from replicator.source import LITTLE_BYTES, Source
from replicator.transfers import differing

log = logging.getLogger("replicator.sender")

_ANSWER_SECONDS_MAX = 60.0
_HASHES_AHEAD = 8
# A target's journal keeps every round of a pass, so that one is begun anew at last.
_TIMES_SENT_MAX = 3


class Session(Passes):
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
        super().__init__(source, link, progress, sent, rates, compressor, chain)
        self._name, self._instance = name, instance
        self.seed = secrets.randbits(63)
        self.cause: str | None = None
        self.captured: CapturedSource | None = None
        self.given_up = GivenUp()
        self._instants_only = False
        self._kept: Remainder | None = None
        self.spill_bytes = SPILL_BYTES
        self.on_phase: Callable[[str], None] = lambda _: None
        self.frozen: Callable[[], AbstractAsyncContextManager[Instant | None]] = nullcontext
        """Entered around the instant of a pass."""

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
        elif reached is not None and self._goes_on(reached, as_sent=as_sent):
            name = self._source.record.disks[reached.disk].name
            what = "comparison" if self._instants_only else "first copy"
            self.cause = f"the {what} was cut off at byte {reached.offset} of {name}"
            await self._compare(reached, remainder(self._source, reached.epoch, opened))
        elif opened.generation == self._source.record.generation and opened.epoch is not None:
            if opened.epoch >= self._source.control.epoch:
                raise FuseDiskError(
                    f"replica {self._name} is ahead of its source; was an old copy of the state "
                    "directory put back? Remove the replica, or the state directory"
                )
            if as_sent:
                self.committed = opened.epoch
                self._kept = remainder(self._source, opened.epoch, opened)
            else:
                self.cause = "the replica is not what was sent (was a store put back?)"
                await self._compare()
        elif await holds_base(self, self._source, opened):
            self.on_phase("comparing")
            assert opened.epoch is not None
            self.committed = opened.epoch
            self._kept = remainder(self._source, opened.epoch, opened)
            await self.next_pass()
        else:
            self.cause = "what the target holds is not known"
            if opened.generation:
                self.cause = self._source.new_generation
            await self._compare()
        if not self._instants_only:
            # What the target has is of no single instant yet.
            await self.next_pass()

    def _goes_on(self, reached: m.Reached, *, as_sent: bool) -> bool:
        """Whether to believe how far a target says that a fill or a comparison came.

        One that is not at what was sent may be an older state of itself: only what this process
        sent since that was found out is believed.
        """
        return can_go_on(self._source, reached) and (as_sent or self.chain.sent_kept)

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
            if left.room is not None and await self._is_only_anew(left.room, data):
                left = None
                continue
            if left.continues:
                log.info("going on with a pass that was cut off; about %d bytes are left", data)
            data += sum(end - start for _, start, end in self.repairs)
            epoch, kept = self._source.control.epoch, left.kept_bytes
            await self._begin(epoch, "pass", data, continues=left.continues, kept_bytes=kept)
            if (instant := await self._send_instant(left)) is not None:
                await self._commit(instant)
                self._instants_only = True
                return
            left = None

    async def _is_only_anew(self, room: Room, rest: int) -> bool:
        """Whether what the target keeps of a pass has to go, for the pass to have room at all."""
        source, since = self._source, self.committed
        whole = await trio.to_thread.run_sync(
            lambda: sum(source.allocated()) if since is None else source.changed_data(since)
        )
        if not room.is_only_anew(rest, max(whole, LITTLE_BYTES)):
            return False
        log.warning(
            "the target has %d bytes left, too little for the rest of a pass that was cut off: the "
            "%d bytes that it keeps of it are given up, and the pass is begun anew",
            *(room.free, room.kept),
        )
        return True

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

    async def _compare(
        self, reached: m.Reached | None = None, left: Remainder | None = None
    ) -> None:
        """Compare all, or go on from a point that a pass before had reached, towards its epoch.

        Invariant: going on commits the epoch E of the pass that was cut off and closes no other.
        All before the point was durable and as at E or newer. Beyond it the target has holes, what
        it was adopted with, or what the pass had sent and a crash may have torn: nothing of that is
        believed, holes and zeros included; where it is one hole, comparing costs no more than
        filling. Whatever was written after E, on either side of the point, is in the captured pass
        that follows, and only that makes the target an instant. A target that has been one shows
        the point committed last and not what it keeps of the pass, and that is no more than was
        read here after E. ``left`` is what it lacks once it is compared.
        """
        await self.held()
        disks = self._source.record.disks
        starts = [0] * len(disks)
        data = 0
        if left is not None and left.room is not None:
            data = await trio.to_thread.run_sync(left.data_bytes)
            if await self._is_only_anew(left.room, data):
                reached = left = None
        if reached is None or self._instants_only:
            self.on_phase("comparing")
        else:
            self.on_phase("filling")
        if reached is None:
            epoch = await self._close_epoch()
        else:
            epoch = reached.epoch
            starts[: reached.disk] = [d.size for d in disks[: reached.disk]]
            starts[reached.disk] = reached.offset // m.HASH_BLOCK_BYTES * m.HASH_BLOCK_BYTES
        self.progress.begin("compare", [d.size for d in disks], starts)
        log.info("comparing %d bytes, because %s", sum(self.progress.left), self.cause)
        kept = 0 if left is None else left.kept_bytes
        await self._begin(epoch, "compare", data, continues=reached is not None, kept_bytes=kept)
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
            await self._send_ranges(disk, ranges, holes=True, count=False, epoch=epoch)
            self._advance(disk, length)
            await self._checkpoint(epoch, disk, offset + length)
        if self._instants_only:
            # Invariant: a target that has been one instant goes from there to another one.
            await self._read_again()
            # Last of the comparison, so that nothing of it is repeated from here on.
            await self._say_reached(epoch, len(disks) - 1, disks[-1].size)
            left = left or Remainder(self._source, epoch)
            if (instant := await self._send_instant(left)) is None:
                return await self._compare()
            epoch = instant
        await self._commit(epoch, consistent=self._instants_only)
