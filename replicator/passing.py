"""One pass of a sender: what goes out between Begin and Commit, and how far it is said to be."""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from fusedisk.replicas import Sent
from replicator import messages as m
from replicator.batches import Batch, Unread
from replicator.chain import Chain
from replicator.compression import Compressor
from replicator.link import Link
from replicator.outgoing import Outgoing
from replicator.progress import Progress
from replicator.questions import Questions
from replicator.rates import Rates
from replicator.running import first_error
from replicator.source import Source
from replicator.transfers import Readable, TransferDigest

_CHECKPOINT_SECONDS = 2.0
_REREAD_SECONDS_MIN, _REREAD_SECONDS_MAX = 0.5, 30.0
_REREAD_PING_SECONDS = 5.0


class Passes(Questions):
    """The passes of a session, one after the other; which there are, replicator.sender knows."""

    def __init__(
        self,
        source: Source,
        link: Link,
        progress: Progress,
        sent: Sent,
        rates: Rates | None = None,
        compressor: Compressor | None = None,
        chain: Chain | None = None,
    ) -> None:
        super().__init__(link)
        self._source = source
        self._sent = sent
        self._rates = rates or Rates()
        self._working_since = trio.current_time()
        self._compressor = compressor or Compressor("none")
        self._outgoing = Outgoing(link, source, self._compressor, lambda: self.held())
        self._unread: list[Unread] = []
        self._checkpointed_at = 0.0
        self._pass_bytes = 0
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
        self.repairs: list[tuple[int, int, int]] = []
        """(disk, start, end) to send with the next pass, whether it changed or not."""
        self.on_further: Callable[[int, int], None] = lambda *_: None
        """Told now and then the disk and the byte that a fill or a comparison is at."""
        self.on_unread: Callable[[list[Unread]], None] = lambda _: None
        """Told what a pass lacks because it cannot be read, and at last that it lacks nothing."""
        self.held: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited before each piece of work; returns at once unless replication is paused."""

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
        self,
        epoch: int,
        kind: str,
        data_bytes: int = 0,
        *,
        continues: bool = False,
        kept_bytes: int = 0,
    ) -> None:
        """Begin a pass, or go on with one that takes ``kept_bytes`` at the target."""
        self._digest, root = self.chain.begin(kind, continues=continues)
        self._unread = []
        self._pass_bytes = kept_bytes
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
        """Read and send; with an epoch all before the ranges is there, and checkpoints go out."""

        def going(batch: Batch) -> list[m.Event]:
            return self._going(batch, holes=holes)

        async def sent(batches: Sequence[Batch]) -> None:
            for batch in batches:
                self._unread += batch.unread
            if count:
                self._advance(disk, sum(batch.covered for batch in batches))
            if epoch is not None:
                await self._checkpoint(epoch, disk, batches[-1].end)

        try:
            await self._outgoing.send(disk, ranges, readable, going, sent)
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    def _going(self, batch: Batch, *, holes: bool) -> list[m.Event]:
        """What of a batch is sent, counted; perhaps on a thread, one at a time."""
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
        return going
