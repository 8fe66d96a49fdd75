"""Pausing, moving and taking back real guests, with everything killed that can be."""

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from conftest import wait_for
from recording_guest import RecordingGuest, make_disk

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, record_fence
from replicator.guest import Guest, PausedTooLong, QemuGuest, held_guest

Start = Callable[..., RecordingGuest]
Sender = Callable[..., None]


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start guests on a disk of their own; all are ended."""
    started: list[RecordingGuest] = []
    folder = tmp_path_factory.mktemp("guests")

    def start(disk: Path, incoming: str | None = None) -> RecordingGuest:
        started.append(RecordingGuest(folder / str(len(started)), [disk], incoming))
        return started[-1]

    yield start
    for guest in started:
        guest.close()


@pytest.fixture(scope="module")
def source(guests: Start, tmp_path_factory: pytest.TempPathFactory) -> RecordingGuest:
    """A guest that runs, for tests that leave it running."""
    disk = tmp_path_factory.mktemp("disk") / "disk.img"
    make_disk(disk)
    guest = guests(disk)
    guest.wait_for_records(1)
    return guest


async def _nothing() -> None:
    await trio.lowlevel.checkpoint()


async def _rest() -> None:
    await trio.sleep(0.05)


def _hold(
    source: RecordingGuest, folder: Path, uri: str | None = None
) -> AbstractAsyncContextManager[Guest]:
    image = folder / "image"
    return held_guest(str(source.qmp), uri, [image], folder / "log")


@pytest.mark.trio
async def test_a_failure_lets_the_guest_go_on(source: RecordingGuest, tmp_path: Path) -> None:
    with pytest.raises(FuseDiskError, match="the link broke"):
        async with _hold(source, tmp_path) as guest:
            await guest.pause(_nothing, 1)
            assert guest.paused_at is not None and guest.paused_at <= trio.current_time()
            raise FuseDiskError("the link broke")
    assert source.status == "running"
    source.wait_for_records(2)


@pytest.mark.trio
async def test_after_the_promotion_it_stays_paused(source: RecordingGuest, tmp_path: Path) -> None:
    async with _hold(source, tmp_path) as guest:
        await guest.pause(_nothing, 1)
        await guest.switch()
    assert source.status == "paused"
    source.query("cont")


@pytest.mark.trio
async def test_a_guest_that_was_paused_before_is_not_let_run(
    source: RecordingGuest, tmp_path: Path
) -> None:
    source.query("stop")
    with pytest.raises(FuseDiskError):
        async with _hold(source, tmp_path) as guest:
            await guest.pause(_nothing, 1)
            raise FuseDiskError
    assert source.status == "paused"
    source.query("cont")


@pytest.mark.trio
async def test_another_child_takes_over_from_a_killed_one(
    source: RecordingGuest, tmp_path: Path
) -> None:
    with pytest.raises(FuseDiskError, match="late"):
        async with _hold(source, tmp_path) as guest:
            await guest.pause(_nothing, 1)
            assert isinstance(guest, QemuGuest) and guest.child_pid is not None
            os.kill(guest.child_pid, signal.SIGKILL)
            raise FuseDiskError("late")
    assert source.status == "running"


@pytest.mark.trio
async def test_no_monitor_is_an_error_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(FuseDiskError, match="cannot reach QEMU at"):
        async with held_guest(str(tmp_path / "q"), None, [], tmp_path / "log"):
            raise AssertionError("entered")


SENDER = """
import sys, trio
from pathlib import Path
from replicator.guest import held_guest
qmp, image, log, uri = sys.argv[1:]
async def nothing(): await trio.sleep(0.01)
async def main():
    async with held_guest(qmp, uri or None, [Path(image)], Path(log)) as guest:
        await guest.pause(nothing, 1)
        print("paused", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.fixture
def sender(tmp_path: Path) -> Sender:
    """Pause a guest from a process of its own, and kill that."""

    def pause_and_die(guest: RecordingGuest, state: str | None = None, uri: str = "") -> None:
        words = [guest.qmp, tmp_path / "image", tmp_path / "log", uri]
        process = subprocess.Popen(
            [sys.executable, "-c", SENDER, *words], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "paused\n", (tmp_path / "log").read_text()
            if state is not None:
                record = FenceRecord("t", state, "r", "unix:///s", 1)
                record_fence([tmp_path / "image"], record)
            process.kill()
        wait_for(lambda: "the sender is gone" in (tmp_path / "log").read_text(), "it is noticed")

    return pause_and_die


def test_a_killed_sender_leaves_no_guest_paused(source: RecordingGuest, sender: Sender) -> None:
    sender(source)
    wait_for(lambda: source.status == "running", "the guest goes on")


def test_a_killed_sender_of_unknown_outcome_leaves_it_paused(
    source: RecordingGuest, sender: Sender, tmp_path: Path
) -> None:
    sender(source, "committing")
    wait_for(lambda: "unknown" in (tmp_path / "log").read_text(), "it has decided")
    assert source.status == "paused"
    source.query("cont")


@pytest.mark.trio
@pytest.mark.parametrize("meanwhile", [_rest, trio.sleep_forever])
async def test_a_move_to_nowhere_leaves_the_guest_running(
    source: RecordingGuest, tmp_path: Path, meanwhile: Callable[[], Awaitable[None]]
) -> None:
    with pytest.raises(FuseDiskError, match="cannot move the guest to unix:/nowhere"):
        async with _hold(source, tmp_path, "unix:/nowhere") as guest:
            with trio.fail_after(60):
                await guest.pause(meanwhile, 1)
    assert source.status == "running"
    source.wait_for_records(2)


@pytest.mark.trio
async def test_a_move_is_taken_back(source: RecordingGuest, guests: Start, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'ram'}"
    make_disk(tmp_path / "disk.img")
    target = guests(tmp_path / "disk.img", uri)
    with pytest.raises(FuseDiskError, match="the link broke"):
        async with _hold(source, tmp_path, uri) as guest:
            await guest.pause(_rest, 5)
            assert guest.memory is not None and guest.memory["total"] > 1 << 27
            raise FuseDiskError("the link broke")
    assert source.status == "running"
    target.popen.wait(60)
    assert target.records == []
    source.wait_for_records(2)


@pytest.mark.trio
async def test_a_last_pass_that_takes_too_long_is_cut_short(
    source: RecordingGuest, guests: Start, tmp_path: Path
) -> None:
    uri = f"unix:{tmp_path / 'ram'}"
    make_disk(tmp_path / "disk.img")
    guests(tmp_path / "disk.img", uri)
    with pytest.raises(PausedTooLong):
        async with _hold(source, tmp_path, uri) as guest:
            await guest.pause(trio.sleep_forever, 0.5)
    assert source.status == "running"


def test_a_killed_sender_of_a_move_takes_it_back(
    source: RecordingGuest, guests: Start, sender: Sender, tmp_path: Path
) -> None:
    uri = f"unix:{tmp_path / 'ram'}"
    make_disk(tmp_path / "disk.img")
    guests(tmp_path / "disk.img", uri)
    sender(source, uri=uri)
    wait_for(lambda: source.status == "running", "the guest goes on")
    source.wait_for_records(2)


@pytest.mark.trio
async def test_a_guest_lost_after_the_promotion_is_stopped_and_said_so(
    source: RecordingGuest, guests: Start, tmp_path: Path
) -> None:
    uri = f"unix:{tmp_path / 'ram'}"
    make_disk(tmp_path / "disk.img")
    target = guests(tmp_path / "disk.img", uri)
    with pytest.raises(FuseDiskError, match="could not hand over the memory"):
        async with _hold(source, tmp_path, uri) as guest:
            await guest.pause(_rest, 5)
            record_fence([tmp_path / "image"], FenceRecord("t", "fenced", "r", "unix:///s", 1))
            target.close()
            await guest.switch()
    assert source.status == "paused"
    source.query("cont")


def test_a_killed_sender_completes_a_move_that_was_promoted(
    guests: Start, sender: Sender, tmp_path: Path
) -> None:
    """The two share a disk here; what is on it is not looked at."""
    disk, uri = tmp_path / "disk.img", f"unix:{tmp_path / 'ram'}"
    make_disk(disk)
    before = guests(disk)
    before.wait_for_records(1)
    after = guests(disk, uri)
    sender(before, "fenced", uri)
    after.wait_for_records(2)
    assert before.status == "postmigrate"
    assert {r.boot for r in after.records} == {before.records[0].boot}
    assert after.numbers[0] == before.numbers[-1] + 1
