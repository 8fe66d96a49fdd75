"""What a link makes of a network that goes away: always an error that a new connection mends."""

import pytest
import trio

from replicator.link import Link, LinkLost
from replicator.messages import Bye, Hello, Welcome

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
