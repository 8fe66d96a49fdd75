"""A sender's life: connect, synchronise, follow; and again after every loss of the link.

One task converses with the receiver, one reads all the time (replicator.senderlink), one watches
the mount, and one writes the note on the replica; all end with `Follower.run`.
"""

import logging
import math
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import ReplicaRecord, Sent
from replicator.address import Address
from replicator.ageing import watch_age
from replicator.batches import COMMITTED_LATER, Unread, describe
from replicator.cadence import Cadence
from replicator.captured import GivenUp
from replicator.chain import Chain
from replicator.compression import Compressor
from replicator.cutover import Cutover, CutoverOptions, new_record
from replicator.freeze import Freezer
from replicator.handover import OutcomeUnknown, asking, rolled_back
from replicator.link import LinkLost, TargetFailed
from replicator.messages import RemoteProtocolError
from replicator.noting import Note, read_note
from replicator.progress import Progress
from replicator.rates import Rates
from replicator.requested import Requested
from replicator.sender import Session
from replicator.senderlink import KEEPALIVE_SECONDS, Pace, SenderLink
from replicator.settings import Changes, SenderSettings
from replicator.source import Source, measure
from replicator.standing import RETRY_SECONDS_MAX, Standing
from replicator.transport.connecting import Connect
from replicator.verifying import Verifier

log = logging.getLogger("replicator.sender")

_FIRST_CONNECT_SECONDS_MAX = 30.0
_WATCH_SECONDS = 1.0
_HEARD_SECONDS = 0.5
_MOUNT_POLL_SECONDS = 0.5

# What ends a link; all but RemoteProtocolError and FuseDiskError may go better the next time.
_LINK_ENDINGS = (
    *(LinkLost, OSError, trio.TooSlowError, trio.BrokenResourceError),
    *(RemoteProtocolError, FuseDiskError),
)


