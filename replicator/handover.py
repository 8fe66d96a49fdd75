"""The switch itself: *committing* at the source, PROMOTE, *fenced*; and finding out what became
of it where the answer was lost.

What a crash at each step leaves:

before *committing* is recorded   the gate opens as its holder ends, the guest goes on at the source
after it, before *fenced*         outcome unknown: the server refuses writes until it is resolved
after *fenced*                    the target is the disk; the source refuses writes for good

Invariants, each of which the model in tests/cutover_model.py shows to be needed:

- PROMOTE is sent only after *committing* is durable beside every image.
- *committing* is removed only where PROMOTE was not sent, or by the target's durable *aborted*.
- The fence is up before the gate opens, whenever the target may have promoted.
- PROMOTE is sent only if this very mount is there still once *committing* is durable. A mount
  publishes its control file before it looks for a record (fusedisk.mounting), so one that takes the
  place of ours finds *committing*, or is found. Gate and fence in the mapping of a mount that is
  gone hold nobody's writes.
- PROMOTE is sent only after the gate was found closed and, in the same step, made one that opens
  only behind the fence (fusedisk.gateword): the server lets go the gate of a sender that hangs.
- A record that a disk takes too long to write is left to its thread, which takes it back and holds
  the lease until then. PROMOTE is not sent, so the guest goes on, whatever is on record meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, clear_fence, read_fence, record_fence
from fusedisk.gate import open_gate, take_lease
from replicator.chain import Chain
from replicator.link import Link, LinkLost, Unequal, raise_failed
from replicator.messages import (
    Aborted,
    Bye,
    Failed,
    Hello,
    Promote,
    Promoted,
    RemoteProtocolError,
    Resolve,
    Welcome,
)
from replicator.proof import Differs
from replicator.source import Source
from replicator.transport.connecting import Connect

if TYPE_CHECKING:
    from replicator.gating import Gate

log = logging.getLogger("replicator.handover")

_ANSWER_SECONDS_MAX = 30.0
HELD_SECONDS_MAX = 30.0
"""How long writes stay held while a lost answer is asked for again; then they are refused."""
_ASK_AGAIN_SECONDS = 0.5
PROMOTION_SECONDS_MAX = _ANSWER_SECONDS_MAX + HELD_SECONDS_MAX + 5.0
"""How long a sender that lives may keep writes held for a promotion."""
_DISK_SECONDS_MAX = 10.0
"""How long a record that is to be changed is waited for once PROMOTE may have been sent."""

AskOutcome: TypeAlias = Callable[[FenceRecord], Awaitable[str]]
"""`resolve` over a connection of its own."""

_NO_ANSWER = (
    *(LinkLost, OSError, trio.TooSlowError, trio.BrokenResourceError),
    *(RemoteProtocolError, FuseDiskError),
)


class NotConverged(FuseDiskError):
    """The bound on the downtime could not be kept; the guest goes on at the source."""

    exit_code = 3


class NotRecorded(NotConverged):
    """*committing* could not be recorded in time: what there is of it is taken back later.

    Nothing is promoted, and the guest goes on at the source, also beside the record.
    """


class OutcomeUnknown(FuseDiskError):
    """The promotion was begun and its answer was lost."""

    exit_code = 4


class AnotherCutover(FuseDiskError):
    """This cutover did not begin, and of the guest only another one, begun or done, can tell."""


def asking(connect: Connect, source_id: str) -> AskOutcome:
    """`resolve`, ready to be called."""

    async def ask(record: FenceRecord) -> str:
        async with connect() as stream:
            return await resolve(Link(stream, "sender"), record, source_id)

    return ask


def rolled_back(error: Exception) -> FuseDiskError:
    """What to tell the one who asked for a cutover that ended before PROMOTE was sent."""
    if isinstance(error, FuseDiskError):
        return error
    reason = str(error) or "the receiver does not answer"
    return FuseDiskError(f"{reason}; the guest goes on at the source")


async def hand_over(
    source: Source,
    link: Link,
    record: FenceRecord,
    ask_outcome: AskOutcome,
    deadline: float,
    gate: Gate,
    in_hand: Callable[[], bool],
    chain: Chain,
) -> str | None:
    """Promote the target and fence the source; the gate is closed, the record says *committing*.

    Returns what went wrong with the record *fenced* of a target that is promoted. Until PROMOTE is
    sent ``deadline`` holds. ``in_hand`` says whether the guest is still held. ``chain`` says what
    root the replica has to have, if that is known. Raises NotConverged, Differs or FuseDiskError
    where the guest may go on, OutcomeUnknown where it may not. To be called where nothing can
    cancel it.
    """
    images = [Path(disk.path) for disk in source.record.disks]
    recorded = await _record(source, images, record, gate, deadline)
    # Invariant: recorded first. Whoever lets the gate or the guest go from now on knows of it.
    held = recorded and trio.current_time() <= deadline and in_hand()
    if not held or not gate.begin_promotion(PROMOTION_SECONDS_MAX):
        await _take_back(source, images, gate)
        raise NotConverged(
            "the last epoch took longer than --max-downtime; the guest goes on at the source, "
            "try again or allow more"
        )
    if not source.mounted:
        await _take_back(source, images, gate)
        raise FuseDiskError(
            "the disks were unmounted during the cutover, and nothing was promoted; if they are "
            "mounted again and refuse writes, run 'replicator resolve'; then start again"
        )
    try:
        with trio.fail_after(_ANSWER_SECONDS_MAX):
            await link.send(Promote(record.token, record.epoch, chain.promise()))
            await link.expect(Promoted)
    except _NO_ANSWER as error:
        outcome = await _ask_again(source, record, ask_outcome, error)
        if outcome != "promoted":
            await _take_back(source, images, gate)
            if isinstance(error, Unequal):
                raise Differs(
                    f"{error}; the guest goes on at the source, which compares the disks"
                ) from None
            raise FuseDiskError(
                f"the target did not promote ({error or 'no answer'}) and never will under this "
                "cutover; the guest goes on at the source"
            ) from None
        # It may have been another promotion, which compared nothing.
        chain.doubt()
    try:
        await _in_time(gate, settle, source, images, record, "promoted")
    except OSError as error:
        # *committing* refuses writes as well, and resolve turns it into *fenced*.
        log.error("cannot record the fence: %s", error)
        return str(error)
    return None


class _Recording:
    """*committing*, written by a thread that takes it back itself once nobody waits for it."""

    def __init__(self, images: list[Path], record: FenceRecord) -> None:
        self._images, self._record = images, record
        self._lock = threading.Lock()
        self._ended = self._withdrawn = False

    def write(self) -> None:
        """The work of the thread. Raises OSError."""
        try:
            record_fence(self._images, self._record)
        finally:
            with self._lock:
                self._ended = True
            if self._withdrawn:
                self._take_back()

    def _take_back(self) -> None:
        try:
            clear_fence(self._images)
        except OSError as error:
            log.error(
                "nothing was promoted, but the record of it cannot be removed: %s; the next mount "
                "refuses writes until 'replicator resolve' has removed it",
                error,
            )
        else:
            log.info("the disk answered: the record of the cutover is taken back")

    def withdraw(self) -> bool:
        """Leave it to the thread; False where that has ended already."""
        with self._lock:
            self._withdrawn = not self._ended
        return self._withdrawn


async def _record(
    source: Source, images: list[Path], record: FenceRecord, gate: Gate, deadline: float
) -> bool:
    """Make *committing* durable by ``deadline``; False where it may be there, but came too late.

    Raises FuseDiskError; then the guest may go on.
    """
    recording = _Recording(images, record)
    try:
        ended = await gate.work(deadline, recording.write)
    except OSError as error:
        # Nothing was said to the target, so the outcome is known.
        await _take_back(source, images, gate)
        raise FuseDiskError(
            f"cannot record the cutover beside the images: {error}; the guest goes on at the source"
        ) from None
    if not ended and recording.withdraw():
        gate.withdraw()
        raise NotRecorded(
            "the cutover could not be recorded beside the images within --max-downtime; nothing "
            "was promoted and the guest goes on at the source; see whether their disk answers"
        )
    return ended


async def _in_time(gate: Gate, work: Callable[..., None], *arguments: object) -> None:
    """Change a record. Raises OSError, also where the disk does not answer."""
    if not await gate.work(trio.current_time() + _DISK_SECONDS_MAX, work, *arguments):
        raise TimeoutError(f"its disk has not answered for {_DISK_SECONDS_MAX:g} s")


async def _take_back(source: Source, images: list[Path], gate: Gate) -> None:
    """Remove *committing*, where the target never promotes under it.

    Raises OutcomeUnknown where that fails: a record that is left refuses writes, here and after
    every mount, so nobody may be told that the guest goes on.
    """
    try:
        await _in_time(gate, clear_fence, images)
    except OSError as error:
        source.control.set_fence(True)
        raise OutcomeUnknown(
            f"nothing was promoted, but the record of it cannot be removed: {error}; writes are "
            "refused until 'replicator resolve' has removed it"
        ) from None
    # The gate may have been let go meanwhile, behind the fence.
    source.control.set_fence(False)


async def _ask_again(
    source: Source, record: FenceRecord, ask_outcome: AskOutcome, lost: Exception
) -> str:
    """The outcome, asked for while writes are still held. Raises OutcomeUnknown."""
    why = lost
    with trio.move_on_after(HELD_SECONDS_MAX):
        while True:
            log.warning("the answer to the promotion was lost (%s); asking again", why)
            try:
                return await ask_outcome(record)
            except _NO_ANSWER as error:
                why = error
            await trio.sleep(_ASK_AGAIN_SECONDS)
    source.control.set_fence(True)
    raise OutcomeUnknown(
        f"the answer to the promotion was lost ({why}); writes are refused until "
        "'replicator resolve' has settled it"
    )


async def resolve(link: Link, record: FenceRecord, source_id: str) -> str:
    """Ask the target how a cutover ended: ``promoted``, or ``rolled-back``.

    A target that had not promoted has by its answer refused ever to do so under this token.
    Raises LinkLost, Refused or RemoteProtocolError; then the outcome is as unknown as before.
    """
    outcome, _ = await resolve_with_token(link, record, source_id)
    return outcome


async def resolve_with_token(link: Link, record: FenceRecord, source_id: str) -> tuple[str, str]:
    """As `resolve`, with the token of the promotion, which may have been another than ours.

    Without a token on record it is asked whether there was a promotion at all.
    """
    with trio.fail_after(_ANSWER_SECONDS_MAX):
        await link.send(Hello([1], "resolve", 0))
        await link.expect(Welcome)
        await link.send(Resolve(record.replica, source_id, record.token or None))
        while True:
            event = await link.receive()
            if isinstance(event, Promoted):
                return "promoted", event.token
            if isinstance(event, Aborted):
                return "rolled-back", record.token
            if isinstance(event, Failed):
                raise_failed(event)
            if isinstance(event, Bye):
                raise LinkLost("the receiver is shutting down")


def require_settled(source: Source) -> None:
    """Raises OutcomeUnknown while an earlier cutover is unsettled, AnotherCutover after one."""
    record = read_fence(Path(disk.path) for disk in source.record.disks)
    if record is not None and record.state == "fenced":
        raise AnotherCutover(
            f"{record.replica} at {record.address} is the disk already; cut over from there"
        )
    if record is not None or source.control.fenced:
        raise OutcomeUnknown("an earlier cutover is not settled; run 'replicator resolve' first")


def outcome_of(source: Source, error: FuseDiskError) -> str:
    """What may be said of a cutover that failed: ``rolled-back`` only where the guest goes on."""
    if isinstance(error, NotRecorded):
        # What is on record is this cutover's, or a later one's.
        return "rolled-back"
    if isinstance(error, OutcomeUnknown | AnotherCutover):
        return "unknown"
    try:
        require_settled(source)
    except FuseDiskError:
        # By a cutover to another replica, since this one was asked for.
        return "unknown"
    return "rolled-back"


@contextmanager
def settling(source: Source) -> Iterator[FenceRecord | None]:
    """The record of the cutover to settle, while no cutover can begin or go on.

    Invariant: whoever removes a record holds the lease on the gate. Without it the answer about an
    old cutover could remove the record of a new one. Raises OutcomeUnknown where one is under way.
    """
    try:
        lease = take_lease(source.state)
    except BlockingIOError:
        raise OutcomeUnknown(
            "a cutover of this mount is under way; wait until it has ended, then try again"
        ) from None
    try:
        images = [Path(disk.path) for disk in source.record.disks]
        if source.control.gated:
            # Whoever closed it is dead, and its guest's writes must not wait for what we settle.
            open_gate(source.control, images)
        record = read_fence(images)
        if record is None and source.control.fenced:
            # Whoever removed the record for good was killed before lowering the fence.
            source.control.set_fence(False)
        elif record is not None and record.state == "fenced":
            # A mount that looked before the record was there: see replicator.resolving.
            source.control.set_fence(True)
        yield record
    finally:
        os.close(lease)


def settle(source: Source, images: list[Path], record: FenceRecord, outcome: str) -> None:
    """Make the source agree with the target's answer, durably before writes are let through."""
    if outcome == "promoted":
        source.control.set_fence(True)
        record_fence(
            images,
            FenceRecord(record.token, "fenced", record.replica, record.address, record.epoch),
        )
    else:
        clear_fence(images)
        source.control.set_fence(False)
