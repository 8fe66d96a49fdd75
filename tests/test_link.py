"""What a link makes of a network that goes away: always an error that a new connection mends."""

import pytest
import trio

from replicator.link import Link, LinkLost
from replicator.messages import Hello, Welcome

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
