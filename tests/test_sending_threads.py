"""Bulk data that threads read and send: whole, in order, bounded, and ended when nobody waits."""

import os
import socket
import threading
from collections.abc import Sequence
from mmap import mmap
from typing import Any

import pytest
import trio
import trio.testing
from test_slow_peers import BATCH, MIB, Ends
from test_socketwriter import descriptors, pair, taken

from replicator import frames
from replicator import messages as m
from replicator.batches import Ahead, Batch, BatchReader
from replicator.compression import Compressor
from replicator.link import LinkLost
from replicator.outgoing import Outgoing
from replicator.senderlink import Pace
from replicator.transport.socketwriter import SocketWriter
from replicator.wire import State

pytestmark = pytest.mark.trio
Transfers = Sequence[m.Data | m.Zero]


async def ends(nursery: trio.Nursery, pace: Pace | None = None) -> Ends:
    """A sender and a receiver in the middle of a pass."""
    ours, theirs = trio.socket.socketpair()
    made = Ends(trio.SocketStream(ours), trio.SocketStream(theirs), pace or Pace(None))
    await made.begin(nursery)
    return made


async def closed(made: Ends, nursery: trio.Nursery) -> None:
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await made.sender.close()
        await made.receiver.close()


def data(offset: int, size: int) -> m.Data:
    return m.Data.of(0, offset, os.urandom(size))


# To send what is made while it is sent.


async def test_a_buffer_is_asked_for_again_only_once_it_is_taken() -> None:
    stream, there = pair()
    writer, buffer, numbers = SocketWriter(stream.socket), bytearray(300_001), iter(range(40))

    def more(_: float) -> list[memoryview] | None:
        if (number := next(numbers, None)) is None:
            return None
        buffer[:] = bytes([number]) * len(buffer)
        return [memoryview(buffer)[:7], memoryview(buffer)[7:]]

    received = b""

    async def take() -> None:
        nonlocal received
        received = await trio.to_thread.run_sync(taken, there)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        count, left = 0, list[memoryview]()
        while count < 40 * len(buffer):
            done, left = await writer.stream(left, more)
            count += done
        assert not left
        writer.close()
        await stream.aclose()
    assert received == b"".join(bytes([n]) * len(buffer) for n in range(40))
    there.close()


async def test_cancelled_while_the_peer_takes_nothing_it_ends_and_uses_the_buffer_no_more() -> None:
    before = descriptors()
    stream, there = pair()
    writer, buffer = SocketWriter(stream.socket), bytearray(b"a" * MIB)
    with trio.move_on_after(0.1) as scope:
        while True:
            await writer.stream([], lambda _: [memoryview(buffer)])
    assert scope.cancelled_caught
    buffer[:] = b"b" * MIB
    writer.close()
    await stream.aclose()
    received = taken(there)
    assert received and set(received) == {ord("a")}
    there.close()
    assert descriptors() == before


async def test_cancelled_it_asks_for_no_more() -> None:
    stream, there = pair()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * MIB)
    writer, asked, go_on = SocketWriter(stream.socket), threading.Event(), threading.Event()
    count = 0

    def more(_: float) -> list[memoryview]:
        nonlocal count
        count += 1
        asked.set()
        go_on.wait(10)
        return [memoryview(b"x")]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.stream, [], more)
        await trio.to_thread.run_sync(asked.wait)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert count == 1
    writer.close()
    await stream.aclose()
    there.close()


async def test_a_stream_ends_with_a_whole_frame_however_slow_the_peer_is() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        batches = iter([BATCH, BATCH])
        came: list[m.Event] = []

        async def send() -> None:
            await made.sender.stream(lambda _: next(batches))
            # What else is sent comes after it.
            await made.sender.send(m.Ping(7))

        async def take() -> None:
            # Longer than a thread writes in one go.
            await trio.sleep(0.7)
            assert made.sender.answers._writing
            while not came or came[-1] != m.Ping(7):
                came.append(await made.receiver.receive())

        async with trio.open_nursery() as both:
            both.start_soon(send)
            both.start_soon(take)
        # After more than a quarter of a second no second batch was asked for.
        assert [type(one) for one in came] == [m.Data] * 4 + [m.Ping]
        assert next(batches) is BATCH
        assert not made.sender.answers._writing
        await closed(made, nursery)


async def test_a_rate_that_is_set_meanwhile_ends_a_stream() -> None:
    async with trio.open_nursery() as nursery:
        pace = Pace(None)
        made = await ends(nursery, pace)
        asked = 0

        def more(_: float) -> Transfers:
            nonlocal asked
            asked += 1
            trio.from_thread.run_sync(pace.set_rate, 1 << 20, trio_token=token)
            return [data(0, 100)]

        token = trio.lowlevel.current_trio_token()
        assert not made.sender.limited
        await made.sender.stream(more)
        assert made.sender.limited and asked == 1
        await closed(made, nursery)


async def test_why_the_peer_ended_is_what_a_stream_raises() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)

        async def take() -> None:
            await made.receiver.expect(m.Data)
            await made.receiver.send(m.Failed("io", "the disk is gone"))
            await made.receiver.drain()
            await made.receiver.close()

        nursery.start_soon(take)
        with pytest.raises(LinkLost, match="the disk is gone"):
            while True:
                await made.sender.stream(lambda _: BATCH)
        await closed(made, nursery)


