"""Processes that share one event loop and one virtual clock, and can be killed at any step.

A process is a nursery whose tasks find it in a context variable. Whatever it does to the world goes
through a seam: threads (`run_sync` here), streams and connections (tests/simulated_network.py),
files of the store (tests/simulated_disk.py). Once killed it gets no further than the next seam.
"""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import trio
from simulated_disk import Killed
from trio.testing import MockClock

_current: ContextVar[Process | None] = ContextVar("process", default=None)


class Process:
    """One process; ``threads`` says how long the work of a thread takes."""

    def __init__(self, name: str, threads: Threads) -> None:
        self.name, self.threads = name, threads
        self.dead = False
        self.scope = trio.CancelScope()
        self.seams_left: int | None = None
        self.at_kill: list[Callable[[], None]] = []

    @staticmethod
    def current() -> Process:
        process = _current.get()
        assert process is not None, "not in a process"
        return process

    def check(self) -> None:
        """At each seam. Raises Killed in a process that is dead, or dies here."""
        if self.seams_left is not None and not self.dead:
            self.seams_left -= 1
            if self.seams_left < 0:
                self.kill()
        if self.dead:
            raise Killed

    def kill(self) -> None:
        """End it at the seam that its tasks are at."""
        self.dead = True
        for end in self.at_kill:
            end()
        self.scope.cancel()

    def start(self, nursery: trio.Nursery, work: Callable[..., Awaitable[None]], *a: Any) -> None:
        """Start a task of this process, whoever asks for it."""

        async def task() -> None:
            _current.set(self)
            await work(*a)

        nursery.start_soon(task)

    async def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run the process to its end; the errors of a killed one are nobody's."""
        _current.set(self)
        try:
            with self.scope:
                await main()
        except BaseException:
            if not self.dead:
                raise


class Threads:
    """What `trio.to_thread.run_sync` is here: at one moment of the virtual clock, delays around."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.seconds_max = 0.0
        self._working = trio.Event()
        self._working.set()

    def hang(self) -> None:
        """From now on no work ends, as over a disk that does not answer."""
        if self._working.is_set():
            self._working = trio.Event()

    def go_on(self) -> None:
        self._working.set()

    async def pause(self) -> None:
        await self._working.wait()
        if self.seconds_max:
            await trio.sleep(self._rng.random() * self.seconds_max)


async def run_sync(
    work: Callable[..., Any], *arguments: Any, abandon_on_cancel: bool = False
) -> Any:
    """In place of `trio.to_thread.run_sync`: not to be cancelled once begun, as if none hung."""
    await trio.lowlevel.checkpoint()
    process = Process.current()
    if process.dead and getattr(work, "__name__", "") == "close":
        # The kernel closes the files of the dead; those of the store change nothing any more.
        with contextlib.suppress(Killed):
            work(*arguments)
    process.check()
    with trio.CancelScope(shield=True):
        await process.threads.pause()
        process.check()
        try:
            result = work(*arguments)
        except Killed:
            # By the operation it was at; all of the process dies, whoever catches this.
            process.kill()
            raise
        await process.threads.pause()
        process.check()
    return result


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """The same scheduling, clock and random numbers for the same seed."""
    chance = random.Random(seed)

    def token(count: int = 32) -> str:
        return chance.randbytes(count).hex()

    with contextlib.ExitStack() as stack:
        for target, stand_in in {
            "trio.to_thread.run_sync": run_sync,
            "trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING": True,
            "trio._core._run._r": random.Random(seed),
            "time.time": lambda: 1e9 + trio.current_time(),
            "secrets.randbits": chance.getrandbits,
            "secrets.token_hex": token,
            "uuid.uuid4": lambda: uuid.UUID(int=chance.getrandbits(128), version=4),
            "random.SystemRandom": lambda: chance,
        }.items():
            stack.enter_context(mock.patch(target, stand_in))
        yield


def run(seed: int, main: Callable[[], Awaitable[None]]) -> None:
    """Run to the end under the virtual clock."""
    with deterministic(seed):
        trio.run(main, clock=MockClock(autojump_threshold=0))
