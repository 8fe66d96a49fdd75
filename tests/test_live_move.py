"""A running guest moves to its replica: nothing is lost, nothing runs twice, whatever dies."""

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from moving import Move
from recording_guest import RecordingGuest

FAULTS = int(os.environ.get("FUSEDISK_MOVES", "2"))
SEED = int(os.environ.get("FUSEDISK_MOVE_SEED", "0"))


@pytest.fixture
def start(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Callable[..., Move]]:
    """Begin with a guest that writes to all of so many disks."""
    made: list[Move] = []

    def make(disks: int = 1, *, mounted: bool = False) -> Move:
        mount = fuse(*(tmp_path / f"disk{number}.img" for number in range(disks)))
        made.append(Move(tmp_path, mount, fuse if mounted else None))
        return made[-1]

    yield make
    for move in made:
        move.close()


def test_a_guest_of_two_disks_goes_on_at_the_target(start: Callable[..., Move]) -> None:
    move = start(2)
    assert move.cut_over().wait(120) == 0, move.log("cutover.log")
    answer = move.answer
    assert answer["outcome"] == "promoted"
    assert answer["memory"]["total"] > 0
    assert answer["downtime_ms"] == pytest.approx(sum(answer["phases"].values()))
    # Of the bound, what QEMU may take is kept: 0.1 s to say that it paused, 0.3 s of memory.
    assert answer["predicted_ms"] > 400
    assert move.source.status == "postmigrate"
    move.check(move.replicas, move.source, move.target)
    boots = {record.boot for record in move.source.records + move.target.records}
    assert len(boots) == 1
    assert move.target.records[0].number > 3
    assert move.target.records[0].uptime > move.source.records[-1].uptime
    assert "failed" not in move.source.said + move.target.said


def test_a_paused_guest_is_left_for_another_to_start(start: Callable[..., Move]) -> None:
    """Without --migrate-to: the guest's memory stays, and a new guest starts from the replica."""
    move = start()
    move.target.close()
    assert move.cut_over(moves=False).wait(120) == 0, move.log("cutover.log")
    assert move.source.status == "paused"
    again = move.boot("again", move.replicas)
    move.check(move.replicas, move.source, again)


def test_a_link_cut_while_the_memory_moves_costs_nothing(start: Callable[..., Move]) -> None:
    move = start()
    # So slow that it is cut in the midst of it.
    move.source.query("migrate-set-parameters", **{"max-bandwidth": 4 << 20})
    command = move.cut_over()
    wait_for(lambda: (move.entry().get("cutover") or {}).get("memory"), "the memory moves")
    move.proxy.down()
    assert command.wait(120) == 1, move.log("cutover.log")
    assert not move.settle()
    assert move.source.status == "running"
    move.check(move.mount.images, move.source)


VICTIMS = ("sender", "receiver", "target", "command", "link")


@pytest.mark.parametrize("number", range(FAULTS))
def test_the_guest_goes_on_at_exactly_one_side(start: Callable[..., Move], number: int) -> None:
    """Something is killed at any moment of a cutover."""
    chance = random.Random(SEED * 1000 + number)
    victim = VICTIMS[(SEED + number) % len(VICTIMS)]
    mounted = chance.choice([True, False])
    move = start(chance.choice([1, 2]), mounted=mounted)
    strike(move, chance, victim)


@pytest.mark.parametrize("number", range(max(1, FAULTS // 2)))
def test_a_guest_on_its_way_home_goes_on_at_exactly_one_side(
    start: Callable[..., Move], fuse: Callable[..., Mount], number: int
) -> None:
    """The same for the cutover back, to the images that it came from."""
    chance = random.Random(SEED * 1000 + 500 + number)
    move = start(chance.choice([1, 2]), mounted=True)
    assert move.cut_over().wait(120) == 0, move.log("cutover.log")
    move.target.wait_for_records(3)
    victim = VICTIMS[(SEED + number) % len(VICTIMS)]
    strike(move.prepare_home(fuse), chance, victim, move.source)


def strike(move: Move, chance: random.Random, victim: str, *before: RecordingGuest) -> None:
    """Kill one or cut the link in a cutover; ``before`` are the guests up to the one that moves."""
    command = move.cut_over()
    phase = chance.choice(["converging", "memory", "switching", "after"])
    delay = chance.uniform(0, 0.3)
    print(f"seed {SEED}: {victim} {delay:.3f} s into {phase}, {len(move.replicas)} disks")
    _wait_until(move, command, phase, delay)
    if victim == "link":
        move.proxy.down()
    else:
        process = {
            "sender": move.sender,
            "receiver": move.receiver,
            "target": move.target.popen,
            "command": command,
        }[victim]
        process.kill()
        process.wait()
    if victim == "command":
        wait_for(lambda: move.entry()["state"] != "cutover", "the sender is done", 120)
    command.wait(120)
    promoted = move.settle()
    print(f"promoted: {promoted}; {move.log('cutover.log')}")
    if not promoted:
        wait_for(lambda: move.source.status == "running", "the guest goes on", 60)
        move.check(move.mount.images, *before, move.source)
        assert move.target.records == []
        return
    wait_for(lambda: move.source.status in ("postmigrate", "paused"), "it is not here", 60)
    if move.target.popen.poll() is None:
        move.check(move.replicas, *before, move.source, move.target)
    else:
        # The memory is lost with the one that held it, the disk is not: the guest starts anew.
        again = move.boot("again", move.target_disks)
        move.check(move.replicas, *before, move.source, move.target, again)


def _wait_until(move: Move, command: subprocess.Popen[bytes], phase: str, delay: float) -> None:
    """Some moment in or after a phase, as the sender's log tells; it may be over by then."""
    words = {"after": "promoted"}.get(phase, f"cutover: {phase}")
    # On a busy machine the cutover may give up before it comes so far.
    wait_for(
        lambda: words in move.log("start.log") or command.poll() is not None,
        f"the sender says {words}",
        120,
    )
    time.sleep(delay)
