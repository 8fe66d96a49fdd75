"""Cutovers in this process, where a step fails: what is told is what is true."""

import errno
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import fusedisk
from test_promotion import replicator
from test_read_errors import BAD, BadSource, until
from test_replication import CHUNK, Pair, guest_write, pair

from fusedisk.changemap import Control
from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, read_fence, record_fence
from fusedisk.gate import take_lease
from replicator import cutover, gating, handover, resolving
from replicator.address import parse_address
from replicator.captured import CapturedSource
from replicator.cutover import CutoverOptions
from replicator.estimate import Estimate
from replicator.following import Follower
from replicator.guest import Guest
from replicator.handover import NotConverged, OutcomeUnknown
from replicator.proof import Differs, Proof
from replicator.reporting import report
from replicator.sender import Session
from replicator.senderlock import lock_replica
from replicator.settings import SenderSettings
from replicator.source import Source
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings

__all__ = ["pair"]

Outcome = dict[str, Any] | FuseDiskError


class MendableSource(BadSource):
    """Bad from the begin of the cutover on."""

    bad = False
    """Ends as true where nothing met the block."""


class Cutting:
    """A pair whose sender is this process: `outcome` is what a cutover came to."""

    def __init__(self, pair: Pair, source: type[Source] = Source) -> None:
        pair.receive()
        self.pair = pair
        self.source = source(pair.mount.mountpoint)
        self.follower: Follower
        self._begun = False

    @property
    def record(self) -> FenceRecord | None:
        return read_fence(self.pair.images)

    @property
    def promoted(self) -> bool:
        return '"promoted"' in replicator("list", "--json", self.pair.store).stdout

    def cut(self, during: Callable[[], Awaitable[None]] | None = None, **options: Any) -> Outcome:
        """Cut over once the replica follows, while ``during`` runs beside it."""
        options = {"downtime_seconds_max": 30, **options}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cutover, "require_settled", self._begin)
            return trio.run(self._cut, during, CutoverOptions(**options))

    def _begin(self, source: Source) -> None:
        """Once the cutover has begun, so that its own first pass sends it, write something."""
        handover.require_settled(source)
        if not self._begun:
            self._begun = True
            guest_write(self.pair.mount.disk(0), b"changed", BAD)
            if isinstance(source, BadSource):
                source.bad = True

    async def _cut(
        self, during: Callable[[], Awaitable[None]] | None, options: CutoverOptions
    ) -> Outcome:
        address = parse_address(self.pair.address)
        connect = functools.partial(connected, address, Settings())
        # No pass comes but those of the cutover.
        self.follower = Follower(
            self.source, "r", address, connect, SenderSettings(rpo_seconds=3600)
        )
        told: Outcome

        async def run() -> None:
            with suppress(FuseDiskError):
                await self.follower.run()

        lock = lock_replica(self.source.state, "r")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await until(lambda: self.follower.state == "following")
                if during is not None:
                    nursery.start_soon(during)
                try:
                    told = await self.follower.cut_over(options)
                except FuseDiskError as error:
                    told = error
                nursery.cancel_scope.cancel()
        finally:
            os.close(lock)
            self.source.close()
        return told

    def source_writable(self) -> bool:
        try:
            guest_write(self.pair.mount.disk(0), b"is it the disk?", 0)
        except OSError:
            return False
        return True


