"""Bulk data that a thread receives and stores: in order, and ended when nobody waits for it."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing
from test_sending_threads import closed, data, ends
from test_slow_peers import BATCH, MIB, Ends
from test_socketwriter import descriptors

from replicator import link
from replicator import messages as m
from replicator.active import _PROBE_SECONDS, Active
from replicator.beating import Beat
from replicator.eventqueue import EventQueue
from replicator.link import LinkLost
from replicator.receiver import Work, _read

pytestmark = pytest.mark.trio
Transfers = Sequence[m.Data | m.Zero]


async def test_what_is_received_is_stored_in_order_before_what_follows() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        sent = [
            *(data(MIB * n, size) for n, size in enumerate((MIB, 1, 70_000, MIB, 65_536) * 3)),
            m.Zero(0, 20 * MIB, MIB),
            *(data(30 * MIB + n, 1) for n in range(600)),
        ]
        nursery.start_soon(made.sender.send, *sent, m.Ping(7))
        stored: list[tuple[int, bytes | int]] = []
        most = 0

        def store(transfers: Transfers) -> None:
            nonlocal most
            most = max(most, sum(t.held_bytes for t in transfers if isinstance(t, m.Data)))
            assert len(transfers) <= 512
            for one in transfers:
                what = bytes(one.content()) if isinstance(one, m.Data) else one.length
                stored.append((one.offset, what))

        event: m.Event | None = None
        while not isinstance(event, m.Ping):
            first = await made.receiver.receive()
            assert isinstance(first, m.Data | m.Zero)
            event = await made.receiver.take_transfers(first, store)
        assert event == m.Ping(7)
        assert stored == [
            (one.offset, bytes(one.data) if isinstance(one, m.Data) else one.length) for one in sent
        ]
        assert most <= 5 * MIB
        await closed(made, nursery)


@pytest.mark.parametrize(("limit", "value"), [("_TAKEN_MAX", 5), ("_TAKEN_BYTES_MAX", 2000)])
async def test_what_is_stored_at_a_time_is_bounded(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, limit, value)
    counts: list[int] = []
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        await made.sender.send(*(data(n, 400) for n in range(20)))
        first = await made.receiver.receive()
        assert isinstance(first, m.Data)
        await made.receiver.take_transfers(first, lambda taken: counts.append(len(taken)))
        assert counts == [5, 5, 5, 5]
        await closed(made, nursery)


async def test_half_a_frame_is_gone_on_with_by_whoever_receives_next() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        whole, half = data(0, 100_000), data(MIB, MIB)
        buffers = [b"".join(made.sender._connection.send(one)) for one in (whole, half)]
        stored: list[int] = []

        def store(transfers: Transfers) -> None:
            stored.extend(one.offset for one in transfers)

        async def send() -> None:
            await made.sender._stream.send_all(buffers[0] + buffers[1][:70_000])

        nursery.start_soon(send)
        first = await made.receiver.receive()
        assert isinstance(first, m.Data)
        assert await made.receiver.take_transfers(first, store) is None
        assert stored == [0]
        nursery.start_soon(made.sender._stream.send_all, buffers[1][70_000:])
        event = await made.receiver.receive()
        assert isinstance(event, m.Data) and bytes(event.content()) == bytes(half.data)
        await closed(made, nursery)


@pytest.mark.parametrize("how", ["closed", "damaged frame", "damaged data"])
async def test_what_ends_a_session_comes_out_of_the_thread(how: str) -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        good, bad = data(0, 1000), data(4096, 1000)
        stream = [b"".join(made.sender._connection.send(one)) for one in (good, bad)]
        frame = bytearray(stream[1])
        frame[{"closed": 0, "damaged frame": 30, "damaged data": 100}[how]] ^= how != "closed"
        await made.sender._stream.send_all(stream[0])
        first = await made.receiver.receive()
        assert isinstance(first, m.Data)

        def store(transfers: Transfers) -> None:
            for one in transfers:
                assert isinstance(one, m.Data)
                one.content()

        async def send() -> None:
            if how == "closed":
                await made.sender.close()
            else:
                await made.sender._stream.send_all(bytes(frame))

        nursery.start_soon(send)
        error = LinkLost if how == "closed" else m.RemoteProtocolError
        with pytest.raises(error, match={"damaged data": "digest"}.get(how)):
            while True:
                assert await made.receiver.take_transfers(first, store) is None
        await closed(made, nursery)


async def test_cancelled_while_it_stores_the_thread_is_waited_for() -> None:
    before = descriptors()
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        storing, go_on, done = threading.Event(), threading.Event(), threading.Event()

        def store(_: Transfers) -> None:
            storing.set()
            go_on.wait(10)
            done.set()

        async with trio.open_nursery() as taking:
            taking.start_soon(made.receiver.take_transfers, data(0, 1000), store)
            await trio.to_thread.run_sync(storing.wait)
            taking.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            go_on.set()
        assert done.is_set()
        await closed(made, nursery)
    assert descriptors() == before


async def test_while_a_thread_stores_the_receiver_says_that_it_lives() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        beat, queue, go_on = Beat(made.receiver), EventQueue(), threading.Event()

        def store(_: Transfers) -> None:
            with beat.working():
                go_on.wait(10)

        nursery.start_soon(beat.keep)
        nursery.start_soon(_read, made.receiver, queue, lambda: None, store)
        with beat.resting():
            await made.sender.send(BATCH[0])
            # Nobody else works, and nothing but this says so.
            assert await made.sender.receive() == m.Pong(m.SIGN_OF_LIFE)
        go_on.set()
        await closed(made, nursery)


class Receiving:
    """A reader with its queue; what is stored and what else is done is noted, in that order."""

    def __init__(self, made: Ends, nursery: trio.Nursery) -> None:
        self.sender, self.queue, self.order = made.sender, EventQueue(), list[object]()
        self.work = Work(made.receiver, Replica(self.order))  # type: ignore[arg-type]
        self.pongs = 0
        nursery.start_soon(_read, made.receiver, self.queue, self._pong, self.work.store)

    def _pong(self) -> None:
        self.pongs += 1

    async def pong_arrives(self) -> None:
        """What was sent before is read by then."""
        before = self.pongs
        await self.sender.send(m.Pong(7))
        with trio.fail_after(10):
            while self.pongs == before:
                await trio.sleep(0.01)


OPENING = m.Open("r", "s", "i", "g", 1, [m.DiskInfo("d", 1 << 30, 65536)])


@pytest.mark.parametrize("alive", [True, False])
async def test_a_sender_is_judged_once_what_it_sent_is_stored(alive: bool) -> None:
    """A thread may store for longer than a peer may take to answer, and nobody reads meanwhile."""
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        active, queue, go_on = Active(made.receiver, OPENING), EventQueue(), threading.Event()
        # The sender answers by itself; of a dead one no answer comes.
        on_pong = active.pong if alive else lambda: None
        nursery.start_soon(_read, made.receiver, queue, on_pong, lambda _: go_on.wait(10))
        nursery.start_soon(queue.take)
        await made.sender.send(BATCH[0])
        async with trio.open_nursery() as asking:
            asking.start_soon(found, active, alive)
            await trio.sleep(_PROBE_SECONDS + 0.5)
            go_on.set()
        await closed(made, nursery)


async def found(active: Active, alive: bool) -> None:
    assert await active.alive() is alive


CHECKPOINT = m.Checkpoint(m.Reached("g", 1, 0, 0), 0, b"")


async def test_it_is_read_on_while_a_long_step_is_taken() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        here = Receiving(made, nursery)
        await made.sender.send(CHECKPOINT)
        assert await here.queue.take() == CHECKPOINT
        await made.sender.send(data(0, 9))
        await here.pong_arrives()
        # Or waits to be taken, behind what is stored.
        assert isinstance(await here.queue.take(), list)
        await made.sender.send(CHECKPOINT, data(1, 9))
        await here.pong_arrives()
        assert not here.order
        await closed(made, nursery)


async def test_a_thread_stores_only_once_all_before_is_done() -> None:
    """Whoever takes from the queue works in the order of the wire, and so does the thread."""
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        here = Receiving(made, nursery)
        await made.sender.send(CHECKPOINT)
        assert await here.queue.take() == CHECKPOINT
        await made.sender.send(data(0, 9))
        await here.pong_arrives()
        taken = await here.queue.take()
        assert isinstance(taken, list)
        await made.sender.send(data(1, 9))
        # Long enough for a thread that did not wait.
        await trio.sleep(0.3)
        assert not here.order
        await trio.to_thread.run_sync(here.work.store, taken)
        async with trio.open_nursery() as taking:
            taking.start_soon(here.queue.take)
            await here.pong_arrives()
            taking.cancel_scope.cancel()
        assert here.order == [0, 1]
        assert here.work.digest.count == 2
        await closed(made, nursery)


class Replica:
    """Notes what is written."""

    def __init__(self, order: list[object]) -> None:
        self._order = order

    def write_many(self, pieces: Sequence[Any]) -> None:
        self._order.extend(piece.offset for piece in pieces)
