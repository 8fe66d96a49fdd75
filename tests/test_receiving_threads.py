"""Bulk data that a thread receives and stores: in order, and ended when nobody waits for it."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing
from test_sending_threads import closed, data, ends
from test_slow_peers import BATCH, MIB
from test_socketwriter import descriptors

from replicator import messages as m
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


async def test_a_thread_stores_only_once_all_before_is_done() -> None:
    """Whoever takes from the queue works in the order of the wire, and so does the thread."""
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        queue, order = EventQueue(), list[object]()
        work = Work(made.receiver, Replica(order))
        nursery.start_soon(_read, made.receiver, queue, lambda: None, work.store)
        reached = m.Reached("g", 1, 0, 0)
        checkpoint = m.Checkpoint(reached, 0, b"")
        nursery.start_soon(
            made.sender.send, data(0, 9), checkpoint, data(1, 9), data(2, 9), checkpoint, m.Bye()
        )
        while not order or order[-1] != m.Bye():
            event = await queue.take()
            # A step that takes its time.
            await trio.sleep(0.05)
            if isinstance(event, list):
                await trio.to_thread.run_sync(work.store, event)
            else:
                order.append(event)
        assert order == [0, checkpoint, 1, 2, checkpoint, m.Bye()]
        assert work.digest.count == 3
        await closed(made, nursery)


class Replica:
    """Notes what is written."""

    def __init__(self, order: list[object]) -> None:
        self._order = order

    def write_many(self, pieces: Sequence[Any]) -> None:
        self._order.extend(piece.offset for piece in pieces)