async def test_a_last_word_that_comes_while_a_frame_is_made_stays_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        ours, theirs = made.sender._connection, made.receiver._connection
        making, go_on = threading.Event(), threading.Event()
        real = frames.encode
        last = b"".join(theirs.send(m.Bye()))

        def encode(event: m.Event) -> Any:
            making.set()
            go_on.wait(10)
            return real(event)

        monkeypatch.setattr("replicator.wire.encode", encode)
        sending = threading.Thread(target=ours.send, args=(BATCH[0],))
        hearing = threading.Thread(target=ours.receive_data, args=(last,))
        sending.start()
        making.wait(10)
        hearing.start()
        hearing.join(0.1)
        go_on.set()
        sending.join()
        hearing.join()
        assert ours.state is State.CLOSED
        await closed(made, nursery)


# To read ahead.


class Disk:
    """All of it data; to read beyond a place fails."""

    def __init__(self, fails_at: int = 1 << 62) -> None:
        self.fails_at, self.read_bytes = fails_at, 0

    def data_extents(self, disk: int, start: int, end: int) -> Any:
        yield start, end - start

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        if offset >= self.fails_at:
            raise ValueError("a mistake")
        buffer[:] = (offset + 1).to_bytes(8, "little") * (len(buffer) // 8)
        self.read_bytes += len(buffer)


async def take_all(ahead: Ahead) -> list[int]:
    ends = []
    while not ahead.ended:
        batch = await trio.to_thread.run_sync(ahead.take, 0.1)
        if batch is not None:
            ends.append(batch.end)
            ahead.give_back(batch)
    return ends


async def test_batches_come_in_order_and_their_buffers_are_used_again() -> None:
    reader = BatchReader(Disk(), Compressor("none"))
    for _ in range(2):
        async with reader.reading_ahead(0, [(0, 30 * MIB), (40 * MIB, 41 * MIB)]) as ahead:
            assert await take_all(ahead) == [*range(4 * MIB, 29 * MIB, 4 * MIB), 41 * MIB]
    assert len(reader._spare) == 3


async def test_no_more_is_read_than_there_are_buffers_for() -> None:
    disk = Disk()
    async with BatchReader(disk, Compressor("none")).reading_ahead(0, [(0, 99 * MIB)]) as ahead:
        await trio.to_thread.run_sync(ahead.take, 10)
        with trio.move_on_after(0.2):
            await trio.sleep_forever()
        # Whoever leaves does not wait for the rest.
        assert disk.read_bytes == 12 * MIB
    assert disk.read_bytes == 12 * MIB


async def test_once_stopped_it_reads_no_more_though_there_is_room() -> None:
    ahead = Ahead([mmap(-1, 4096) for _ in range(3)])
    read: list[mmap] = []

    def prepare(buffer: mmap) -> Batch:
        read.append(buffer)
        ahead.stop()
        return Batch(buffer, covered=1)

    ahead.fill(prepare)
    assert len(read) == 1
    assert ahead.take(0) is not None and not ahead.ended
    assert ahead.take(0) is None and ahead.ended


async def test_a_reader_that_fails_ends_what_waits_for_it() -> None:
    reader = BatchReader(Disk(fails_at=9 * MIB), Compressor("none"))
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="a mistake")):
        async with reader.reading_ahead(0, [(0, 99 * MIB)]) as ahead:
            assert await take_all(ahead) == [4 * MIB, 8 * MIB]
            await trio.sleep_forever()


@pytest.mark.parametrize("bandwidth", [None, 1 << 30])
async def test_every_batch_is_sent_once_and_said_to_be_sent_after_it(bandwidth: int | None) -> None:
    async with trio.open_nursery() as nursery:
        pace = Pace(bandwidth)
        made = await ends(nursery, pace)
        outgoing = Outgoing(made.sender, Disk(), Compressor("none"), trio.lowlevel.checkpoint)
        said: list[int] = []
        came: list[int] = []

        def going(batch: Batch) -> Sequence[m.Event]:
            # Not before it goes, and never two at a time.
            assert not said or batch.end > said[-1]
            return list(batch.transfers)

        async def sent(batches: Sequence[Batch]) -> None:
            said.extend(batch.end for batch in batches)
            # The other way from now on, once that was gone for a while.
            if len(said) > 5:
                pace.set_rate(None if bandwidth else 1 << 30)

        async def take() -> None:
            while len(came) < 41:
                event = await made.receiver.expect(m.Data)
                assert bytes(event.content()[:8]) == (event.offset + 1).to_bytes(8, "little")
                came.append(event.offset)

        async with trio.open_nursery() as both:
            both.start_soon(take)
            await outgoing.send(0, [(0, 41 * MIB)], None, going, sent)
        assert came == list(range(0, 41 * MIB, MIB))
        assert said == [*range(4 * MIB, 41 * MIB, 4 * MIB), 41 * MIB]
        await closed(made, nursery)


async def test_cancelled_while_the_peer_takes_nothing_both_threads_end() -> None:
    async with trio.open_nursery() as nursery:
        made = await ends(nursery)
        disk = Disk()
        outgoing = Outgoing(made.sender, disk, Compressor("none"), trio.lowlevel.checkpoint)

        async def sent(_: Sequence[Batch]) -> None:
            await trio.lowlevel.checkpoint()

        before = threading.active_count()
        with trio.move_on_after(0.3) as scope:
            await outgoing.send(0, [(0, 99 * MIB)], None, lambda b: list(b.transfers), sent)
        assert scope.cancelled_caught
        assert disk.read_bytes <= 16 * MIB
        assert threading.active_count() <= before + 2
        await closed(made, nursery)