def test_a_cutover_that_waits_for_a_bad_block_tells_its_end(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting = Cutting(pair, MendableSource)
    read = CapturedSource.read

    def read_captured(captured: CapturedSource, disk: int, buffer: memoryview, offset: int) -> None:
        # What was captured is read past the source, from the same bad block.
        cutting.source.read(disk, buffer, offset)
        read(captured, disk, buffer, offset)

    monkeypatch.setattr(CapturedSource, "read", read_captured)

    async def mend() -> None:
        await until(lambda: "cannot read" in (cutting.follower.error or ""))
        # Longer than --timeout, which bounds the wait for the begin.
        await trio.sleep(2.5)
        assert (await report(cutting.follower))["cutover"]["phase"] == "verifying"
        assert isinstance(cutting.source, MendableSource)
        cutting.source.bad = False

    told = cutting.cut(mend, timeout_seconds=2, verify="full")
    assert isinstance(told, dict) and told["outcome"] == "promoted", told
    assert isinstance(cutting.source, MendableSource) and not cutting.source.bad
    assert cutting.promoted


def failing(
    do: Callable[..., None], state: str = "", *, after: bool = False
) -> Callable[..., None]:
    """``do``, which fails, where ``state`` is recorded; ``after`` it was done."""

    def fail(images: list[Path], record: FenceRecord | None = None) -> None:
        if after or not state or (record is not None and record.state != state):
            do(images, record) if record is not None else do(images)
        if not state or (record is not None and record.state == state):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fail


def test_a_record_that_cannot_be_taken_back_is_an_unknown_outcome(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(images: list[Path]) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    record = failing(record_fence, "committing", after=True)
    monkeypatch.setattr(handover, "record_fence", record)
    monkeypatch.setattr(handover, "clear_fence", fail)
    cutting = Cutting(pair)
    paused = tmp_path / "paused"
    told = cutting.cut(before=f"touch {paused}", on_rollback=f"rm {paused}")
    assert isinstance(told, OutcomeUnknown) and "resolve" in str(told), told
    assert cutting.record is not None and cutting.record.state == "committing"
    assert paused.exists() and not cutting.promoted
    assert not cutting.source_writable()
    assert replicator("resolve", pair.mount.mountpoint).stdout == "rolled-back\n"
    assert cutting.source_writable()


def test_a_hook_lets_no_guest_go_on_beside_a_record(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def fail(source: Source, link: object, record: FenceRecord, *_: object) -> None:
        record_fence(pair.images, record)
        raise FuseDiskError("something else")

    monkeypatch.setattr(cutover, "hand_over", fail)
    paused = tmp_path / "paused"
    told = Cutting(pair).cut(before=f"touch {paused}", on_rollback=f"rm {paused}")
    assert isinstance(told, FuseDiskError) and paused.exists()


def test_a_promotion_that_cannot_be_recorded_is_told(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(handover, "record_fence", failing(record_fence, "fenced"))
    cutting = Cutting(pair)
    told = cutting.cut(after=f"touch {tmp_path / 'after'}")
    assert isinstance(told, dict), told
    assert told["outcome"] == "promoted" and told["exit_code"] == 1
    assert "resolve" in told["error"] and "\n" not in told["error"]
    assert (tmp_path / "after").exists() and not cutting.source_writable()
    assert cutting.record is not None and cutting.record.state == "committing"
    assert replicator("resolve", pair.mount.mountpoint).stdout == "promoted\n"
    assert cutting.record.state == "fenced"


def test_a_mount_that_took_the_place_of_ours_stays_the_disk(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(images: list[Path], what: FenceRecord) -> None:
        # After all that looks for the mount, and before the record is there to be found.
        assert fusedisk("unmount", pair.mount.mountpoint).returncode == 0
        pair.mount.mount()
        record_fence(images, what)

    monkeypatch.setattr(handover, "record_fence", record)
    cutting = Cutting(pair)
    told = cutting.cut()
    assert isinstance(told, FuseDiskError) and "unmounted during" in str(told), told
    assert cutting.record is None and not cutting.promoted
    assert cutting.source_writable()


def test_a_mount_that_missed_a_promotion_is_found_by_resolve(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked for a record before that was there, and is not the mount that was fenced."""
    pair.receive()
    pair.once()
    assert replicator("promote", pair.store / "r").returncode == 0

    def record(images: list[Path], what: FenceRecord) -> None:
        assert fusedisk("unmount", pair.mount.mountpoint).returncode == 0
        pair.mount.mount()
        record_fence(images, what)

    def resolve() -> None:
        resolving.resolve_at_source(pair.mount.mountpoint, None, None, Settings(), None)

    monkeypatch.setattr(handover, "record_fence", record)
    with pytest.raises(FuseDiskError, match="run this once more"):
        resolve()
    resolve()
    with pytest.raises(OSError):
        guest_write(pair.mount.disk(0), b"is it the disk?", 0)


class Tampering(Guest):
    """A guest during whose pause something happens."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    async def pause(self, meanwhile: Callable[[], Awaitable[None]], downtime: float) -> None:
        await trio.to_thread.run_sync(self._do)


def while_pausing(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    @asynccontextmanager
    async def held(*_: object) -> AsyncIterator[Guest]:
        yield Tampering(do)

    monkeypatch.setattr(cutover, "held_guest", held)


def test_another_cutover_that_came_first_stays_on_record(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FenceRecord("t", "fenced", "other", "unix:///there", 1)
    while_pausing(monkeypatch, lambda: record_fence(pair.images, other))
    cutting = Cutting(pair)
    told = cutting.cut()
    assert isinstance(told, FuseDiskError) and "is the disk already" in str(told), told
    assert cutting.record is not None and cutting.record.replica == "other"
    assert not cutting.promoted


def test_the_lease_is_given_back_where_the_gate_does_not_open(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(control: Control, images: object) -> None:
        control.set_gate(False)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def refuse(*_: object) -> None:
        raise FuseDiskError("refused")

    monkeypatch.setattr(gating, "open_gate", fail)
    monkeypatch.setattr(cutover, "hand_over", refuse)
    assert isinstance(Cutting(pair).cut(), FuseDiskError)
    os.close(take_lease(pair.mount.state))


def test_what_is_written_while_the_memory_moves_has_to_fit(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(estimate: Estimate, count: int) -> float | None:
        return None if estimate.send_rate is None else 4.0 * count / CHUNK

    seen: list[dict[str, Any]] = []

    def write() -> None:
        seen.append(trio.from_thread.run(report, cutting.follower)["cutover"])
        guest_write(pair.mount.disk(0), os.urandom(10 * CHUNK), 0)
        seen.append(trio.from_thread.run(report, cutting.follower)["cutover"])

    monkeypatch.setattr(Estimate, "seconds", seconds)
    while_pausing(monkeypatch, write)
    cutting = Cutting(pair)
    told = cutting.cut(qmp="/nowhere", migrate_to="unix:/nowhere")
    assert isinstance(told, NotConverged) and "once the memory has moved" in str(told), told
    assert cutting.record is None and not cutting.promoted
    before, after = seen
    assert before["phase"] == after["phase"] == "memory"
    assert before["max_downtime_ms"] == after["max_downtime_ms"] == 30_000
    assert before["send_rate"] > 0 and before["dirty_rate"] == 0
    assert (before["remaining_bytes"], before["estimate_ms"]) == (0, 0)
    assert (after["remaining_bytes"], after["estimate_ms"]) == (10 * CHUNK, 40_000)


def test_the_first_pass_of_a_cutover_is_compared_too(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, passes = Proof.changed, []

    async def changed(proof: Proof, session: Session) -> None:
        if not passes:
            # A hash waits until the pass is in the images.
            await session.hashes(0, 0, CHUNK)
            with pair.replica(0).open("r+b") as replica:
                replica.seek(BAD)
                replica.write(b"damaged")
        passes.append(session.committed)
        await compare(proof, session)

    monkeypatch.setattr(Proof, "changed", changed)
    cutting = Cutting(pair)
    told = cutting.cut()
    assert isinstance(told, Differs) and f"disk0.img {BAD}" in str(told), told
    assert not cutting.promoted


def test_the_guest_of_a_settled_cutover_goes_on_under_the_lease(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a cutover could end between the answer and the guest, who would then run twice."""
    concluded = []

    async def conclude(path: Path, images: list[Path]) -> None:
        with pytest.raises(BlockingIOError):
            take_lease(pair.mount.state)
        concluded.append((path, images))

    monkeypatch.setattr(resolving, "conclude", conclude)
    resolving.resolve_at_source(pair.mount.mountpoint, None, None, Settings(), tmp_path / "qmp")
    assert concluded == [(tmp_path / "qmp", pair.images)]
