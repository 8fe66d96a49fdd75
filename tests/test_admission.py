"""A peer that has not said what it wants costs little, and not for long."""

import pytest
import trio
import trio.testing

from replicator.admission import Admission
from replicator.link import LinkLost


@pytest.mark.trio
async def test_silent_peer_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    begun = trio.current_time()
    with pytest.raises(LinkLost, match="in time"), Admission().opening():
        await trio.sleep_forever()
    assert trio.current_time() - begun <= 10.0


@pytest.mark.trio
async def test_newer_peers_push_out_the_oldest() -> None:
    admission, ended = Admission(opening_max=2), []

    async def peer(number: int) -> None:
        try:
            with admission.opening():
                await trio.sleep_forever()
        except LinkLost:
            ended.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(peer, number)
            await trio.testing.wait_all_tasks_blocked()
        assert ended == [0, 1]
        nursery.cancel_scope.cancel()


def test_connections_are_bounded_and_counted_down() -> None:
    admission = Admission(connections_max=1)
    for _ in range(3):
        with admission.connection(), pytest.raises(LinkLost), admission.connection():
            raise AssertionError
