"""A link that is slow, and that breaks: a TCP proxy between a sender and its receiver.

The faults, and what the two ends see of each:

delay       every byte arrives ``delay_seconds`` later
rate        each direction carries ``rate`` bytes a second
drop        all connections end, wherever in a frame they are
cut_after   the same, once a given number of bytes has gone to the receiver
silence     bytes stop, nothing is closed; `heal` lets them arrive late, as a real network does
down        nobody can connect, and all connections are dropped
"""

import contextlib
import threading
from collections.abc import Iterator

import trio

from replicator.address import TcpAddress, UnixAddress, parse_address

_PIECE_BYTES = 1 << 16
# What waits in the network at most in one direction; more would hide from a sender how slow it is.
_QUEUED_PIECES_MAX = 2
# On top of it a delay keeps this much on its way, so that it does not limit the rate by itself.
_DELAYED_BYTES_A_SECOND = 512 << 20


class Proxy:
    """Forwards to ``target``; use as a context manager. Callable from any thread but its own."""

    def __init__(
        self, target: str, *, delay_seconds: float = 0.0, rate: float | None = None
    ) -> None:
        self._target = parse_address(target)
        self._delay_seconds, self.rate = delay_seconds, rate
        self._pieces = _QUEUED_PIECES_MAX + int(
            delay_seconds * _DELAYED_BYTES_A_SECOND / _PIECE_BYTES
        )
        self.address = ""
        self.carried = 0
        """Bytes that went to the receiver."""
        self._refusing = False
        self._budget: int | None = None
        self._scopes: set[trio.CancelScope] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._scope.cancel)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def drop(self) -> None:
        """End every connection now."""
        self._run(self._drop)

    def cut_after(self, count: int) -> None:
        """End every connection once ``count`` more bytes have gone to the receiver."""

        def note() -> None:
            self._budget = count

        self._run(note)

    def silence(self) -> None:
        """Forward nothing more and close nothing, on this and any new connection."""

        def hush() -> None:
            self._forwarding = trio.Event()

        self._run(hush)

    def down(self) -> None:
        """Drop everything and let nobody in."""

        def shut() -> None:
            self._refusing = True
            self._drop()

        self._run(shut)

    def heal(self) -> None:
        """Carry again what `silence` held back, and let connections in."""

        def mend() -> None:
            self._refusing, self._budget = False, None
            self._forwarding.set()

        self._run(mend)

    def _run(self, call: object) -> None:
        trio.from_thread.run_sync(call, trio_token=self._token)  # type: ignore[arg-type]

    def _drop(self) -> None:
        self._budget = None
        for scope in self._scopes:
            scope.cancel()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._forwarding = trio.Event()
        self._forwarding.set()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.address = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.CancelScope() as self._scope:
            self._ready.set()
            await trio.serve_listeners(self._forward, [listener])

    async def _connect(self) -> trio.SocketStream:
        match self._target:
            case UnixAddress(path):
                return await trio.open_unix_socket(path)
            case TcpAddress(host, port):
                return await trio.open_tcp_stream(host, port)
        raise ValueError(f"{self._target} is neither tcp nor unix")

    async def _forward(self, client: trio.SocketStream) -> None:
        async with contextlib.AsyncExitStack() as streams:
            streams.push_async_callback(trio.aclose_forcefully, client)
            if self._refusing:
                return
            try:
                server = await self._connect()
            except OSError:
                return
            streams.push_async_callback(trio.aclose_forcefully, server)
            with self._connection() as scope:
                async with trio.open_nursery() as nursery:
                    for source, sink in ((client, server), (server, client)):
                        send, receive = trio.open_memory_channel[tuple[float, bytes]](self._pieces)
                        nursery.start_soon(self._take, source, send)
                        nursery.start_soon(self._give, receive, sink, sink is server, scope)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    async def _take(
        self, source: trio.SocketStream, queue: trio.MemorySendChannel[tuple[float, bytes]]
    ) -> None:
        async with queue:
            while True:
                await self._forwarding.wait()
                try:
                    piece = await source.receive_some(_PIECE_BYTES)
                except trio.BrokenResourceError:
                    return
                if not piece:
                    return
                await queue.send((trio.current_time() + self._delay_seconds, piece))

    async def _give(
        self,
        queue: trio.MemoryReceiveChannel[tuple[float, bytes]],
        sink: trio.SocketStream,
        upstream: bool,
        scope: trio.CancelScope,
    ) -> None:
        async for due, piece in queue:
            await trio.sleep_until(due)
            if self.rate:
                await trio.sleep(len(piece) / self.rate)
            await self._forwarding.wait()
            last = False
            if upstream and self._budget is not None:
                last = self._budget <= len(piece)
                piece = piece[: self._budget]
                self._budget -= len(piece)
            try:
                await sink.send_all(piece)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break
            if upstream:
                self.carried += len(piece)
            if last:
                self._drop()
        # A half-closed connection has no use here: the end of one direction ends both.
        scope.cancel()