class Follower:
    """Keeps one replica up to date until told to stop. Made and used inside trio."""

    def __init__(
        self,
        source: Source,
        name: str,
        address: Address,
        connect: Connect,
        settings: SenderSettings,
    ) -> None:
        """``address`` is what is shown and recorded; ``connect`` makes a stream to it."""
        self.source, self.name, self.address = source, name, address
        self._connect, self.settings = connect, settings
        self._instance = str(uuid.uuid4())
        self._pace = Pace(settings.bandwidth)
        self.session: Session | None = None
        self._compressor = Compressor(settings.compress)
        self._chain = Chain()
        self._began = trio.current_time()
        self._reached = self._committed_here = self._unmounted = False
        self._wake = trio.Event()
        self.cutover = Requested()
        self._note = Note(source.state, self._noted)
        self.given_up = GivenUp()
        self.freezer = Freezer(settings.freeze, source.state / "replicas" / f"{name}.freeze.log")
        self.progress = Progress()
        self.sent = Sent()
        self.rates = Rates()
        self.standing = Standing(self._stands_otherwise)
        self._opened_at = math.inf
        self.committed: int | None = None
        self.commits, self.paused = 0, False
        self.on_change: Callable[[], None] = lambda: None
        noted = read_note(source.state, name)
        self.closed_at = time.time()
        self.cadence = Cadence(settings.rpo_seconds)
        self._pinged_at = 0.0
        self.verifier = Verifier(
            *(source, settings, None if noted is None else noted.verified),
            refuse=self._refuse_to_verify,
            changed=self._verifies,
        )
        if noted is not None:
            if settings.max_downtime_ms is None:
                settings.max_downtime_ms = noted.max_downtime_ms
            if noted.generation == source.record.generation:
                self.committed = noted.epoch
                self._chain = Chain(noted.root)
                self.closed_at = noted.closed_at or self.closed_at
                if noted.epoch is not None:
                    # Before this process there is only the clock on the wall.
                    self.cadence.is_as_of(
                        trio.current_time() - max(0.0, time.time() - self.closed_at)
                    )

    @property
    def state(self) -> str:
        """The ``state`` of the status."""
        return self.standing.state

    @property
    def error(self) -> str | None:
        """What is wrong, if anything."""
        return self.standing.error

    async def run(self) -> None:
        """Replicate until promoted, with ``once`` when nothing is left to send, or unmounted.

        Raises FuseDiskError for what trying again would not mend.
        """
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._note.keep)
                nursery.start_soon(measure, self.source, self.rates)
                nursery.start_soon(self._watch_mount, nursery.cancel_scope)
                nursery.start_soon(self._watch_age)
                nursery.start_soon(self.verifier.now_and_then, lambda: self.state == "following")
                try:
                    await self._keep_linked()
                except (OSError, FuseDiskError) as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self.freezer.close()
                await self._note.write()
        if self._unmounted and self.settings.once and not self._committed_here:
            raise FuseDiskError(
                "the mount was unmounted before a copy was committed; mount it and start again"
            )
        if self._unmounted:
            log.info("the mount was unmounted; the next start goes on from here")
        elif failure is not None:
            raise failure

    async def _watch_mount(self, scope: trio.CancelScope) -> None:
        # A cutover finds out by itself: it has an answer to give.
        while self.source.mounted or self.cutover.attempt is not None:
            await trio.sleep(_MOUNT_POLL_SECONDS)
        self._unmounted = True
        scope.cancel()

    async def _watch_age(self) -> None:
        def why() -> str:
            return f"{self.state}: {self.error}" if self.error else self.state

        await watch_age(self.cadence, self.source, lambda: self.committed, why)

    async def _keep_linked(self) -> None:
        while True:
            self.standing.enter("connecting")
            try:
                await self._one_link()
                return
            except _LINK_ENDINGS as error:
                if not self.source.mounted:
                    self._unmounted = True
                    return
                self._raise_final(error)
                self.standing.fail(
                    str(error) or "the receiver does not answer",
                    refused=isinstance(error, TargetFailed),
                )
            finally:
                self._opened_at = math.inf
            self.verifier.fail(FuseDiskError(f"{self.error}; verify again"))
            await self._wait_to_retry()

    def _raise_final(self, error: Exception) -> None:
        """Raise what trying again would not mend, or is not wanted for."""
        if isinstance(error, FuseDiskError):
            raise error
        if isinstance(error, RemoteProtocolError) and not self._reached:
            raise FuseDiskError(f"the receiver at {self.address} is none: {error}") from None
        if isinstance(error, TargetFailed) and self.settings.on_target_error == "stop":
            raise FuseDiskError(f"{error}; ended by --on-target-error stop") from None

    async def _wait_to_retry(self) -> None:
        seconds_max = RETRY_SECONDS_MAX
        if self.settings.once and not self._reached:
            left = self._began + _FIRST_CONNECT_SECONDS_MAX - trio.current_time()
            if left <= 0:
                raise FuseDiskError(
                    f"{self.error}; tried for {_FIRST_CONNECT_SECONDS_MAX:.0f} s, is there a "
                    f"receiver at {self.address}?"
                )
            seconds_max = left
        delay = self.standing.wait(trio.current_time(), seconds_max)
        log.warning("%s; trying again in %.1f s", self.error, delay)
        await trio.sleep(delay)
        self.standing.retry_at = None

    async def _one_link(self) -> None:
        async with self._connect() as stream:
            await self._with_link(
                SenderLink(stream, self._pace, self.sent, self.settings.silence_seconds_max)
            )

    async def _with_link(self, link: SenderLink) -> None:
        link.on_end = lambda: self._wake.set()
        session = Session(
            *(self.source, link, self.name, self._instance),
            *(self.progress, self.sent, self.rates, self._compressor),
            chain=self._chain,
        )
        session.spill_bytes = self.settings.spill_bytes
        session.given_up = self.given_up
        self.session = session
        session.on_phase = self.standing.enter
        session.on_further = self.standing.reached
        session.on_unread = self._note_unread
        session.held = lambda: self._hold(session)
        session.frozen = lambda: self.freezer.frozen(skip=self.cutover.attempt is not None)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.listen)
            nursery.start_soon(self._watch_link, link)
            try:
                await self._converse(session, link, nursery)
            except _LINK_ENDINGS as error:
                failure = error
            finally:
                await session.goodbye()
                await link.close()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _watch_link(self, link: SenderLink) -> None:
        """Say what hangs while it hangs; whether that ends the link, its timeout decides."""
        said: str | None = None
        while True:
            await trio.sleep(_WATCH_SECONDS)
            trouble = link.answers.trouble()
            if trouble is None and trio.current_time() > self._opened_at + RETRY_SECONDS_MAX:
                self.standing.holds()
            if self.error != said and self.error is not None:
                # Something else is wrong, and has been said.
                continue
            if trouble and not said:
                log.warning("%s", trouble)
            elif said and not trouble:
                log.info("the target answers again")
            self.standing.hang(trouble)
            said = trouble

    async def _converse(self, session: Session, link: SenderLink, nursery: trio.Nursery) -> None:
        opened = await session.open()
        nursery.start_soon(link.keep_asking)
        self._reached = True
        self._opened_at = trio.current_time()
        if opened.state == "new":
            self.standing.begins_anew()
        if opened.state == "new" or opened.generation != self.source.record.generation:
            # The note on it is of something that is no more.
            self.committed = None
            self.cadence.unknown()
        await session.synchronise(opened)
        self._note_commit(session)
        self.standing.enter("following")
        if not session.progress.finished:
            # Nothing had to be synchronised, so nothing is known to be left of an earlier phase.
            self.progress.begin("pass", [0] * len(self.source.fds))
            self.progress.finish()
        await self._follow(session, link)

    async def _follow(self, session: Session, link: SenderLink) -> None:
        while self.source.mounted:
            assert session.committed is not None
            link.raise_ended()
            await self._hold(session)
            if self.cutover.options is not None:
                await self._do_cutover(session, link, self.cutover.options)
                if self.state == "promoted":
                    return
                continue
            began = trio.current_time()
            waiting = await trio.to_thread.run_sync(self.source.lag, session.committed)
            if not waiting.chunks:
                # A mark comes before its write is acknowledged.
                self.cadence.is_as_of(began)
            due = self.settings.once or self.cadence.is_due(waiting.bytes, trio.current_time())
            if session.repairs or (waiting.chunks and due):
                await session.next_pass()
                self._note_commit(session)
                if session.instant is not None:
                    self.cadence.note_pass(waiting.bytes, session.instant, trio.current_time())
                self._pinged_at = trio.current_time()
            if self.settings.once:
                # One instant is committed, whatever the guest has written since.
                return
            asked = trio.current_time() >= self._pinged_at + KEEPALIVE_SECONDS
            if asked or self.standing.lost is not None:
                await session.ping()
                self._pinged_at = trio.current_time()
                # Nothing is due, and the target's disk answers.
                self.standing.progressed()
            await self._rest_verifying(session, self.cadence.poll_seconds)
        self._unmounted = True

    async def _rest_verifying(self, session: Session, seconds: float) -> None:
        until = trio.current_time() + seconds
        await self.verifier.work(session, until, self._wake)
        await self._rest(max(0.0, until - trio.current_time()))

    async def _rest(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._wake.wait()
        self._wake = trio.Event()

    async def _hold(self, session: Session) -> None:
        """While paused: stay connected, send nothing of the disks."""
        before = self.standing.doing
        while self.paused:
            if self.state != "paused":
                self.standing.enter("paused")
            await session.ping()
            await self._rest(KEEPALIVE_SECONDS)
        if self.state == "paused":
            self.standing.enter(before)

    def pause(self, paused: bool) -> None:
        """Stop sending what changed, or go on. Raises FuseDiskError during a cutover."""
        if paused and (self.cutover.options is not None or self.state in ("cutover", "promoted")):
            raise FuseDiskError("a cutover is under way; it cannot be paused")
        self.paused = paused
        self._wake.set()

    def change(self, changes: Changes) -> None:
        """Apply new settings at once."""
        changes.apply(self.settings)
        self.cadence.target = self.settings.rpo_seconds
        self._pace.set_rate(self.settings.bandwidth)
        self._wake.set()
        self._note.changed()

    def _refuse_to_verify(self) -> None:
        if self.paused:
            raise FuseDiskError("the replica is paused; resume it first")
        if self.state in ("waiting", "cutover", "promoted", "failed"):
            reason = f" ({self.error})" if self.error else ""
            raise FuseDiskError(f"the replica is {self.state}{reason}; verify while it follows")

    def _verifies(self) -> None:
        # What was to be repaired for the one before is not for the next.
        if self.verifier.progress is None and self.session is not None:
            self.session.repairs.clear()
        self._wake.set()
        self._note.changed()

    async def cut_over(self, options: CutoverOptions) -> dict[str, Any]:
        """Cut over as soon as the replica follows; see replicator.cutover.Cutover for errors."""
        self.cutover.require_none()
        if self.paused:
            raise FuseDiskError("the replica is paused; resume it first")
        self._wake.set()
        return await self.cutover.outcome(options, lambda: self.state)

    async def _do_cutover(
        self, session: Session, link: SenderLink, options: CutoverOptions
    ) -> None:
        self.standing.enter("cutover")
        record = new_record(self.name, str(self.address))
        ask = asking(self._connect, self.source.record.source_id)
        attempt = Cutover(self.source, session, link, record, options, ask)
        attempt.on_change = self.on_change
        self.cutover.attempt = attempt
        try:
            result = await attempt.run()
        except OutcomeUnknown as error:
            self.cutover.answer(error)
            self.standing.enter("failed")
            # The one who asked has to hear it before this process ends.
            await trio.sleep(_HEARD_SECONDS)
            raise
        except _LINK_ENDINGS as error:
            told = rolled_back(error)
            self.cutover.rolled_back(told)
            # A pass may have been cut short: only a new link is in a known state.
            raise LinkLost(f"the cutover was rolled back: {told}") from None
        self._note_commit(session)
        if result["outcome"] == "dry-run":
            self.cutover.rolled_back(result)
            self.standing.enter("following")
            return
        self.standing.enter("promoted")
        self.cutover.answer(result)
        await trio.sleep(_HEARD_SECONDS)
        self.cutover.attempt = None

    def _note_commit(self, session: Session) -> None:
        if session.closed_at is not None:
            self._committed_here = True
            self.commits += 1
            self.closed_at = session.closed_at
            self.standing.progressed()
        if session.instant is not None:
            self.cadence.is_as_of(session.instant)
        self.committed = session.committed
        self._note.changed()
        self.on_change()

    def _stands_otherwise(self) -> None:
        self._note.changed()
        self.on_change()

    def _note_unread(self, unread: list[Unread]) -> None:
        if not unread:
            self.standing.cannot_read(None)
            return
        what = describe(unread, [disk.path for disk in self.source.record.disks])
        if self.settings.on_source_error == "stop":
            raise FuseDiskError(f"{what}; ended by --on-source-error stop")
        log.warning("%s; %s", what, COMMITTED_LATER)
        self.standing.cannot_read(f"{what}; {COMMITTED_LATER}")

    def _noted(self) -> ReplicaRecord:
        return ReplicaRecord(
            self.name,
            str(self.address),
            self.source.record.generation,
            self.committed,
            self.closed_at if self.committed is not None else None,
            self.state,
            msgspec.structs.replace(self.sent),
            self.settings.max_downtime_ms,
            self.verifier.last,
            self._chain.root,
        )
