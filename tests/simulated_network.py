"""Connections with a delay that end at any byte, with or without either side learning of it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from simulated_process import Process

_PIECES_BYTES_MAX = 64 << 10


class _Pipe:
    """One direction: bytes arrive in order, each after the delay."""

    def __init__(self, rng: random.Random, delay: float, broken: Callable[[], None]) -> None:
        self._rng, self._delay, self._broken = rng, delay, broken
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._waiting = 0
        self._changed = trio.Event()
        self.silent = self.ended = self.reset = False
        self.budget: int | None = None

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def put(self, data: bytes) -> None:
        while data:
            # A peer that takes nothing makes the sender wait, also where nothing gets through.
            while self._waiting >= _PIECES_BYTES_MAX and not (self.reset or self.ended):
                await self._changed.wait()
            if self.reset or self.ended:
                raise trio.BrokenResourceError("reset by peer")
            piece = data[: _PIECES_BYTES_MAX - self._waiting]
            data = data[len(piece) :]
            if self.budget is not None:
                self.budget -= len(piece)
                if self.budget <= 0:
                    last = len(piece) + self.budget
                    before, piece = piece[:last], piece[last:]
                    self.budget = None
                    self._add(before)
                    self._broken()
            self._add(piece)

    def _add(self, piece: bytes) -> None:
        self._waiting += len(piece)
        if not self.silent:
            self._pieces.append((trio.current_time() + self._delay, piece))
        self.wake()

    async def take(self, most: int) -> bytes:
        while True:
            if self.reset:
                raise trio.BrokenResourceError("reset by peer")
            if self._pieces and not self.silent:
                due, piece = self._pieces[0]
                if due > trio.current_time():
                    with trio.move_on_at(due):
                        await self._changed.wait()
                    continue
                count = min(most, len(piece), self._rng.choice((1, 7, 4096, 1 << 20)))
                if count == len(piece):
                    self._pieces.popleft()
                else:
                    self._pieces[0] = due, piece[count:]
                self._waiting -= count
                self.wake()
                return piece[:count]
            if self.ended and not self.silent:
                return b""
            await self._changed.wait()


class SimulatedStream(trio.abc.HalfCloseableStream):
    """One end of a connection, of the process that made or took it."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._closed = False

    def belongs_to(self, process: Process) -> None:
        process.at_kill.append(self._end)
        self._process = process

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        await self._outgoing.put(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        self._outgoing.ended = True
        self._outgoing.wake()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        self._check()
        data = await self._incoming.take(max_bytes or 1 << 16)
        self._check()
        return data

    async def aclose(self) -> None:
        self._end()
        await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        # What is on its way still arrives; what comes for us is answered by a reset.
        self._closed = self._outgoing.ended = self._incoming.reset = True
        self._outgoing.wake()
        self._incoming.wake()

    def _check(self) -> None:
        self._process.check()
        if self._closed:
            raise trio.ClosedResourceError


class Connection:
    """Both directions, and the ways in which they end."""

    def __init__(self, rng: random.Random, delay: float) -> None:
        self._rng = rng
        self.up = _Pipe(rng, delay, self._cut)
        self.down = _Pipe(rng, delay, self._cut)
        self.client = SimulatedStream(self.down, self.up)
        self.server = SimulatedStream(self.up, self.down)
        self._how: Callable[[], None] = self.drop

    def _cut(self) -> None:
        self._how()

    def cut_after(self, count: int, how: Callable[[], None], *, upwards: bool) -> None:
        """Do ``how`` to the connection once ``count`` more bytes were sent in one direction."""
        self._how = how
        (self.up if upwards else self.down).budget = count

    def drop(self) -> None:
        """Both ends learn of it at once; what was on its way is lost."""
        for pipe in (self.up, self.down):
            pipe.reset = True
            pipe.wake()

    def silence(self) -> None:
        """Nobody learns of it."""
        self.up.silent = self.down.silent = True

    def silence_upwards(self) -> None:
        """Answers get through, and nothing else."""
        self.up.silent = True

    def silence_downwards(self) -> None:
        """The receiver hears, and is not heard."""
        self.down.silent = True


class SimulatedNetwork:
    """Between one kind of client and one server, which may be away."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.delay_seconds_max = 0.0
        self.down = False
        self.accept: Callable[[SimulatedStream], None] | None = None
        self.connections: list[Connection] = []
        self.on_connect: Callable[[Connection], None] = lambda _: None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[trio.abc.Stream]:
        """As `replicator.transport.connecting.connected`."""
        process = Process.current()
        process.check()
        delay = self._rng.random() * self.delay_seconds_max
        await trio.sleep(delay)
        if self.down or self.accept is None:
            raise OSError("cannot reach sim: connection refused")
        connection = Connection(self._rng, delay)
        connection.client.belongs_to(process)
        self.connections.append(connection)
        self.on_connect(connection)
        self.accept(connection.server)
        try:
            yield connection.client
        finally:
            await trio.aclose_forcefully(connection.client)
