"""A sender's life: connect, synchronise, follow; and again after every loss of the link.

One task converses with the receiver, one reads all the time (replicator.senderlink), one watches
the mount, and one writes the note on the replica; all end with `Follower.run`.
"""

import dataclasses
import logging
import math
import os
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import Lag, ReplicaRecord, Sent, Verified, read_record, write_record
from replicator.address import Address
from replicator.batches import COMMITTED_LATER, Unread, describe
from replicator.cadence import Cadence
from replicator.captured import GivenUp
from replicator.chain import Chain
from replicator.compression import Compressor
from replicator.cutover import Cutover, CutoverOptions, new_record
from replicator.freeze import Freezer
from replicator.handover import (
    AnotherCutover,
    NotConverged,
    OutcomeUnknown,
    asking,
    outcome_of,
    rolled_back,
)
from replicator.link import LinkLost, TargetFailed
from replicator.messages import RemoteProtocolError
from replicator.progress import Progress
from replicator.rates import Rates
from replicator.sender import Session
from replicator.senderlink import KEEPALIVE_SECONDS, Pace, SenderLink
from replicator.settings import Changes, SenderSettings
from replicator.source import Source, measure
from replicator.standing import RETRY_SECONDS_MAX, Standing
from replicator.transport.connecting import Connect
from replicator.verify import Findings, Verification, VerifyOptions

log = logging.getLogger("replicator.sender")

Outcome: TypeAlias = dict[str, Any] | FuseDiskError

