"""A receiver that is busy for long, and a link that is slow, are no silent peers."""

import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from simulated_process import run
from test_stalling import Hanging

from fusedisk.replicas import Sent
from replicator import messages as m
from replicator import receiver
from replicator.link import Link, LinkLost
from replicator.replica import Replica
from replicator.senderlink import Pace, SenderLink
from replicator.stalling import STALLED_SECONDS
from replicator.transport.processes import running
from replicator.transport.tls import TlsStream
from replicator.transport.unsent import unsent_bytes

MIB = 1 << 20


class Busy(Hanging):
    """Its target is busy with one step for much longer than the link's timeout."""

    link_timeout_seconds = 5.0

    def busy_from(self, patch: pytest.MonkeyPatch, where: object, step: str) -> trio.Event:
        """The next time that the target does a step, it hangs in it."""
        real, begun = getattr(where, step), trio.Event()

        def slow(*arguments: object, **named: object) -> object:
            if not begun.is_set():
                begun.set()
                self.target.threads.hang()
            return real(*arguments, **named)

        patch.setattr(where, step, slow)
        return begun


@pytest.mark.parametrize(
    ("where", "step"),
    [(receiver, "_open"), (receiver, "_store"), (receiver, "_commit"), (Replica, "begin")],
)
def test_a_long_step_of_the_receiver_is_no_silence(
    tmp_path: Path, where: object, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Busy(tmp_path, 3)

    async def story() -> None:
        begun = world.busy_from(monkeypatch, where, step)
        if step == "_open":
            world.network.connections[-1].drop()
        await world.until(begun.is_set)
        connections = len(world.network.connections)
        # More than any answer is waited for.
        await trio.sleep(100)
        world.target.threads.go_on()
        assert world.follower is not None
        commits = world.follower.commits
        await world.until(lambda: world.follower and world.follower.commits > commits)
        assert len(world.network.connections) == connections

    run(3, lambda: world.play(story))


class Ends:
    """Both ends of a link in the middle of a pass."""

    def __init__(self, ours: trio.abc.Stream, theirs: trio.abc.Stream, pace: Pace) -> None:
        self.sender = SenderLink(ours, pace, Sent(), 5.0)
        self.receiver = Link(theirs, "receiver")

    async def begin(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.sender.listen)
        await self.sender.send(m.Hello([1], "replicate", 0))
        await self.receiver.expect(m.Hello)
        await self.receiver.send(m.Welcome(1))
        await self.sender.expect(m.Welcome)
        await self.sender.send(m.Open("r", "s", "i", "g", 1, [m.DiskInfo("d", 1 << 30, 65536)]))
        await self.receiver.expect(m.Open)
        await self.receiver.send(m.Opened("new", None, None, None))
        await self.sender.expect(m.Opened)
        await self.sender.send(m.Begin(1, "fill"))
        await self.receiver.expect(m.Begin)


BATCH = [m.Data.of(0, at, bytes(MIB)) for at in range(0, 4 * MIB, MIB)]


@pytest.mark.trio
async def test_a_receiver_that_takes_nothing_but_says_that_it_lives_is_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.socket.socketpair()
    ends = Ends(trio.SocketStream(ours), trio.SocketStream(theirs), Pace(None))
    taken = trio.Event()
    # None of them is large enough for a thread, which knows nothing of a clock that jumps.
    parts = [m.Data.of(0, at, bytes(MIB // 4)) for at in range(0, 4 * MIB, MIB // 4)]

    async def take_all() -> None:
        for _ in range(100):
            await trio.sleep(1)
            await ends.receiver.send(m.Pong(m.SIGN_OF_LIFE))
        for _ in parts:
            await ends.receiver.expect(m.Data)
        taken.set()

    async with trio.open_nursery() as nursery:
        await ends.begin(nursery)
        nursery.start_soon(take_all)
        for part in parts:
            await ends.sender.send(part)
        # One task at a time receives.
        await taken.wait()
        # Nobody waited for an answer; what comes now is read all the same.
        await ends.receiver.send(m.Ping(7))
        assert (await ends.receiver.receive()) == m.Pong(7)
        await ends.receiver.send(m.Failed("io", "enough"))
        with pytest.raises(LinkLost, match="enough"):
            await ends.sender.expect(m.Committed)
        nursery.cancel_scope.cancel()


class SlowStream(trio.abc.Stream):
    """Takes all at once, and brings so many bytes a second to the other end."""

    def __init__(self, below: trio.abc.Stream, rate: float) -> None:
        self._below, self._rate = below, rate
        self._empty_at = trio.current_time()

    def unsent_bytes(self) -> int:
        return int(max(0.0, self._empty_at - trio.current_time()) * self._rate)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._empty_at = max(self._empty_at, trio.current_time()) + len(data) / self._rate
        await self._below.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._below.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._below.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._below.aclose()


@pytest.mark.trio
@pytest.mark.parametrize(("bandwidth", "rate"), [(256 << 10, 1e12), (None, float(256 << 10))])
async def test_a_slow_link_does_not_hang(
    bandwidth: int | None, rate: float, autojump_clock: trio.testing.MockClock
) -> None:
    """With a question behind much data, over a link that is slow by itself or by choice."""
    ours, theirs = trio.testing.memory_stream_pair()
    ends = Ends(SlowStream(ours, rate), theirs, Pace(bandwidth))
    async with trio.open_nursery() as nursery:
        await ends.begin(nursery)
        begun = trio.current_time()
        nursery.start_soon(ends.sender.send, *BATCH)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ends.sender.send, m.Ping(7))
        await trio.testing.wait_all_tasks_blocked()
        assert ends.sender.answers.outstanding == (bandwidth is None)
        said_at = None
        while said_at is None:
            await trio.sleep(1)
            if ends.sender.answers.trouble():
                said_at = trio.current_time() - begun
        # 4 MiB take 16 s; only then can there be an answer, and there is none.
        assert 16 + STALLED_SECONDS - 1 <= said_at <= 16 + STALLED_SECONDS + 2
        nursery.cancel_scope.cancel()


async def holds_until_taken(
    stream: trio.abc.Stream, below: trio.abc.SendStream, take: Callable[[], Awaitable[object]]
) -> None:
    assert unsent_bytes(stream) == 0
    await below.send_all(bytes(1000))
    assert unsent_bytes(stream) >= 1000
    await take()
    with trio.fail_after(10):
        while unsent_bytes(stream):
            await trio.sleep(0.01)
    await trio.aclose_forcefully(stream)
    # Somebody may still watch it.
    assert unsent_bytes(stream) == 0


@pytest.mark.trio
@pytest.mark.parametrize("secure", [False, True])
async def test_what_a_socket_holds_is_known(secure: bool) -> None:
    ours, theirs = (trio.SocketStream(one) for one in trio.socket.socketpair())
    stream: trio.abc.Stream = ours
    if secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        stream = TlsStream(trio.SSLStream(ours, context, server_hostname="there"), "tls://there")
    await holds_until_taken(stream, ours, lambda: theirs.receive_some(1 << 16))
    await theirs.aclose()


@pytest.mark.trio
async def test_what_a_pipe_holds_is_known() -> None:
    to_read, to_write = os.pipe()
    reading, writing = trio.lowlevel.FdStream(to_read), trio.lowlevel.FdStream(to_write)
    stapled = trio.StapledStream(writing, trio.lowlevel.FdStream(os.open(os.devnull, os.O_RDONLY)))
    await holds_until_taken(stapled, stapled, lambda: reading.receive_some(1 << 16))
    await reading.aclose()


@pytest.mark.trio
async def test_what_a_command_has_not_read_is_known(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    command = ["sh", "-c", f"read x < {tmp_path}/go; exec cat > /dev/null"]

    async def go() -> None:
        await trio.to_thread.run_sync((tmp_path / "go").write_text, "\n")

    async with running(command, "test", lambda *_: OSError("ended"), own_session=True) as stream:
        await holds_until_taken(stream, stream, go)
