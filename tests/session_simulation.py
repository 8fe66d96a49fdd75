"""A guest, its source, a link and a target, under a virtual clock, with faults by a seed.

The sender (`Follower` with all below it) and the receiver are the real ones. The world is not:
tests/simulated_network.py is the link, tests/simulated_disk.py the target's disk,
tests/simulated_mount.py the source, tests/simulated_process.py what can be killed. After every
step of a fault, and at moments of the seed's choice, tests/session_checks.py looks.

In the end all faults are mended, and the replica has to catch up by itself; a cutover in the midst
of faults ends on one side.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable

import trio
from session_checks import Wrong, check_crash, check_one_side, promoted
from simulated_network import Connection
from simulated_process import run
from simulated_world import World

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from replicator.cutover import CutoverOptions
from replicator.handover import OutcomeUnknown
from replicator.verify import VerifyOptions

_CATCH_UP_SECONDS_MAX = 400.0


class SessionSimulation(World):
    """One run over ``seed`` in the empty directory ``scratch``."""

    checks = faults = 0

    def run(self) -> None:
        """Raises Wrong, with the trace."""
        handler = _Tracing(self)
        log = logging.getLogger("replicator")
        self._log = logging.getLogger("replicator.store")
        log.addHandler(handler)
        before, propagate = log.level, log.propagate
        log.setLevel(logging.INFO)
        log.propagate = False
        try:
            with self.in_little_pieces():
                run(self.seed, self._main)
        except BaseException as error:
            wrong = _first_wrong(error)
            if wrong is None:
                raise
            lines = [f"seed {self.seed}: {wrong!r}", *self.trace[-200:]]
            if not isinstance(wrong, Wrong):
                lines += traceback.format_exception(error)
            raise Wrong("\n".join(lines)) from error
        finally:
            log.removeHandler(handler)
            log.setLevel(before)
            log.propagate = propagate

    async def _main(self) -> None:
        self.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.target.live)
            nursery.start_soon(self._guest)
            nursery.start_soon(self._sending)
            nursery.start_soon(self._looking)
            await self._faults()
            await self._mend()
            nursery.cancel_scope.cancel()

    # Faults.

    async def _faults(self) -> None:
        rng = self._rng
        faults: list[Callable[[], Awaitable[None]]] = [
            *(self._cut_now, self._cut_soon, self._cut_soon, self._network_down),
            *(self._kill_target, self._power_target, self._kill_sender, self._remount),
            *(self._power_source, self._hang_target, self._fill_target, self._pause),
            *(self._fail_target, self._verify, self._cut_over, self._cut_over),
            *(self._meddle, self._meddle_and_cut, self._leave_target_little),
        ]
        if rng.random() < 0.3:
            # What a cut or a full target leaves is gone on with, again and again.
            faults = [self._meddle_and_cut, self._leave_target_little, self._cut_soon]
        for _ in range(rng.randint(2, 6)):
            await trio.sleep(rng.random() * rng.choice((0.3, 3.0, 8.0)))
            fault = rng.choice(faults)
            self.note(fault.__name__.strip("_").replace("_", " "))
            self.faults += 1
            await fault()
            self._look()
        if rng.random() < 0.5 and not promoted(self.target.root):
            with trio.move_on_after(60):
                while self.follower is None or self.follower.state != "following":
                    await trio.sleep(0.1)
            self.note("a cutover in the end")
            await self._cut_over()

    def _break(self, connection: Connection) -> Callable[[], None]:
        how = self._rng.choice(
            (
                *(connection.drop, connection.drop, connection.silence),
                *(connection.silence_upwards, connection.silence_downwards),
            )
        )

        def broken() -> None:
            self.note(f"the link: {how.__name__}")
            how()

        return broken

    async def _cut_now(self) -> None:
        if self.network.connections:
            self._break(self.network.connections[-1])()

    async def _cut_soon(self) -> None:
        rng = self._rng

        def cut(connection: Connection) -> None:
            count = rng.randrange(rng.choice((100, 1000, 100_000)))
            connection.cut_after(count, self._break(connection), upwards=rng.random() < 0.7)

        if self.network.connections and rng.random() < 0.5:
            cut(self.network.connections[-1])
            return

        def once(connection: Connection) -> None:
            self.network.on_connect = lambda _: None
            cut(connection)

        self.network.on_connect = once

    async def _network_down(self) -> None:
        self.network.down = True
        for connection in self.network.connections:
            connection.drop()
        await trio.sleep(self._rng.random() * self._rng.choice((2, 40)))
        self.network.down = False

    async def _kill_target(self) -> None:
        self.target.kill(soon=self._rng.random() < 0.7)

    async def _power_target(self) -> None:
        self.target.lose_power(soon=self._rng.random() < 0.7)

    async def _kill_sender(self) -> None:
        if self._sender is None:
            return
        if self._rng.random() < 0.3:
            self._sender.kill()
        else:
            self._sender.seams_left = self._rng.randrange(self._rng.choice((3, 10, 50, 150)))

    async def _remount(self) -> None:
        if not self.mount.mounted or self.mount.control.gated:
            return
        self.mount.unmount()
        await trio.sleep(self._rng.random() * 3)
        self.note(f"mounted: {self.mount.mount()}")

    async def _meddle(self) -> None:
        """The source begins a new generation, to which the replica has to be compared."""
        if not self.mount.mounted or self.mount.control.gated or self.mount.control.fenced:
            return
        self.mount.unmount()
        await trio.sleep(self._rng.random() * 3)
        self.mount.meddle()
        self.note(f"mounted: {self.mount.mount(distrust=True)}")

    async def _meddle_and_cut(self) -> None:
        await self._meddle()
        for _ in range(self._rng.randint(1, 3)):
            with trio.move_on_after(20):
                while self.follower is None or self.follower.state != "comparing":
                    await trio.sleep(0.002)
            await trio.sleep(self._rng.random() * self._rng.choice((0.03, 0.3, 3.0)))
            again = (self._cut_now, self._cut_soon, self._kill_target, self._power_target)
            fault = self._rng.choice((*again, self._kill_sender, self._leave_target_little))
            self.note(f"meanwhile {fault.__name__}")
            await fault()

    async def _power_source(self) -> None:
        if not self.mount.mounted:
            return
        silent = self._rng.random() < 0.5
        if silent:
            for connection in self.network.connections:
                connection.silence()
        if self._sender is not None:
            self._sender.kill()
        self.mount.lose_power()
        while self._sender is not None:
            await trio.sleep(0.1)
        await trio.sleep(self._rng.random() * 3)
        self.note(f"mounted: {self.mount.mount()}")

    async def _hang_target(self) -> None:
        self.target.threads.hang()
        await trio.sleep(self._rng.random() * self._rng.choice((1, 30)))
        self.target.threads.go_on()

    async def _fill_target(self) -> None:
        self.target.full = True
        await trio.sleep(self._rng.random() * 10)
        self.target.full = False

    async def _leave_target_little(self) -> None:
        """Room for a part of a pass; in the end it may have to do with it for long."""
        self.target.left = self._rng.randrange(self._rng.choice((1 << 14, 1 << 17)))
        await trio.sleep(self._rng.random() * self._rng.choice((10, 60)))
        self.target.left = None

    async def _fail_target(self) -> None:
        self.target.failing = True
        await trio.sleep(self._rng.random() * 10)
        self.target.failing = False

    async def _pause(self) -> None:
        if (follower := self.follower) is not None and follower.state != "cutover":
            with contextlib.suppress(FuseDiskError):
                follower.pause(True)
            await trio.sleep(self._rng.random() * 10)
            follower.pause(False)

    async def _verify(self) -> None:
        if self.follower is None:
            return
        with trio.move_on_after(30):
            try:
                found = await self.follower.verifier.verify(VerifyOptions())
            except FuseDiskError as error:
                self.note(f"not verified: {error}")
                return
            self.note(f"verified: {found.report()}")
            if found.differing:
                raise Wrong(f"verify found a difference: {found.report()}")

    def _gated(self) -> bool:
        return self.mount.control.gated

    def _recorded(self) -> bool:
        return self._gated() and read_fence(self.mount.paths) is not None

    async def _cut_over(self) -> None:
        """A cutover, in whose midst something may happen."""
        rng, follower = self._rng, self.follower
        if follower is None or follower.paused:
            return
        options = CutoverOptions(
            downtime_seconds_max=rng.choice((0.5, 5.0)),
            timeout_seconds=rng.choice((5.0, 30.0)),
            verify=rng.choice(("none", "last", "full")),
            dry_run=rng.random() < 0.2,
        )
        trouble = [self._cut_now, self._cut_soon, self._cut_soon, self._network_down]
        trouble += [self._kill_target, self._power_target, self._power_source]
        trouble += 4 * [self._kill_sender]

        async def ask() -> None:
            try:
                result = await follower.cut_over(options)
            except OutcomeUnknown as error:
                self.note(f"cutover: unknown: {error}")
            except FuseDiskError as error:
                self.note(f"cutover: {error}")
            else:
                self.note(f"cutover: {result['outcome']}")

        async def disturb() -> None:
            if rng.random() < 0.25:
                return
            # Once writes are held, or once the promotion is on record, or just some time.
            late = rng.choice((self._gated, self._recorded, lambda: rng.random() < 0.01))
            with trio.move_on_after(60):
                while not late():
                    await trio.sleep(0.002)
                await trio.sleep(rng.random() * rng.choice((0.0, 0.01, 0.1, 0.5)))
                fault = rng.choice(trouble)
                self.note(f"meanwhile {fault.__name__}")
                with trio.CancelScope(shield=True):
                    await fault()

        with trio.move_on_after(90):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disturb)
                await ask()
                nursery.cancel_scope.cancel()

    # Promises.

    async def _looking(self) -> None:
        while True:
            await trio.sleep(0.1 + self._rng.random() * 5)
            self._look()

    def _look(self) -> None:
        """What holds at any moment, and what would be left of the target if it lost power now."""
        check_one_side(self.mount, self.target.root)
        if not self.mount.mounted:
            return
        self.checks += 1
        tree = self.target.files.crash(self._rng)
        self._log.disabled = True
        try:
            clones = self.target.files.clones
            check_crash(self.mount, self.told, tree, self.scratch / "after", clones=clones)
        finally:
            self._log.disabled = False

    async def _mend(self) -> None:
        """Nothing is broken any more: the replica catches up, or is the disk."""
        self.note("all is mended")
        self.network.down = self.target.full = self.target.failing = False
        self.target.left = None
        self.network.on_connect = lambda _: None
        self.target.mend()
        if self._sender is not None:
            self._sender.seams_left = None
        if not self.mount.mounted:
            self.note(f"mounted: {self.mount.mount()}")
        self._guest_runs = False
        with trio.move_on_after(_CATCH_UP_SECONDS_MAX) as limit:
            while not self._settled():
                await trio.sleep(0.5)
        if limit.cancelled_caught:
            state = self.follower and (self.follower.state, self.follower.error)
            raise Wrong(f"the replica does not catch up: {state}")
        self._look()
        self.note("settled")

    def _settled(self) -> bool:
        if promoted(self.target.root):
            # Who was promoted is the disk, and the source knows or finds out.
            return not self.mount.writable
        follower = self.follower
        if not self.mount.mounted or follower is None or follower.committed is None:
            return False
        if self.mount.control.gated or self.mount.control.fenced:
            return False
        if follower.source.record.generation != self.mount.record.generation:
            # It has not seen yet that its mount is gone.
            return False
        if follower.state != "following" or any(
            changes.count(follower.committed) for changes in self.mount.maps
        ):
            return False
        found = self.target.images()
        if found is None:
            return False
        if found != [bytes(content) for content in self.mount.content]:
            raise Wrong("the replica follows, lacks nothing, and is not the same")
        return True


class _Tracing(logging.Handler):
    def __init__(self, simulation: SessionSimulation) -> None:
        super().__init__()
        self._simulation = simulation

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        self._simulation.note(f"{record.name}: {said}")
        if "not what was sent" in said:
            # No fault here puts an old store back.
            raise Wrong("roots differ, though nobody changed what was stored")


def _first_wrong(error: BaseException) -> BaseException | None:
    """What failed first: a broken promise, or any error that nobody handled."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, Exception) else None
