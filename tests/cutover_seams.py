"""One cutover of the real code, and the resolve after it, with a fault at a seam of one's choice.

A seam (tests/seams.py) is where something is about to be done to the world, or was heard from it.
The world is that of tests/simulated_world.py, where the same run has the same seams. So they are
counted in a run without faults, and each fault can be tried at each of them. A power loss drops
what was not synced: all of it, or contents alone while the names are there.

What is not looked at here: other files of the source's state (tests/simulated_mount.py), and a
guest in the hands of QEMU (tests/test_live_move.py).
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import trio
from seams import Records, seamed
from session_checks import REPLICA, Wrong, check_one_side, promoted
from simulated_mount import Fenced
from simulated_process import Process, run
from simulated_world import World

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from fusedisk.gateword import keep_closed, let_go_if_due
from replicator.address import UnixAddress
from replicator.cutover import CutoverOptions
from replicator.following import Follower
from replicator.handover import outcome_of
from replicator.settings import SenderSettings
from replicator.source import Source

T = TypeVar("T")
SEED = 3
_SETTLED_SECONDS_MAX = 600.0
_OUTAGE_SECONDS = 100.0
_GUEST_SEAMS = 5
"""The guest writes at every so many of them."""


class Dropped(random.Random):
    """In place of chance: of what was not synced nothing is left."""

    names = False
    """Whether creations, renames and removals are left nevertheless."""

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        return seq[0]

    def randint(self, a: int, b: int) -> int:
        return b if self.names else a


class NamesLeft(Dropped):
    names = True


class Whole(random.Random):
    """In place of chance: what arrives is received in one piece."""

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        return seq[-1]


class SeamedCutover(World):
    """A run with the faults of ``plan``, each at the seam of that number; ``seams`` are all."""

    def __init__(self, scratch: Path, plan: Mapping[int, str]) -> None:
        super().__init__(scratch, SEED)
        self._plan = plan
        self.seams: list[str] = []
        self._counting = False
        self.struck: list[str] = []
        self._records = Records(scratch / "source")
        self._guest = random.Random(SEED)
        self._held: tuple[int, int, bytes] | None = None
        self._acknowledged: list[bytes] = []
        self.outcome = "none"
        self._nursery: trio.Nursery

    def run(self) -> None:
        """Raises Wrong, with the trace."""
        try:
            with self.in_little_pieces(), seamed(self._seam, self._records, self.mount):
                run(SEED, self._main)
        except BaseException as error:
            wrong: BaseException = error
            while isinstance(wrong, BaseExceptionGroup):
                wrong = wrong.exceptions[0]
            at = {number: self.seams[number - 1 : number] for number in self._plan}
            said = [f"{self._plan}, at {at}: {wrong!r}", *self.trace[-40:], *self.seams[-40:]]
            raise Wrong("\n".join(said)) from error

    # Seams.

    def _seam(self, what: str) -> None:
        """Before an operation of a process. Raises Killed where it is dead."""
        process = Process.current()
        process.check()
        if not self._counting:
            return
        self.seams.append(f"{process.name}: {what}")
        self._look()
        if fault := self._plan.get(len(self.seams)):
            self.note(f"{fault} at {self.seams[-1]}")
            self.struck.append(fault)
            FAULTS[fault](self)
            self._look()
        elif len(self.seams) % _GUEST_SEAMS == 0:
            self._write()
        process.check()

    @property
    def resolved(self) -> list[str]:
        """What each `resolve` that came to an end said."""
        return [line.rpartition(" ")[2] for line in self.trace if " resolved: " in line]

    def _look(self) -> None:
        check_one_side(self.mount, self.target.root)

    # Faults.

    def kill_source(self) -> None:
        if self._sender is not None:
            self._sender.kill()

    def kill_target(self) -> None:
        self.target.kill(soon=False)

    def cut_link(self) -> None:
        for connection in self.network.connections:
            connection.drop()

    def cut_link_for_long(self) -> None:
        self.network.down = True
        for connection in self.network.connections:
            connection.silence()

        async def mend() -> None:
            await trio.sleep(_OUTAGE_SECONDS)
            self.network.down = False

        self._nursery.start_soon(mend)

    def lose_source(self, *, names: bool = False) -> None:
        for connection in self.network.connections:
            connection.silence()
        self.kill_source()
        if self.mount.mounted:
            self._records.crash(names=names)
            self.mount.lose_power()
            self._held = None
            # What was not flushed may be gone; what was promoted is flushed.
            self._acknowledged = [bytes(content) for content in self.mount.content]

    def lose_target(self, *, names: bool = False) -> None:
        self.target._rng = NamesLeft(SEED) if names else Dropped(SEED)
        self.target.lose_power(soon=False)

    def lose_both(self) -> None:
        self.lose_target()
        self.lose_source()

    def stall(self) -> None:
        """The sender stands still, until the server has let go of its gate and writes went on."""
        if self.mount.mounted and self.mount.control.gated:
            keep_closed(self.mount.control, 1e-9)
            let_go_if_due(self.mount.control)
        self._write()

    # What happens.

    async def _main(self) -> None:
        self.begin()
        self.network._rng = Whole(SEED)
        self.network.delay_seconds_max, self.threads.seconds_max = 0.002, 0.001
        self.target.threads.seconds_max, self._rpo = 0.001, 0.2
        self._acknowledged = [bytes(content) for content in self.mount.content]
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self.target.live)
            await self._as_process("sender", self._cut_over)
            await self._settle()
            self._counting = False
            if not promoted(self.target.root):
                self._write()
                await self._follow()
            self._judge()
            self._nursery.cancel_scope.cancel()

    async def _as_process(self, name: str, work: Callable[[Source], Any]) -> None:
        async def main() -> None:
            with mock.patch("replicator.source.find_state", lambda _: self.mount.state):
                source = Source(self.mount.mountpoint)
            try:
                await work(source)
            finally:
                source.close()

        self._sender = Process(name, self.threads)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sender.run, main)
        if self._sender.dead:
            # What it had open, a lease among that, may be held by its exceptions.
            gc.collect()
        self._sender = None

    def _follower(self, source: Source) -> Follower:
        settings = SenderSettings(rpo_seconds=self._rpo, silence_seconds_max=10.0)
        return Follower(source, REPLICA, UnixAddress("/sim"), self.network.connect, settings)

    async def _until_equal(self, follower: Follower) -> None:
        while not (
            follower.state == "following"
            and follower.committed is not None
            and not any(changes.count(follower.committed) for changes in self.mount.maps)
            and self.target.images() == self._acknowledged
        ):
            await trio.sleep(0.1)

    async def _cut_over(self, source: Source) -> None:
        follower = self._follower(source)

        async def ask() -> None:
            self._write()
            await self._until_equal(follower)
            self._counting = True
            options = CutoverOptions(downtime_seconds_max=5.0, timeout_seconds=20.0)
            try:
                self.outcome = (await follower.cut_over(options))["outcome"]
            except FuseDiskError as error:
                self.outcome = outcome_of(source, error)
                self.note(f"{self.outcome}: {error}")
            self.note(f"told: {self.outcome}")
            # Of what is rolled back the sender goes on; nothing more is to be learnt of it.
            await trio.sleep(1.0)
            nursery.cancel_scope.cancel()

        async def replicate() -> None:
            with contextlib.suppress(FuseDiskError):
                await follower.run()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(replicate)
            nursery.start_soon(ask)

    async def _settle(self) -> None:
        """Start what has ended, and resolve, until one side says to be the disk."""
        with trio.move_on_after(_SETTLED_SECONDS_MAX):
            while True:
                if not self.mount.mounted:
                    self.note(f"mounted: {self.mount.mount()}")
                # A gate whose holder is dead is found by a write.
                self._write()
                await self._as_process("resolve", self._resolve)
                record = read_fence(self.mount.paths) if self.mount.mounted else None
                if not self.mount.mounted:
                    continue
                # One that was killed between the record and the fence in memory is run again.
                if self.mount.writable if record is None else record.state == "fenced":
                    return
        raise Wrong(f"resolve does not settle it: {read_fence(self.mount.paths)}")

    async def _follow(self) -> None:
        async def follow(source: Source) -> None:
            follower = self._follower(source)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follower.run)
                await self._until_equal(follower)
                nursery.cancel_scope.cancel()

        with trio.move_on_after(_SETTLED_SECONDS_MAX) as limit:
            await self._as_process("sender", follow)
        if limit.cancelled_caught:
            raise Wrong("the source does not go on to replicate")

    def _write(self) -> None:
        """A guest that writes, or tries again what is held."""
        if not self.mount.mounted or (self.mount.control.fenced and self._held is None):
            return
        if self._held is None:
            disk = self._guest.randrange(2)
            at = 512 * self._guest.randrange(len(self.mount.content[disk]) // 512)
            self._held = disk, at, self._guest.randbytes(512)
        try:
            written = self.mount.write(*self._held)
        except Fenced:
            self._held = None
            return
        if written:
            self._held = None
            self._acknowledged = [bytes(content) for content in self.mount.content]
            self._look()

    def _judge(self) -> None:
        """One side is the disk, it is the one that was told, and it has all writes."""
        self._look()
        record, is_promoted = read_fence(self.mount.paths), promoted(self.target.root)
        if self.mount.writable == is_promoted:
            raise Wrong(f"{is_promoted=}, and the source is {self.mount.writable=}")
        if (record is not None and record.state == "fenced") != is_promoted:
            raise Wrong(f"{is_promoted=}, and on record is {record}")
        if self.outcome not in ("none", "unknown") and is_promoted != (self.outcome == "promoted"):
            raise Wrong(f"{is_promoted=}, and told was {self.outcome}")
        if self.target.images() != self._acknowledged:
            raise Wrong("the replica is not what the guest was told to have written")


FAULTS: dict[str, Callable[[SeamedCutover], None]] = {
    "source killed": SeamedCutover.kill_source,
    "target killed": SeamedCutover.kill_target,
    "link cut": SeamedCutover.cut_link,
    "link cut for long": SeamedCutover.cut_link_for_long,
    "source without power": SeamedCutover.lose_source,
    "source without power, names left": lambda world: world.lose_source(names=True),
    "target without power": SeamedCutover.lose_target,
    "target without power, names left": lambda world: world.lose_target(names=True),
    "both without power": SeamedCutover.lose_both,
    "source stands still": SeamedCutover.stall,
}
