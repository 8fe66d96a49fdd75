"""A second sender for a replica: refused while the first answers, let in when it does not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusedisk.replicas import Sent
from replicator import messages as m
from replicator.link import Link, Refused
from replicator.receiver import Receiver
from replicator.senderlink import Pace, SenderLink
from replicator.store import Store

SIZE = 1 << 20


@asynccontextmanager
async def link_to(receiver: Receiver) -> AsyncIterator[SenderLink]:
    """A sender's link; `listen` is for the caller to run."""
    ours, theirs = trio.socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.serve, trio.SocketStream(theirs))
        link = SenderLink(trio.SocketStream(ours), Pace(None), Sent(), 60.0)
        try:
            yield link
        finally:
            await link.close()


async def shake_hands(link: Link, instance: str) -> m.Opened:
    await link.send(m.Hello([1], "replicate", 0))
    await link.expect(m.Welcome)
    disks = [m.DiskInfo("disk", SIZE, 65536)]
    await link.send(m.Open("r", "source", instance, "generation", 1, disks))
    return await link.expect(m.Opened)


@pytest.mark.trio
async def test_a_sender_that_answers_keeps_its_replica(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        receiver = Receiver(store)
        async with link_to(receiver) as first, trio.open_nursery() as nursery:
            nursery.start_soon(first.listen)
            await shake_hands(first, "one")
            for _ in range(2):
                async with link_to(receiver) as second, trio.open_nursery() as inner:
                    inner.start_soon(second.listen)
                    with pytest.raises(Refused, match="another sender, which answers"):
                        await shake_hands(second, "two")
            await first.send(m.Begin(1, "fill"))
            await first.send(m.Ping(7))
            # Others may come before: they say that the receiver is busy.
            with trio.fail_after(20):
                while await first.receive() != m.Pong(7):
                    pass
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_sender_that_does_not_answer_gives_way(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        receiver = Receiver(store)
        async with link_to(receiver) as first, trio.open_nursery() as nursery:
            with trio.CancelScope() as listening:
                async with trio.open_nursery() as reading:
                    reading.start_soon(first.listen)
                    await shake_hands(first, "one")
                    listening.cancel()
            async with link_to(receiver) as second:
                nursery.start_soon(second.listen)
                assert (await shake_hands(second, "two")).epoch is None
                nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_the_same_process_takes_over_at_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        receiver = Receiver(store)
        async with link_to(receiver) as first, trio.open_nursery() as nursery:
            nursery.start_soon(first.listen)
            await shake_hands(first, "one")
            async with link_to(receiver) as second:
                nursery.start_soon(second.listen)
                await shake_hands(second, "one")
                with pytest.raises(Exception, match="connection"):
                    await first.receive()
                nursery.cancel_scope.cancel()
