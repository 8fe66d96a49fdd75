"""A pass of which a transfer is missing, doubled, or changed places never becomes the replica's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from test_takeover import SIZE, link_to, shake_hands

from replicator import messages as m
from replicator.receiver import Receiver
from replicator.store import Store
from replicator.transfers import TransferDigest

FIRST = m.Data.of(0, 0, b"1" * 4096)
SECOND = m.Data.of(0, 0, b"2" * 4096)
ZERO = m.Zero(0, 8192, 4096)

Transfers = list[m.Data | m.Zero]

LOST: dict[str, Callable[[Transfers], Transfers]] = {
    "the last is missing": lambda sent: sent[:-1],
    "the first is missing": lambda sent: sent[1:],
    "one is doubled": lambda sent: [*sent, sent[-1]],
    "two changed places": lambda sent: [sent[1], sent[0], *sent[2:]],
    "a run of zeros is longer": lambda sent: [*sent[:-1], m.Zero(0, 8192, 8192)],
    "nothing arrived": lambda sent: [],
}


def commit(epoch: int, transfers: Transfers) -> m.Commit:
    digest = TransferDigest()
    for transfer in transfers:
        digest.add(transfer)
    return m.Commit("generation", epoch, digest.count, digest.value())


@pytest.mark.trio
@pytest.mark.parametrize("kind", LOST)
async def test_a_pass_that_is_not_the_one_sent_is_refused(tmp_path: Path, kind: str) -> None:
    sent: Transfers = [FIRST, SECOND, ZERO]
    with Store(tmp_path) as store:
        receiver = Receiver(store)
        async with link_to(receiver) as link, trio.open_nursery() as nursery:
            nursery.start_soon(link.listen)
            await shake_hands(link, "one")
            with trio.fail_after(20):
                await link.send(m.Begin(1, "fill"))
                await link.send(FIRST)
                await link.send(commit(1, [FIRST]))
                await link.expect(m.Committed)
                await link.send(m.Begin(2, "pass"))
                for transfer in LOST[kind](sent):
                    await link.send(transfer)
                await link.send(commit(2, sent))
                with pytest.raises(Exception, match="not the one that was sent"):
                    await link.expect(m.Committed)
            nursery.cancel_scope.cancel()
        async with link_to(receiver) as link, trio.open_nursery() as nursery:
            nursery.start_soon(link.listen)
            opened = await shake_hands(link, "one")
            nursery.cancel_scope.cancel()
    assert (opened.state, opened.epoch) == ("following", 1)
    image = (tmp_path / "r" / "disk").read_bytes()
    assert image == FIRST.data.tobytes() + bytes(SIZE - 4096)
