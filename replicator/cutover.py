"""Cutover: converge until the estimate fits the bound, gate, last epoch, proof, hand over.

Until PROMOTE is sent every way out leads back to the guest at the source: an error, the bound on
the downtime, or the end of this process, with which the lease on the gate ends, as it does where
this process hangs.
"""

import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, on_record
from fusedisk.slowing import RATE_MAX
from fusedisk.units import format_size
from replicator.estimate import Estimate
from replicator.gating import held_gate
from replicator.guest import Guest, held_guest
from replicator.handover import (
    AskOutcome,
    NotConverged,
    NotRecorded,
    OutcomeUnknown,
    hand_over,
    require_settled,
)
from replicator.hooks import BeforeNote, run_hook
from replicator.link import Link
from replicator.messages import HASH_BLOCK_BYTES
from replicator.progress import Progress
from replicator.proof import Level, Proof
from replicator.sender import Session
from replicator.slowing import Slowing, slowing
from replicator.source import Source

log = logging.getLogger("replicator.cutover")

Seconds = Annotated[float, Meta(gt=0, le=86400)]
Command = Annotated[str, Meta(min_length=1, max_length=8192)]
Socket = Annotated[str, Meta(min_length=1, max_length=4096)]


class CutoverOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for; times in seconds."""

    downtime_seconds_max: Seconds = 1.0
    timeout_seconds: Seconds = 60.0
    before: Command | None = None
    after: Command | None = None
    on_rollback: Command | None = None
    hook_seconds_max: Seconds = 30.0
    verify: Level = "last"
    dry_run: bool = False
    qmp: Socket | None = None
    migrate_to: Command | None = None
    slow_floor: Annotated[int, Meta(ge=1, le=RATE_MAX)] | None = None
    """Bytes a second down to which the guest may be slowed; None: not at all."""


class Cutover:
    """One attempt over one link."""

    def __init__(
        self,
        source: Source,
        session: Session,
        link: Link,
        record: FenceRecord,
        options: CutoverOptions,
        ask_outcome: AskOutcome,
    ) -> None:
        """``record`` is the one to write, save its epoch."""
        self._source, self._session, self._link = source, session, link
        self._record, self._options, self._ask_outcome = record, options, ask_outcome
        assert session.committed is not None
        self._proof = Proof(source, options.verify, session.committed)
        self._estimate = Estimate()
        self._predicted_ms: float | None = None
        self._guest = Guest()
        self._images = [Path(disk.path) for disk in source.record.disks]
        self._slowing: Slowing | None = None
        self.phase = "converging"
        self.progress: Progress | None = None
        self.on_change: Callable[[], None] = lambda: None

    async def run(self) -> dict[str, Any]:
        """Move the disks: {"outcome", "downtime_ms", "predicted_ms", "phases", "epoch", ...}.

        Raises NotConverged or another FuseDiskError, LinkLost, OSError or RemoteProtocolError with
        the guest going on at the source; OutcomeUnknown.
        """
        options = self._options
        await trio.to_thread.run_sync(require_settled, self._source)
        if options.verify == "full":
            self._enter("verifying")
            self.progress = Progress()
            await self._proof.everything(self._session, self.progress)
            self.progress = None
        async with self._maybe_slowed():
            result = await self._move()
        if options.after is not None and not options.dry_run:
            self._enter("after")
            result["after"] = await self._hook_noted(
                "--after", options.after, "promoted", result["downtime_ms"]
            )
        return result

    async def _move(self) -> dict[str, Any]:
        options = self._options
        begun = False
        note = BeforeNote(self._source.state, self._record.replica)
        try:
            async with self._held_guest() as self._guest:
                await self._converge()
                if options.dry_run:
                    return self._result("dry-run", self._predicted_ms, {})
                begun = True
                if options.before is not None:
                    self._enter("before")
                    facts = self._facts("pending")
                    await trio.to_thread.run_sync(note.write, facts)
                    await self._run_hook("--before", options.before, facts, (note.fd,))
                    # The hook took its time, and only it knows whether the guest still writes.
                    await self._converge()
                await self._pause()
                return await self._switch()
        except OutcomeUnknown:
            # Whether the guest may go on is just what is not known.
            raise
        except BaseException as error:
            if begun and options.on_rollback is not None:
                with trio.CancelScope(shield=True):
                    # Invariant: as for a guest of QEMU, with a record the guest does not go on.
                    known = isinstance(error, NotRecorded)
                    if known or not await trio.to_thread.run_sync(on_record, self._images):
                        await self._hook_noted("--on-rollback", options.on_rollback, "rolled-back")
            raise
        finally:
            note.remove()

    @asynccontextmanager
    async def _maybe_slowed(self) -> AsyncIterator[None]:
        if self._options.slow_floor is None:
            yield
            return
        async with slowing(self._source.control, self._options.slow_floor) as self._slowing:
            yield

    def left(self) -> int:
        """Bytes that are left to send; a thread's work."""
        return self._source.lag(self._session.committed or 0).bytes

    def report(self, left: int) -> dict[str, Any]:
        """The ``cutover`` of the status."""
        bound = self._options.downtime_seconds_max
        estimate = self._estimate.report(left)
        if estimate["estimate_ms"] is not None:
            estimate["estimate_ms"] += 1000 * self._guest.seconds(bound)
        return {
            "phase": self.phase,
            "remaining_bytes": left,
            "max_downtime_ms": 1000 * bound,
            "memory": self._guest.memory,
            "slowed_to": None if self._slowing is None else self._slowing.rate,
            **estimate,
        }

    async def _converge(self) -> None:
        """Pass after pass, until what is left should fit into the bound."""
        self._enter("converging")
        with trio.move_on_after(self._options.timeout_seconds) as limit:
            while not await self._fits():
                await self._measured_pass()
                if self._slowing is not None:
                    left = await trio.to_thread.run_sync(self.left)
                    self._slowing.step(left, self._estimate.dirty_rate, self._estimate.send_rate)
        if limit.cancelled_caught:
            raise NotConverged(
                f"{self._shortfall()} after {self._options.timeout_seconds:g} s; "
                "the guest goes on at the source"
            )

    async def _fits(self) -> bool:
        left = await trio.to_thread.run_sync(self.left)
        seconds = self._estimate.seconds(left)
        if seconds is None:
            return False
        seconds += self._guest.seconds(self._options.downtime_seconds_max)
        self._predicted_ms = 1000 * seconds
        log.info(
            "%s left, predicted downtime %.0f ms, dirty rate %s, send rate %s",
            format_size(left),
            self._predicted_ms,
            _rate(self._estimate.dirty_rate),
            _rate(self._estimate.send_rate),
        )
        self.on_change()
        return seconds <= self._options.downtime_seconds_max

    def _shortfall(self) -> str:
        estimate = self._estimate
        rates = f"{_rate(estimate.dirty_rate)} against {_rate(estimate.send_rate)}"
        if self._slowing is not None and self._slowing.rate is not None:
            rates += f", the guest slowed to {_rate(self._slowing.rate)}"
        if estimate.outrun:
            advice = "" if self._slowing else "; try --slow-guest"
            return f"the guest writes faster than the link and the target carry ({rates}{advice})"
        expected = "unknown" if self._predicted_ms is None else f"{self._predicted_ms:.0f} ms"
        return (
            f"the downtime expected ({expected}) stays above --max-downtime "
            f"({1000 * self._options.downtime_seconds_max:.0f} ms; {rates})"
        )

    async def _measured_pass(self) -> None:
        """All that the last pass will do, while the guest still runs."""
        begun = trio.current_time()
        await self._session.next_pass()
        closed = self._session.committed
        await self._proof.changed(self._session)
        await self._until_applied()
        await self._source.sync()
        seconds = trio.current_time() - begun
        self._estimate.note_pass(
            self._session.progress.total, seconds, self._session.commit_seconds
        )
        assert closed is not None
        # The epoch was closed as the pass began.
        self._estimate.note_dirty(await trio.to_thread.run_sync(self.left), seconds)

    async def _until_applied(self) -> None:
        """A hash is of the images, so its answer waits until the pass is in them."""
        size = self._source.record.disks[0].size
        await self._session.hashes(0, 0, min(HASH_BLOCK_BYTES, size))

    def _held_guest(self) -> AbstractAsyncContextManager[Guest]:
        log_path = self._source.state / "replicas" / f"{self._record.replica}.guest.log"
        return held_guest(self._options.qmp, self._options.migrate_to, self._images, log_path)

    async def _pause(self) -> None:
        """Until the guest stands still; what it writes while its memory moves is sent meanwhile."""
        options = self._options
        if options.migrate_to is not None:
            self._enter("memory")
        with trio.move_on_after(options.timeout_seconds) as limit:
            await self._guest.pause(self._measured_pass, options.downtime_seconds_max)
        if limit.cancelled_caught:
            raise NotConverged(
                f"the guest was not paused within {options.timeout_seconds:g} s; it goes on at the "
                "source, try again with a longer --timeout or --max-downtime"
            )
        # The guest ran on while its memory moved: what it wrote last may not fit any more.
        if options.migrate_to is not None and not await self._fits():
            raise NotConverged(
                f"{self._shortfall()} once the memory has moved; the guest goes on at the source"
            )

    async def _switch(self) -> dict[str, Any]:
        phases: dict[str, float] = {}
        bound = self._options.downtime_seconds_max
        predicted_ms = self._predicted_ms
        paused_at = self._guest.paused_at
        begun = trio.current_time() if paused_at is None else paused_at
        deadline = begun + bound - self._guest.memory_seconds(bound)

        def mark(phase: str) -> None:
            phases[phase] = 1000 * (trio.current_time() - begun) - sum(phases.values())

        if paused_at is not None:
            mark("pause")
        async with held_gate(self._source, deadline) as gate:
            self._enter("switching")
            with trio.move_on_at(deadline) as limit:
                # Closing the epoch also waits for the writers that passed before the gate closed.
                await self._session.next_pass()
                mark("transfer")
                await self._proof.changed(self._session)
                mark("verify")
                await self._until_applied()
                mark("apply")
                await self._source.sync()
                mark("flush")
            if limit.cancelled_caught:
                # A pass cut short leaves half a frame on the wire: the caller makes a new link.
                raise NotConverged(
                    f"the last epoch took longer than {1000 * bound:.0f} ms; the guest goes on at "
                    "the source, try again with a larger --max-downtime"
                )
            assert self._session.committed is not None
            record = msgspec.structs.replace(self._record, epoch=self._session.committed)
            # From here on nothing may cut the steps short: the outcome has to be found out.
            with trio.CancelScope(shield=True):
                unrecorded = await hand_over(
                    *(self._source, self._link, record, self._ask_outcome, deadline, gate),
                    lambda: self._guest.in_hand,
                    self._session.chain,
                )
            mark("promote")
        self._predicted_ms = predicted_ms
        troubles: list[str] = []
        if unrecorded is not None:
            troubles.append(
                f"the source could not record it ({unrecorded}) and refuses writes all the same: "
                "mend that, then run 'replicator resolve'"
            )
        if self._options.migrate_to is not None:
            with trio.CancelScope(shield=True):
                try:
                    await self._guest.switch()
                except FuseDiskError as error:
                    troubles.append(
                        f"the guest did not go on from it: {error}; start it anew at the target, "
                        "from the replica's disks"
                    )
            mark("memory")
        result = self._result("promoted", sum(phases.values()), phases)
        result["memory"] = self._guest.memory
        # A target that answers was promoted by the root that it was asked for.
        result["root"] = "equal" if self._session.chain.proves else "unknown"
        if troubles:
            result["exit_code"] = FuseDiskError.exit_code
            result["error"] = f"the replica is the disk now, but {'; and '.join(troubles)}"
        return result

    def _result(
        self, outcome: str, downtime_ms: float | None, phases: dict[str, float]
    ) -> dict[str, Any]:
        return {
            "outcome": outcome,
            "downtime_ms": downtime_ms,
            "predicted_ms": self._predicted_ms,
            "phases": phases,
            "epoch": self._session.committed,
            "dirty_rate": self._estimate.dirty_rate,
            "send_rate": self._estimate.send_rate,
        }

    def _facts(self, outcome: str, downtime_ms: float | None = None) -> dict[str, object]:
        return {
            "mountpoint": self._source.record.mountpoint,
            "replica": self._record.replica,
            "address": self._record.address,
            "token": self._record.token,
            "epoch": self._session.committed,
            "outcome": outcome,
            "downtime_ms": "" if downtime_ms is None else f"{downtime_ms:.0f}",
        }

    async def _run_hook(
        self, option: str, command: str, facts: dict[str, object], inherited: tuple[int, ...] = ()
    ) -> None:
        await run_hook(option, command, facts, self._options.hook_seconds_max, inherited)

    async def _hook_noted(
        self, option: str, command: str, outcome: str, downtime_ms: float | None = None
    ) -> str | None:
        """Run one where nothing is to be undone any more; what went wrong, or None."""
        try:
            await self._run_hook(option, command, self._facts(outcome, downtime_ms))
        except FuseDiskError as error:
            log.error("%s", error)
            return str(error)
        return None

    def _enter(self, phase: str) -> None:
        self.phase = phase
        log.info("cutover: %s", phase)
        self.on_change()


def new_record(name: str, address: str) -> FenceRecord:
    """The record of a cutover that begins, with a token of its own."""
    return FenceRecord(str(uuid.uuid4()), "committing", name, address, 0)


def _rate(rate: float | None) -> str:
    return "unknown" if rate is None else f"{format_size(int(rate))}/s"
