"""Writes to a socket by the task and on a thread: whole, in order, and ended when nobody waits."""

import errno
import os
import socket

import pytest
import trio
import trio.testing

from replicator.link import Link
from replicator.transport.socketwriter import SocketWriter, after

MIB = 1 << 20


def pair() -> tuple[trio.SocketStream, socket.socket]:
    """A stream with little room, and the other end of it."""
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    return trio.SocketStream(trio.socket.from_stdlib_socket(here)), there


async def all_written(writer: SocketWriter, data: bytes, *, on_thread: bool) -> None:
    left = [memoryview(data[at : at + 100_000]) for at in range(0, len(data), 100_000)]
    while left:
        done = await (writer.write_on_thread(left) if on_thread else writer.write(left))
        left = after(left, done)


def taken(there: socket.socket) -> bytes:
    """All that comes until the other end is closed."""
    data = bytearray()
    while piece := there.recv(30_011):
        data += piece
    return bytes(data)


@pytest.mark.parametrize("on_thread", [False, True])
@pytest.mark.trio
async def test_all_arrives_in_order(on_thread: bool) -> None:
    stream, there = pair()
    data = os.urandom(5 * MIB + 17)
    writer = SocketWriter(stream.socket)
    received = b""

    async def take() -> None:
        nonlocal received
        received = await trio.to_thread.run_sync(taken, there)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await all_written(writer, data, on_thread=on_thread)
        writer.close()
        await stream.aclose()
    assert received == data
    there.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.trio
async def test_cancelled_it_ends_and_uses_the_buffer_no_more() -> None:
    before = descriptors()
    stream, there = pair()
    writer = SocketWriter(stream.socket)
    data = bytearray(b"a" * 4 * MIB)
    with trio.move_on_after(0.1) as scope:
        await writer.write_on_thread([memoryview(data)])
    assert scope.cancelled_caught
    data[:] = b"b" * len(data)
    writer.close()
    await stream.aclose()
    received = taken(there)
    assert received and set(received) == {ord("a")}
    there.close()
    assert descriptors() == before


@pytest.mark.trio
async def test_closed_it_ends_for_whoever_writes() -> None:
    before = descriptors()
    stream, there = pair()
    writer = SocketWriter(stream.socket)

    async def write() -> None:
        with pytest.raises(trio.ClosedResourceError):
            while True:
                await writer.write_on_thread([memoryview(bytes(MIB))])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        writer.close()
        await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await writer.write_on_thread([memoryview(b"x")])
    with pytest.raises(trio.ClosedResourceError):
        await writer.write([memoryview(b"x")])
    there.close()
    assert descriptors() == before


@pytest.mark.trio
async def test_a_peer_that_goes_is_an_error() -> None:
    stream, there = pair()
    writer = SocketWriter(stream.socket)

    async def write() -> None:
        with pytest.raises(OSError, match="Broken pipe") as raised:
            while True:
                await writer.write_on_thread([memoryview(bytes(MIB))])
        assert raised.value.errno == errno.EPIPE

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        there.close()
    writer.close()
    await stream.aclose()


@pytest.mark.trio
async def test_one_that_takes_nothing_is_heard_of() -> None:
    """Also while it takes nothing, the caller goes on now and then."""
    stream, there = pair()
    writer = SocketWriter(stream.socket)
    assert 0 < await writer.write_on_thread([memoryview(bytes(MIB))]) < MIB
    assert await writer.write_on_thread([memoryview(bytes(MIB))]) == 0
    writer.close()
    await stream.aclose()
    there.close()


@pytest.mark.trio
async def test_what_never_stops_coming_leaves_others_their_turn() -> None:
    """Bulk data is taken many times without a look at the other tasks, but not for ever."""
    here, there = socket.socketpair()
    there.setblocking(False)
    link = Link(trio.SocketStream(trio.socket.from_stdlib_socket(here)), "receiver")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    buffer = memoryview(bytearray(64 * 1024))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(400):
            there.send(bytes(len(buffer)))
            await link._receive(buffer)
        nursery.cancel_scope.cancel()
    # 25 MiB came, and after 4 MiB each it looked around.
    assert turns >= 5
    await link.close()
    there.close()


def test_what_is_left_of_buffers() -> None:
    views = [memoryview(b"abc"), memoryview(b""), memoryview(b"de")]
    left = [b"".join(after(views, count)) for count in range(6)]
    assert left == [b"abcde", b"bcde", b"cde", b"de", b"e", b""]
