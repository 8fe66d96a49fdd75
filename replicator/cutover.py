"""Cutover: converge, gate, last epoch, committing, promote, fence.

What a crash at each step leaves:

before *committing* is recorded   the gate opens as we end, the guest goes on at the source
after it, before *fenced*         outcome unknown: the server refuses writes until it is resolved
after *fenced*                    the target is the disk; the source refuses writes for good

Invariant: PROMOTE is sent only after *committing* is durable beside every image.
"""

import os
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, clear_fence, record_fence
from fusedisk.gate import take_lease
from replicator.link import Link, LinkLost, raise_failed
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
from replicator.sender import Session
from replicator.source import Source


class NotConverged(FuseDiskError):
    """The bound on the downtime could not be kept; the guest goes on at the source."""

    exit_code = 3


class OutcomeUnknown(FuseDiskError):
    """The promotion was begun and its answer was lost."""

    exit_code = 4


@dataclass(frozen=True)
class CutoverOptions:
    """What was asked for; times in seconds."""

    downtime_seconds_max: float = 1.0
    timeout_seconds: float = 60.0
    before: str | None = None


async def cut_over(
    source: Source, session: Session, link: Link, name: str, address: str, options: CutoverOptions
) -> dict[str, Any]:
    """Move the disk to the target: {"outcome", "downtime_ms", "phases", "epoch"}.

    Raises NotConverged or FuseDiskError with the guest going on at the source, OutcomeUnknown.
    """
    await _converge(source, session, options)
    if options.before is not None:
        await _run_hook(options.before)
    phases: dict[str, float] = {}
    token = str(uuid.uuid4())
    images = [Path(disk.path) for disk in source.record.disks]
    begun = trio.current_time()

    def mark(phase: str) -> None:
        now = trio.current_time()
        phases[phase] = 1000 * (now - begun) - sum(phases.values())

    with _gate(source):
        with trio.move_on_after(options.downtime_seconds_max) as bound:
            # Closing the epoch also waits for the writers that passed before the gate closed.
            await session.next_pass()
            mark("transfer")
            for fd in source.fds:
                await trio.to_thread.run_sync(os.fsync, fd)
            mark("flush")
        if bound.cancelled_caught:
            # A pass cut short leaves half a frame on the wire: the caller makes a new link.
            raise NotConverged(
                f"the last epoch took longer than {options.downtime_seconds_max:.3f} s; "
                "the guest goes on, try again with a larger --max-downtime"
            )
        assert session.committed is not None
        epoch = session.committed
        record = FenceRecord(token, "committing", name, address, epoch)
        # From here on nothing may cut the steps short: the outcome has to be found out.
        with trio.CancelScope(shield=True):
            await _commit(source, link, images, record)
        mark("promote")
    return {
        "outcome": "promoted",
        "downtime_ms": sum(phases.values()),
        "phases": phases,
        "epoch": epoch,
    }


async def _commit(source: Source, link: Link, images: list[Path], record: FenceRecord) -> None:
    try:
        await trio.to_thread.run_sync(record_fence, images, record)
    except OSError as error:
        # Nothing was said to the target, so the outcome is known.
        await trio.to_thread.run_sync(clear_fence, images)
        raise FuseDiskError(f"cannot record the cutover beside the images: {error}") from None
    try:
        with trio.fail_after(30):
            await link.send(Promote(record.token, record.epoch))
            await link.expect(Promoted)
    except (LinkLost, trio.TooSlowError, RemoteProtocolError, FuseDiskError) as error:
        source.control.set_fence(True)
        raise OutcomeUnknown(
            f"the answer to the promotion was lost ({error}); writes are refused until "
            "'replicator resolve' has settled it"
        ) from None
    fenced = FenceRecord(record.token, "fenced", record.replica, record.address, record.epoch)
    source.control.set_fence(True)
    await trio.to_thread.run_sync(record_fence, images, fenced)


async def _converge(source: Source, session: Session, options: CutoverOptions) -> None:
    """Pass after pass, until the next one should fit into half of the bound."""
    with trio.move_on_after(options.timeout_seconds) as limit:
        while True:
            begun = trio.current_time()
            await session.next_pass()
            if trio.current_time() - begun < options.downtime_seconds_max / 2:
                return
    if limit.cancelled_caught:
        raise NotConverged(
            f"the guest writes faster than the link carries within {options.timeout_seconds:g} s; "
            "the guest goes on at the source"
        )


@contextmanager
def _gate(source: Source) -> Iterator[None]:
    try:
        lease = take_lease(source.state)
    except BlockingIOError:
        raise FuseDiskError("another cutover of this mount is under way") from None
    try:
        source.control.set_gate(True)
        yield
    finally:
        source.control.set_gate(False)
        os.close(lease)


async def _run_hook(command: str) -> None:
    result = await trio.run_process(
        ["sh", "-c", command], check=False, capture_stdout=True, capture_stderr=True
    )
    if result.returncode != 0:
        raise FuseDiskError(
            f"--before {shlex.quote(command)} ended with status {result.returncode}; "
            "the guest goes on at the source"
        )


async def resolve(link: Link, record: FenceRecord, source_id: str) -> str:
    """Ask the target how a cutover ended: ``promoted``, or ``rolled-back``.

    A target that had not promoted has by its answer refused ever to do so under this token.
    Raises LinkLost, Refused or RemoteProtocolError; then the outcome is as unknown as before.
    """
    with trio.fail_after(30):
        await link.send(Hello([1], "resolve", 0))
        await link.expect(Welcome)
        await link.send(Resolve(record.replica, source_id, record.token))
        while True:
            event = await link.receive()
            if isinstance(event, Promoted):
                return "promoted"
            if isinstance(event, Aborted):
                return "rolled-back"
            if isinstance(event, Failed):
                raise_failed(event)
            if isinstance(event, Bye):
                raise LinkLost("the receiver is shutting down")


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
