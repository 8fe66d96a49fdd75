"""What a link makes of a network that goes away: always an error that a new connection mends."""

import os
from functools import partial

import pytest
import trio
import trio.testing

from replicator.link import Link, LinkLost
from replicator.messages import (
    Begin,
    Bye,
    Data,
    DiskInfo,
    Event,
    Hello,
    Open,
    Opened,
    Ping,
    Welcome,
)

SILENCE_SECONDS_MAX = 0.2
pytestmark = pytest.mark.trio


async def pair() -> tuple[Link, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    link = Link(trio.SocketStream(ours), "sender", SILENCE_SECONDS_MAX)
    return link, trio.SocketStream(theirs)


async def lost(call: object) -> str:
    try:
        with trio.fail_after(10):
            await call  # type: ignore[misc]
    except LinkLost as error:
        return str(error)
    raise AssertionError("the link was not lost")


async def test_a_silent_peer_is_gone() -> None:
    link, peer = await pair()
    assert "silent" in await lost(link.expect(Welcome))
    await peer.aclose()
    await link.close()


async def test_a_peer_that_takes_nothing_is_gone() -> None:
    link, peer = await pair()
    link._stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
    # Nobody empties the kernel's buffers.
    with trio.move_on_after(0.2):
        while True:
            await link._stream.send_all(bytes(1 << 16))
    assert "takes no more" in await lost(link.send(Hello([1], "replicate", 0)))
    await peer.aclose()
    await link.close()


async def test_a_cut_inside_a_frame_is_the_network_and_no_broken_rule() -> None:
    link, peer = await pair()
    await link.send(Hello([1], "replicate", 0))
    whole = await peer.receive_some(1 << 16)
    await peer.send_all(bytes(whole[:10]))
    await peer.aclose()
    assert "closed" in await lost(link.expect(Welcome))
    await link.close()


async def test_a_peer_that_said_goodbye_is_gone_and_an_answer_to_it_no_broken_rule() -> None:
    """A sender that gives a pass up says so while the receiver still makes it durable."""
    link, peer = await pair()
    await link.send(Hello([1], "replicate", 0))
    other = Link(peer, "receiver")
    assert isinstance(await other.receive(), Hello)
    await link.send(Bye())
    assert isinstance(await other.receive(), Bye)
    assert "ended" in await lost(other.send(Welcome(1)))
    await peer.aclose()
    await link.close()


async def test_a_slow_link_is_not_a_silent_peer(autojump_clock: object) -> None:
    link, peer = await pair()
    # The kernel's queue empties for a long time; then it does not any more.
    left = [5, 4, 3, 2, 1, 1]
    waited = len(left) - 1
    link._unsent = lambda: left.pop(0)  # type: ignore[method-assign]
    begun = trio.current_time()
    assert "silent" in await lost(link.expect(Welcome))
    assert trio.current_time() - begun > (waited - 2) / 2 * SILENCE_SECONDS_MAX
    await peer.aclose()
    await link.close()


async def test_what_the_kernel_holds_is_counted() -> None:
    link, peer = await pair()
    assert link._unsent() == 0
    await link.send(Hello([1], "replicate", 0))
    assert link._unsent() > 0
    await peer.receive_some(1 << 16)
    assert link._unsent() == 0
    await peer.aclose()
    await link.close()


async def passing() -> tuple[Link, Link]:
    """Both ends of a TCP connection, in the middle of a pass."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    sender = Link(await trio.open_tcp_stream(*address), "sender")
    receiver = Link(await listener.accept(), "receiver")
    await listener.aclose()
    disks = [DiskInfo("a", 1 << 30, 65536)]
    for link, other, event in (
        (sender, receiver, Hello([1], "replicate", 0)),
        (receiver, sender, Welcome(1)),
        (sender, receiver, Open("r", "s", "i", "g", 1, disks)),
        (receiver, sender, Opened("new", None, None, None)),
        (sender, receiver, Begin(1, "fill")),
    ):
        await link.send(event)
        assert await other.receive() == event
    return sender, receiver


async def test_bulk_data_that_fills_all_buffers_comes_whole_and_what_follows_it_too() -> None:
    """More than one call takes, ending in less than a receiver likes to be woken for."""
    blobs = [os.urandom(length) for length in (*12 * [1 << 20], 700_001, 65_537, 3)]
    with trio.fail_after(30):
        sender, receiver = await passing()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(sender.send, *(Data.of(0, 0, blob) for blob in blobs)))
            # What nobody takes yet fills the kernel's buffers.
            await trio.testing.wait_all_tasks_blocked(0.05)
            for blob in blobs:
                event = await receiver.receive()
                assert isinstance(event, Data) and event.content() == blob
        await sender.send(Ping(7))
        assert await receiver.receive() == Ping(7)
    await sender.close()
    await receiver.close()


async def test_what_a_slow_peer_sends_of_bulk_data_counts_before_the_frame_is_whole() -> None:
    """A receiver takes a sender for dead that answers nothing and of which no bytes come."""
    with trio.fail_after(30):
        sender, receiver = await passing()
        blob = os.urandom(1 << 20)
        frame = b"".join(sender._connection.send(Data.of(0, 0, blob)))
        before = receiver.received_bytes
        async with trio.open_nursery() as nursery:
            events = trio.open_memory_channel[Event](1)

            async def receive() -> None:
                await events[0].send(await receiver.receive())

            nursery.start_soon(receive)
            for at in range(0, len(frame), 100_000):
                await sender._stream.send_all(frame[at : at + 100_000])
                while receiver.received_bytes - before < min(at + 100_000, len(frame)):
                    await trio.sleep(0.01)
            event = await events[1].receive()
        assert isinstance(event, Data) and event.content() == blob
    await sender.close()
    await receiver.close()


async def test_a_connection_that_ends_inside_bulk_data_is_seen_at_once() -> None:
    with trio.fail_after(10):
        sender, receiver = await passing()
    frame = b"".join(sender._connection.send(Data.of(0, 0, os.urandom(1 << 20))))
    await sender._stream.send_all(frame[:100_000])
    await sender.close()
    assert "closed" in await lost(receiver.receive())
    await receiver.close()