_FIRST_CONNECT_SECONDS_MAX = 30.0
_WATCH_SECONDS = 1.0
_MOUNT_POLL_SECONDS = 0.5
_AGE_POLL_SECONDS = 0.5
_VERIFY_POLL_SECONDS = 60.0

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
        self._source, self._name, self._address = source, name, address
        self._connect, self._settings = connect, settings
        self._instance = str(uuid.uuid4())
        self._pace = Pace(settings.bandwidth)
        self._session: Session | None = None
        self._compressor = Compressor(settings.compress)
        self._chain = Chain()
        self._began = trio.current_time()
        self._reached = self._committed_here = self._unmounted = False
        self._wake = trio.Event()
        self._cutover: tuple[CutoverOptions, trio.MemorySendChannel[Outcome]] | None = None
        self._attempt: Cutover | None = None
        self._verification: Verification | None = None
        self._noting = trio.Event()
        self._given_up = GivenUp()
        self._freezer = Freezer(settings.freeze, source.state / "replicas" / f"{name}.freeze.log")
        self.progress = Progress()
        self.sent = Sent()
        self.rates = Rates()
        self.standing = Standing(self._stands_otherwise)
        # How far a fill or a comparison ever came, and when the link was there.
        self._furthest = (-1, 0)
        self._opened_at = math.inf
        self.committed: int | None = None
        self.commits, self.paused = 0, False
        self.on_change: Callable[[], None] = lambda: None
        try:
            noted = read_record(source.state, name)
        except FuseDiskError as damage:
            log.warning("%s; it is written anew", damage)
            noted = None
        self._closed_at = time.time()
        self.cadence = Cadence(settings.rpo_seconds)
        self._pinged_at = 0.0
        self.verified: Verified | None = None if noted is None else noted.verified
        if noted is not None:
            if settings.max_downtime_ms is None:
                settings.max_downtime_ms = noted.max_downtime_ms
            if noted.generation == source.record.generation:
                self.committed = noted.epoch
                self._chain = Chain(noted.root)
                self._closed_at = noted.closed_at or self._closed_at
                if noted.epoch is not None:
                    # Before this process there is only the clock on the wall.
                    self.cadence.is_as_of(
                        trio.current_time() - max(0.0, time.time() - self._closed_at)
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
                nursery.start_soon(self._keep_note)
                nursery.start_soon(measure, self._source, self.rates)
                nursery.start_soon(self._watch_mount, nursery.cancel_scope)
                nursery.start_soon(self._watch_age)
                nursery.start_soon(self._verify_now_and_then)
                try:
                    await self._keep_linked()
                except (OSError, FuseDiskError) as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._freezer.close()
                await self._write_note()
        if self._unmounted and self._settings.once and not self._committed_here:
            raise FuseDiskError(
                "the mount was unmounted before a copy was committed; mount it and start again"
            )
        if self._unmounted:
            log.info("the mount was unmounted; the next start goes on from here")
        elif failure is not None:
            raise failure

    async def _watch_mount(self, scope: trio.CancelScope) -> None:
        # A cutover finds out by itself: it has an answer to give.
        while self._source.mounted or self._attempt is not None:
            await trio.sleep(_MOUNT_POLL_SECONDS)
        self._unmounted = True
        scope.cancel()

    async def _watch_age(self) -> None:
        """Say when the newest point is older than wanted, and when it no longer is."""
        while True:
            await trio.sleep(_AGE_POLL_SECONDS)
            began = trio.current_time()
            committed = self.committed
            lag = await trio.to_thread.run_sync(self._source.lag, committed or 0)
            if committed is not None and committed == self.committed and not lag.chunks:
                self.cadence.is_as_of(began)
            said = self.cadence.watch(trio.current_time())
            if said is not None:
                log.warning("%s (%s%s)", said, self.state, f": {self.error}" if self.error else "")

    async def _verify_now_and_then(self) -> None:
        every = self._settings.verify_every
        while every is not None:
            await trio.sleep(min(_VERIFY_POLL_SECONDS, every))
            last = self.verified.at if self.verified is not None else 0.0
            # A clock that was set back does not put it off for longer than asked for.
            if self.state != "following" or 0 <= time.time() - last < every:
                continue
            try:
                found = await self.verify(VerifyOptions(self._settings.verify_bandwidth))
            except FuseDiskError as error:
                log.warning("the replica was not verified: %s", error)
                continue
            if found.outcome == "differs":
                log.error(
                    "the replica differs in %d bytes; run 'replicator verify --repair'",
                    found.differing_bytes,
                )

    async def _keep_linked(self) -> None:
        while True:
            self.standing.enter("connecting")
            try:
                await self._one_link()
                return
            except _LINK_ENDINGS as error:
                if not self._source.mounted:
                    self._unmounted = True
                    return
                self._raise_final(error)
                self.standing.fail(
                    str(error) or "the receiver does not answer",
                    refused=isinstance(error, TargetFailed),
                )
            finally:
                self._opened_at = math.inf
            if self._verification is not None:
                self._verification.fail(FuseDiskError(f"{self.error}; verify again"))
            await self._wait_to_retry()

    def _raise_final(self, error: Exception) -> None:
        """Raise what trying again would not mend, or is not wanted for."""
        if isinstance(error, FuseDiskError):
            raise error
        if isinstance(error, RemoteProtocolError) and not self._reached:
            raise FuseDiskError(f"the receiver at {self._address} is none: {error}") from None
        if isinstance(error, TargetFailed) and self._settings.on_target_error == "stop":
            raise FuseDiskError(f"{error}; ended by --on-target-error stop") from None

    async def _wait_to_retry(self) -> None:
        seconds_max = RETRY_SECONDS_MAX
        if self._settings.once and not self._reached:
            left = self._began + _FIRST_CONNECT_SECONDS_MAX - trio.current_time()
            if left <= 0:
                raise FuseDiskError(
                    f"{self.error}; tried for {_FIRST_CONNECT_SECONDS_MAX:.0f} s, is there a "
                    f"receiver at {self._address}?"
                )
            seconds_max = left
        delay = self.standing.wait(trio.current_time(), seconds_max)
        log.warning("%s; trying again in %.1f s", self.error, delay)
        await trio.sleep(delay)
        self.standing.retry_at = None

    async def _one_link(self) -> None:
        async with self._connect() as stream:
            await self._with_link(
                SenderLink(stream, self._pace, self.sent, self._settings.silence_seconds_max)
            )

    async def _with_link(self, link: SenderLink) -> None:
        link.on_end = lambda: self._wake.set()
        session = Session(
            *(self._source, link, self._name, self._instance),
            *(self.progress, self.sent, self.rates, self._compressor),
            chain=self._chain,
        )
        session.spill_bytes = self._settings.spill_bytes
        session.given_up = self._given_up
        self._session = session
        session.on_phase = self.standing.enter
        session.on_further = self._note_place
        session.on_unread = self._note_unread
        session.held = lambda: self._hold(session)
        session.frozen = lambda: self._freezer.frozen(skip=self._attempt is not None)
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
            self._furthest = (-1, 0)
        if opened.state == "new" or opened.generation != self._source.record.generation:
            # The note on it is of something that is no more.
            self.committed = None
            self.cadence.unknown()
        await session.synchronise(opened)
        self._note_commit(session)
        self.standing.enter("following")
        if not session.progress.finished:
            # Nothing had to be synchronised, so nothing is known to be left of an earlier phase.
            self.progress.begin("pass", [0] * len(self._source.fds))
            self.progress.finish()
        await self._follow(session, link)

    async def _follow(self, session: Session, link: SenderLink) -> None:
        while self._source.mounted:
            assert session.committed is not None
            link.raise_ended()
            await self._hold(session)
            if self._cutover is not None:
                await self._do_cutover(session, link)
                if self.state == "promoted":
                    return
                continue
            began = trio.current_time()
            waiting = await trio.to_thread.run_sync(self._source.lag, session.committed)
            if not waiting.chunks:
                # A mark comes before its write is acknowledged.
                self.cadence.is_as_of(began)
            due = self._settings.once or self.cadence.is_due(waiting.bytes, trio.current_time())
            if session.repairs or (waiting.chunks and due):
                await session.next_pass()
                self._note_commit(session)
                if session.instant is not None:
                    self.cadence.note_pass(waiting.bytes, session.instant, trio.current_time())
                self._pinged_at = trio.current_time()
            if self._settings.once:
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
        if self._verification is not None:
            await self._verification.work(session, until, self._wake)
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
        if paused and (self._cutover is not None or self.state in ("cutover", "promoted")):
            raise FuseDiskError("a cutover is under way; it cannot be paused")
        self.paused = paused
        self._wake.set()

    def change(self, changes: Changes) -> None:
        """Apply new settings at once."""
        changes.apply(self._settings)
        self.cadence.target = self._settings.rpo_seconds
        self._pace.set_rate(self._settings.bandwidth)
        self._wake.set()
        self._noting.set()

    async def verify(self, options: VerifyOptions) -> Findings:
        """Compare the replica by hash between passes, as soon as it follows.

        Raises FuseDiskError where that cannot be, or the link is lost.
        """
        if self._verification is not None:
            raise FuseDiskError("another verify of this replica is under way; let it finish")
        if self.paused:
            raise FuseDiskError("the replica is paused; resume it first")
        if self.state in ("waiting", "cutover", "promoted", "failed"):
            reason = f" ({self.error})" if self.error else ""
            raise FuseDiskError(f"the replica is {self.state}{reason}; verify while it follows")
        self._verification = Verification(self._source, options)
        self._wake.set()
        try:
            found = await self._verification.result()
        finally:
            self._verification = None
            if self._session is not None:
                self._session.repairs.clear()
        self.verified = found.summary(time.time())
        self._noting.set()
        return found

    async def cut_over(self, options: CutoverOptions) -> dict[str, Any]:
        """Cut over as soon as the replica follows; see replicator.cutover.Cutover for errors."""
        if self._cutover is not None:
            raise AnotherCutover("another cutover is under way; wait until it has ended")
        if self.paused:
            raise FuseDiskError("the replica is paused; resume it first")
        answer, answers = trio.open_memory_channel[Outcome](1)
        self._cutover = options, answer
        self._wake.set()
        try:
            outcome: Outcome | None = None
            with trio.move_on_after(options.timeout_seconds):
                outcome = await answers.receive()
            if outcome is None:
                # Invariant: what has begun keeps its own bounds, whatever the state says meanwhile,
                # and nobody is told how it ended before it has.
                if self._attempt is None and not answers.statistics().current_buffer_used:
                    raise NotConverged(
                        f"the replica is still {self.state} after {options.timeout_seconds:g} s; "
                        "the guest goes on at the source"
                    )
                outcome = await answers.receive()
        finally:
            self._cutover = None
        if isinstance(outcome, FuseDiskError):
            raise outcome
        return outcome

    async def outcome_of(self, error: FuseDiskError) -> str:
        """What may be said of a cutover that ended so."""
        return await trio.to_thread.run_sync(outcome_of, self._source, error)

    async def _do_cutover(self, session: Session, link: SenderLink) -> None:
        assert self._cutover is not None
        options, answer = self._cutover
        self.standing.enter("cutover")
        record = new_record(self._name, str(self._address))
        ask = asking(self._connect, self._source.record.source_id)
        self._attempt = Cutover(self._source, session, link, record, options, ask)
        self._attempt.on_change = self.on_change
        try:
            result = await self._attempt.run()
        except OutcomeUnknown as error:
            answer.send_nowait(error)
            self.standing.enter("failed")
            # The one who asked has to hear it before this process ends.
            await trio.sleep(0.5)
            raise
        except _LINK_ENDINGS as error:
            told = rolled_back(error)
            answer.send_nowait(told)
            self._cutover = self._attempt = None
            # A pass may have been cut short: only a new link is in a known state.
            raise LinkLost(f"the cutover was rolled back: {told}") from None
        self._note_commit(session)
        if result["outcome"] == "dry-run":
            answer.send_nowait(result)
            self._cutover = self._attempt = None
            self.standing.enter("following")
            return
        self.standing.enter("promoted")
        answer.send_nowait(result)
        await trio.sleep(0.5)
        self._attempt = None

    def _note_commit(self, session: Session) -> None:
        if session.closed_at is not None:
            self._committed_here = True
            self.commits += 1
            self._closed_at = session.closed_at
            self._furthest = (-1, 0)
            self.standing.progressed()
        if session.instant is not None:
            self.cadence.is_as_of(session.instant)
        self.committed = session.committed
        self._noting.set()
        self.on_change()

    def _note_place(self, disk: int, offset: int) -> None:
        """A fill or a comparison is at a place now, in the order of all passes like it."""
        if (disk, offset) > self._furthest:
            self._furthest = disk, offset
            self.standing.progressed()

    def _stands_otherwise(self) -> None:
        self._noting.set()
        self.on_change()

    def _note_unread(self, unread: list[Unread]) -> None:
        if not unread:
            self.standing.cannot_read(None)
            return
        what = describe(unread, [disk.path for disk in self._source.record.disks])
        if self._settings.on_source_error == "stop":
            raise FuseDiskError(f"{what}; ended by --on-source-error stop")
        log.warning("%s; %s", what, COMMITTED_LATER)
        self.standing.cannot_read(f"{what}; {COMMITTED_LATER}")

    async def _keep_note(self) -> None:
        while True:
            await self._noting.wait()
            self._noting = trio.Event()
            await self._write_note()

    async def _write_note(self) -> None:
        record = ReplicaRecord(
            self._name,
            str(self._address),
            self._source.record.generation,
            self.committed,
            self._closed_at if self.committed is not None else None,
            self.state,
            msgspec.structs.replace(self.sent),
            self._settings.max_downtime_ms,
            self.verified,
            self._chain.root,
        )
        try:
            await trio.to_thread.run_sync(write_record, self._source.state, record)
        except OSError as error:
            # Only status misses it: the target's own record decides where to go on.
            log.warning("cannot note the state of the replica: %s", error)

    async def report(self) -> dict[str, Any]:
        """This replica's entry in ``replicator status --json``."""
        # In a thread: the maps of large disks are a GiB and more.
        attempt = self._attempt
        lag, newer, left = await trio.to_thread.run_sync(self._lags, attempt)
        now = trio.current_time()
        changed = lag.chunks or self.committed is None
        error = self.error
        if error and (at := self.standing.retry_at) is not None:
            error = f"{error}; trying again in {max(0.0, at - now):.0f} s"
        progress = self.progress
        if self._verification is not None and self.state == "following":
            progress = self._verification.progress
        if attempt is not None and attempt.progress is not None:
            progress = attempt.progress
        return {
            "name": self._name,
            "address": str(self._address),
            "state": self.state,
            "progress": {"phase": progress.phase, **progress.report(now)},
            "disks": progress.disks([disk.name for disk in self._source.record.disks]),
            "lag": {
                "bytes": lag.bytes,
                "chunks": lag.chunks,
                "seconds": max(0.0, time.time() - self._closed_at) if changed else 0.0,
            },
            "rpo": self.cadence.report(now),
            "verify": {
                "every": self._settings.verify_every,
                "last": msgspec.to_builtins(self.verified),
            },
            "epoch": {"current": self._source.control.epoch, "committed": self.committed},
            "sent": msgspec.to_builtins(self.sent),
            "cause": self._session.cause if self._session and self.progress.whole else None,
            "forecast": self._forecast(lag.bytes, newer),
            "cutover": None if attempt is None else attempt.report(left),
            "freeze": self._freezer.report(),
            "capture": self._session and self._session.captured and self._session.captured.report(),
            "given_up": dataclasses.asdict(self._given_up),
            "error": error,
            "sender": {"pid": os.getpid()},
        }

    def _lags(self, attempt: Cutover | None) -> tuple[Lag, int, int]:
        """What the replica lacks; what was written since all of it is being sent; and what a
        cutover has left."""
        lag = self._source.lag(self.committed or 0)
        left = 0 if attempt is None else attempt.left()
        if not self.progress.whole:
            return lag, 0, left
        return lag, self._source.lag(self._source.control.epoch - 1).bytes, left

    def _forecast(self, left: int, newer: int) -> dict[str, Any]:
        if self.progress.whole:
            # What is written meanwhile is for the pass that follows.
            left = sum(self.progress.left) + newer
        return self.rates.report(left, "paused" if self.paused else self.state)
