"""When passes begin, and how old the newest point is: in numbers, and with a stopped receiver."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from test_replication import Pair, guest_write

from replicator.cadence import Cadence

MIB = 1 << 20


def test_an_idle_disk_makes_no_pass_and_its_point_does_not_age() -> None:
    cadence = Cadence(5)
    assert cadence.age(100) is None and not cadence.is_due(0, 100)
    cadence.is_as_of(100)
    cadence.is_as_of(7000)
    assert cadence.age(7001) == 1
    assert not cadence.is_due(0, 9999)


def test_a_pass_begins_as_late_as_the_target_allows() -> None:
    cadence = Cadence(10)
    cadence.note_pass(MIB, 100, 101)
    assert not cadence.is_due(MIB, 106.9)
    assert cadence.is_due(MIB, 107.1)
    # What takes longer begins earlier.
    assert cadence.is_due(4 * MIB, 104.1)


def test_passes_beyond_the_target_follow_each_other_with_a_rest() -> None:
    cadence = Cadence(1)
    cadence.note_pass(100 * MIB, 0, 20)
    assert not cadence.is_due(MIB, 20.5)
    assert cadence.is_due(MIB, 21.1)


def simulated_ages(dirty_rate: float, send_rate: float, target: float) -> list[float]:
    """Ages just before each commit, of a guest and a link with steady rates."""
    cadence, now, waiting = Cadence(target), 0.0, 0.0
    cadence.note_pass(MIB, 0, 0.1)
    ages = []
    while now < 300:
        now += cadence.poll_seconds
        waiting += dirty_rate * cadence.poll_seconds
        if cadence.is_due(int(waiting), now):
            takes = 0.05 + waiting / send_rate
            age = cadence.age(now + takes)
            assert age is not None
            ages.append(age)
            cadence.note_pass(int(waiting), now, now + takes)
            now, waiting = now + takes, dirty_rate * takes
    return ages


def test_the_target_is_kept_where_the_link_allows_it_and_no_pass_is_wasted() -> None:
    slack = simulated_ages(MIB, 100 * MIB, 5)
    assert max(slack) <= 5 and len(slack) <= 300 / 5 * 1.5
    # A guest at more than a third of what the link carries.
    assert max(simulated_ages(35 * MIB, 100 * MIB, 5)[3:]) <= 5


def test_an_excess_is_said_once_and_so_is_its_end() -> None:
    cadence = Cadence(2)
    cadence.is_as_of(10)
    assert cadence.watch(12) is None
    assert cadence.watch(12.5) == "the newest point is 2.5 s old, more than --rpo 2 s"
    assert cadence.report(13) == {"target": 2, "age": 3, "exceeded": True, "excesses": 1}
    assert cadence.watch(30) is None
    cadence.is_as_of(30)
    said = cadence.watch(31)
    assert said == "the newest point is within --rpo 2 s again; it was 20.0 s old at most"
    assert cadence.watch(31.5) is None
    cadence.unknown()
    assert cadence.watch(99) is None and not cadence.report(99)["exceeded"]


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    yield made
    for process in made.processes:
        process.kill()


def test_a_receiver_that_stops_lets_the_point_age(pair: Pair) -> None:
    receiver = pair.receive()
    sender = pair.start("--rpo", "1")
    pair.wait_following(sender)
    receiver.popen.send_signal(signal.SIGSTOP)
    guest_write(pair.mount.disk(0), b"late", 0)
    try:
        wait_for(lambda: pair.status()["rpo"]["exceeded"], "the point is too old")
        assert pair.status()["rpo"]["age"] > 1
        wait_for(lambda: "more than --rpo" in sender.said, "it is said")
    finally:
        receiver.popen.send_signal(signal.SIGCONT)
    wait_for(lambda: "within --rpo 1 s again" in sender.said, "it is over")
    # Once for each excess, however long it lasts; on a slow machine there may be more meanwhile.
    before = sender.said.count("more than --rpo")
    assert before <= pair.status()["rpo"]["excesses"] <= sender.said.count("more than --rpo")
