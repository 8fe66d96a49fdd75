"""A link or a target's disk that hangs is named within seconds, and so is its end."""

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from conftest import Mount, wait_for
from proxy import Proxy
from simulated_process import run
from simulated_world import World
from test_replication import Pair

from replicator.eventqueue import EventQueue
from replicator.messages import Event, Ping
from replicator.receiver import Work, _work
from replicator.stalling import STALLED_SECONDS, Answers

SECONDS_MAX = 2 * STALLED_SECONDS


class Hanging(World):
    """Follows; then something hangs, far from any timeout."""

    link_timeout_seconds = 1000.0

    async def until(self, condition: Callable[[], object], seconds: float = 100) -> None:
        with trio.move_on_after(seconds) as limit:
            while not condition():
                await trio.sleep(0.1)
        if limit.cancelled_caught:
            # What hangs could not be cancelled.
            self.target.threads.go_on()
            raise AssertionError(f"not after {seconds} s: {self.error()}")

    async def play(self, story: Callable[[], Awaitable[None]]) -> None:
        self.begin()
        async with trio.open_nursery() as nursery:
            for task in (self.target.live, self._guest, self._sending):
                nursery.start_soon(task)
            await self.until(lambda: self.follower and self.follower.state == "following")
            await story()
            nursery.cancel_scope.cancel()

    def error(self) -> str:
        assert self.follower is not None
        return self.follower.error or ""


@pytest.mark.parametrize("writing", [True, False])
def test_a_disk_that_hangs_is_named(
    tmp_path: Path, writing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world = Hanging(tmp_path, 1)
    world._guest_runs = writing

    async def story() -> None:
        world.target.threads.hang()
        await world.until(lambda: "not answered" in world.error(), SECONDS_MAX)
        world.target.threads.go_on()
        await world.until(lambda: not world.error(), 10)

    run(1, lambda: world.play(story))
    said = [record.getMessage() for record in caplog.records]
    assert any("not answered for" in line for line in said)


@pytest.mark.parametrize("writing", [True, False])
def test_a_link_that_is_silent_is_named(tmp_path: Path, writing: bool) -> None:
    world = Hanging(tmp_path, 2)
    world._guest_runs = writing

    async def story() -> None:
        world.network.connections[-1].silence()
        await world.until(lambda: "link or its disk hangs" in world.error(), SECONDS_MAX)

    run(2, lambda: world.play(story))


def test_the_status_of_a_real_link_that_stalls(tmp_path: Path, fuse: Callable[..., Mount]) -> None:
    pair = Pair(tmp_path, fuse)
    try:
        _stall_and_heal(pair)
    finally:
        pair.clean_up()


def _stall_and_heal(pair: Pair) -> None:
    pair.receive()
    with Proxy(pair.address) as proxy:
        pair.address = proxy.address
        sender = pair.start()
        wait_for(lambda: "following" in sender.said, "it follows")
        proxy.silence()
        # Up to 14 s, as long as nothing holds the machine up.
        wait_for(lambda: "not answered" in (pair.status()["error"] or ""), "it is named", 60)
        proxy.heal()
        wait_for(lambda: pair.status()["error"] is None, "it is over", 60)
        assert sender.popen.poll() is None
        assert "the target answers again" in sender.said


def test_bytes_that_are_taken_are_no_stall() -> None:
    now = [0.0]
    answers = Answers(lambda: now[0], lambda: 0)
    answers.writing(True)
    for _ in range(10):
        now[0] += STALLED_SECONDS - 1
        answers.moved()
        assert answers.trouble() is None
    now[0] += STALLED_SECONDS
    assert "not answered" in (answers.trouble() or "")
    answers.writing(False)
    assert answers.trouble() is None
    answers.asked(5)
    now[0] += STALLED_SECONDS
    assert not answers.heard(0) and "disk" in (answers.trouble() or "")
    assert answers.heard(5) and answers.trouble() is None


@pytest.mark.trio
async def test_questions_to_a_disk_that_hangs_are_bounded() -> None:
    answers = threading.Event()

    class Target:
        def prove(self) -> None:
            answers.wait(60)

    class Peer:
        answered = 0

        async def send(self, _: Event) -> None:
            self.answered += 1

    async def ask_without_end() -> None:
        for nonce in range(5000):
            await queue.put(Ping(nonce))

    queue, peer = EventQueue(), Peer()
    async with trio.open_nursery() as session:
        session.start_soon(_work, Work(peer, Target()), queue, 0, "generation", session)
        session.start_soon(ask_without_end)
        await trio.testing.wait_all_tasks_blocked()
        under_way = len(session.child_tasks)
        answers.set()
        assert under_way < 50
        while peer.answered < 5000:
            await trio.sleep(0.01)
        session.cancel_scope.cancel()
