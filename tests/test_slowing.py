"""A guest that outruns the link is slowed until it does not, and is free again whatever happens."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from test_cutover import BIN, Pair, run

from fusedisk.changemap import Control
from fusedisk.slowing import let_go, slow_down, slowed_to
from replicator.slowing import LEASE_SECONDS, Slowing

CHUNK = 65536
LOAD_BYTES = 2 << 20


class Load(threading.Thread):
    """Writes whole chunks, one after the other, round and round, until refused or stopped."""

    def __init__(self, disk: Path, size: int) -> None:
        super().__init__(daemon=True)
        self._fd = os.open(disk, os.O_WRONLY)
        self._chunks, self._stopping = size // CHUNK, threading.Event()
        self.written, self.refused = 0, False

    def run(self) -> None:
        data = os.urandom(CHUNK)
        while not self._stopping.is_set():
            try:
                os.pwrite(self._fd, data, self.written % self._chunks * CHUNK)
            except OSError:
                self.refused = True
                return
            self.written += 1

    def stop(self) -> None:
        self._stopping.set()
        self.join()
        os.close(self._fd)


@contextmanager
def load(disk: Path, size: int = LOAD_BYTES) -> Iterator[Load]:
    made = Load(disk, size)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def mount(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[tuple[Mount, Control]]:
    made = fuse(tmp_path / "disk.img")
    made.mount("--create", "64MiB")
    yield made, Control(made.state / "control", True)


def test_held_writes_go_on_when_the_guest_is_set_free(mount: tuple[Mount, Control]) -> None:
    made, control = mount
    # A second for each chunk that is touched first.
    slow_down(control, CHUNK, 3600)
    assert slowed_to(control) == made.status()["slowed_to"] == CHUNK
    with load(made.disk(), 32 << 20) as guest:
        wait_for(lambda: guest.written >= 2, "some writes pass")
        # Threads that answer reads hold no writes in their hands.
        with made.disk().open("rb") as disk:
            for offset in range(0, 32 << 20, 1 << 20):
                os.pread(disk.fileno(), 4096, offset)
        assert guest.written < 32
        let_go(control)
        assert slowed_to(control) is made.status()["slowed_to"] is None
        before = guest.written
        # At the rate from before it would take minutes.
        wait_for(lambda: guest.written > before + 400, "it is free")


def test_what_a_pass_sends_anyway_costs_nothing(mount: tuple[Mount, Control]) -> None:
    made, control = mount
    slow_down(control, CHUNK, 3600)
    with load(made.disk(), CHUNK) as guest:
        wait_for(lambda: guest.written > 400, "one chunk is written again and again")
        assert slowed_to(control) == CHUNK


def test_a_lease_that_is_not_renewed_ends(mount: tuple[Mount, Control]) -> None:
    made, control = mount
    slow_down(control, CHUNK, 1)
    with load(made.disk(), 32 << 20) as guest:
        wait_for(lambda: guest.written > 400, "the lease has run out")
        assert slowed_to(control) is made.status()["slowed_to"] is None


def test_steps_are_taken_only_while_passes_do_not_shrink(tmp_path: Path) -> None:
    control = Control.create(tmp_path / "control", 1)
    held = Slowing(control, 300)
    for left in (10_000, 6_000, 4_000):
        held.step(left, 1000.0, 2000.0)
        assert held.rate is slowed_to(control) is None
    rates = []
    for left in (3_900, 3_900, 3_900):
        held.step(left, 1000.0, 2000.0)
        rates.append(slowed_to(control))
    assert rates == [500, 300, 300]
    held.let_go()
    assert slowed_to(control) is None


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path)
    run("replicator", "set", "--bandwidth", "2MiB", made.mountpoint)
    yield made
    made.close()


def status(pair: Pair) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        run("fusedisk", "status", "--json", pair.mountpoint).stdout
    )
    return found


def cut_over(pair: Pair, *options: str) -> subprocess.CompletedProcess[str]:
    words = ("--max-downtime", "700", "--json", *options, pair.mountpoint)
    return run("replicator", "cutover", *words, check=False)


SLOWLY = ("--slow-guest", "--slow-floor", "128KiB")


def test_a_guest_that_outruns_the_link_is_slowed_and_moves(pair: Pair) -> None:
    with load(pair.mountpoint / "disk.img") as guest:
        # Long enough for a pass that is under way, after which it begins.
        refused = cut_over(pair, "--timeout", "10")
        assert refused.returncode == 3
        assert "writes faster than the link" in refused.stderr, refused.stderr
        assert status(pair)["slowed_to"] is None
        # Rolled back after it was slowed: it has its speed again.
        back = cut_over(pair, *SLOWLY, "--before", f"touch {pair.store / 'reached'} && false")
        assert back.returncode == 1 and (pair.store / "reached").exists(), back.stderr
        assert status(pair)["slowed_to"] is None
        before = guest.written
        wait_for(lambda: guest.written > before + 200, "the guest is free")
        moved = cut_over(pair, *SLOWLY)
        assert moved.returncode == 0, moved.stderr
        # What is bounded ends with the promotion, and the syncs of its records come after.
        assert json.loads(moved.stdout)["predicted_ms"] <= 700
        wait_for(lambda: guest.refused, "the source is fenced")
    assert pair.replica.read_bytes() == pair.image.read_bytes()


def test_the_guest_of_a_killed_sender_is_free(pair: Pair) -> None:
    with load(pair.mountpoint / "disk.img") as guest:
        # A bound that nothing can keep.
        command = subprocess.Popen(
            [
                *(BIN / "replicator", "cutover", *SLOWLY, "--max-downtime", "1"),
                *("--timeout", "60", pair.mountpoint),
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: status(pair)["slowed_to"], "the guest is slowed")
            pair.sender.kill()
            pair.sender.wait()
            wait_for(lambda: not status(pair)["slowed_to"], "the lease ends", LEASE_SECONDS + 10)
            before = guest.written
            wait_for(lambda: guest.written > before + 200, "the guest is free")
        finally:
            command.wait(60)
