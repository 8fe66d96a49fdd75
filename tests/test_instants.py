"""Every committed epoch is one instant of all disks, shown by writes in a known order.

Each write begins only after the one before it, anywhere on two disks, was acknowledged. So an
instant shows the writes up to some number and none after it; a gap would be a mixture.
"""

import itertools
import json
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Mount, wait_for
from test_replication import CHUNK, REPLICATOR, SIZES, Pair, guest_write

from replicator.files import Files
from replicator.journal import journal_directory

SECTORS = [size // 512 for size in SIZES]
SECTOR_BYTES = 512


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]):
    made = Pair(tmp_path, fuse)
    yield made
    for process in made.processes:
        process.kill()


class Change(NamedTuple):
    """A sector got its number, or became a hole."""

    disk: int
    sector: int
    hole: bool


class OrderedWriters:
    """Threads that number their changes: one at a time, on any disk, some of them discards."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self._pair = pair
        self._noise = random.Random(seed)
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self.history: list[Change] = []
        self._threads = [threading.Thread(target=self._write) for _ in range(4)]

    def __enter__(self) -> "OrderedWriters":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _write(self) -> None:
        files = Files()
        fds = [os.open(self._pair.mount.disk(i), os.O_RDWR) for i in range(2)]
        try:
            while not self._stop.is_set():
                with self._turn:
                    disk = self._noise.randrange(2)
                    sector = self._noise.randrange(SECTORS[disk])
                    hole = self._noise.random() < 0.2
                    record = struct.pack("<8sQ", b"ordered!", len(self.history) + 1)
                    self.history.append(Change(disk, sector, hole))
                    at = sector * SECTOR_BYTES
                    if hole:
                        files.punch(fds[disk], at, SECTOR_BYTES)
                    else:
                        os.pwrite(fds[disk], record.ljust(SECTOR_BYTES, b"."), at)
        finally:
            for fd in fds:
                os.close(fd)


def shown(folder: Path) -> dict[tuple[int, int], int]:
    """The number in each sector that was written in order."""
    found = {}
    for disk in range(2):
        content = (folder / f"disk{disk}.img").read_bytes()
        for sector in range(SECTORS[disk]):
            magic, number = struct.unpack_from("<8sQ", content, sector * SECTOR_BYTES)
            if magic == b"ordered!":
                found[disk, sector] = number
    return found


def is_prefix(found: dict[tuple[int, int], int], history: list[Change]) -> bool:
    """Whether the numbers are those after some of the changes; discards show by what they took."""
    newest = max(found.values(), default=0)
    expected: dict[tuple[int, int], int] = {}
    for number, change in enumerate(history, 1):
        if number > newest and found == expected:
            return True
        if number > newest and not change.hole:
            return False
        if change.hole:
            expected.pop(change[:2], None)
        else:
            expected[change[:2]] = number
    return found == expected


def points(pair: Pair) -> list[int]:
    result = subprocess.run(
        [REPLICATOR, "points", "--json", str(pair.store / "r")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [point["id"] for point in json.loads(result.stdout)["points"]]


def test_every_point_shows_a_prefix_of_the_order_of_writes(pair: Pair) -> None:
    receiver = pair.run("receive", "--store", pair.store, "--keep", "40", pair.address)
    wait_for(lambda: receiver.out.read_text().endswith("\n"), "the receiver listens")
    pair.address = receiver.out.read_text().removeprefix("listening on ").strip()
    with OrderedWriters(pair, seed=7) as writers:
        pair.start()
        wait_for(lambda: (pair.store / "r/.fusedisk/manifest.json").exists(), "it is filled")
        wait_for(lambda: len(points(pair)) >= 12, "there are points")
        # Nothing of this may depend on the sender ending in order.
        pair.processes[-1].kill()
    pair.processes[0].kill()
    newest = []
    for point in points(pair):
        folder = pair.tmp_path / f"point{point}"
        result = subprocess.run(
            [REPLICATOR, "restore", str(pair.store / "r"), str(folder), "--point", str(point)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        found = shown(folder)
        newest.append(max(found.values(), default=0))
        assert is_prefix(found, writers.history), f"point {point} is a mixture"
    assert len(newest) >= 12
    assert newest == sorted(newest) and newest[-1] > newest[0]
    assert all(a < b for a, b in itertools.pairwise(newest)), "the writers stood still"


def test_once_ends_with_one_instant_under_constant_writing(pair: Pair) -> None:
    pair.receive()
    with OrderedWriters(pair, seed=8) as writers:
        wait_for(lambda: len(writers.history) > 100, "there is something to copy")
        pair.once()
    pair.processes[0].kill()
    found = shown(pair.store / "r")
    assert is_prefix(found, writers.history)
    assert max(found.values()) > 100


def test_a_full_spill_costs_another_round_and_never_a_mixture(pair: Pair) -> None:
    pair.receive()
    pair.once()
    for disk, size in enumerate(SIZES):
        guest_write(pair.mount.disk(disk), b"everything is dirty" * (size // 19), 0)
    sender = pair.start("--spill", "1MiB", "--bandwidth", "2MiB")
    with OrderedWriters(pair, seed=11) as writers:
        wait_for(lambda: "the spill is full" in sender.said, "the capture is given up")
        assert pair.status()["given_up"]["captures"] > 0
        text = subprocess.run(
            [REPLICATOR, "status", str(pair.mount.mountpoint)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        assert "captures given up: the spill is full" in text and "spill" in text
    wait_for(lambda: pair.status()["lag"]["chunks"] == 0, "it is caught up", 60)
    assert pair.status()["given_up"]["reason"] is None
    pair.processes[0].kill()
    found = shown(pair.store / "r")
    assert is_prefix(found, writers.history)
    assert pair.identical()


def test_a_pass_that_is_outrun_for_long_is_begun_anew(pair: Pair) -> None:
    pair.receive()
    pair.once()
    for disk, size in enumerate(SIZES):
        guest_write(pair.mount.disk(disk), b"everything is dirty" * (size // 19), 0)
    sender = pair.start("--spill", "1MiB", "--bandwidth", "6MiB")
    journal = journal_directory(pair.store / "r")
    sizes = [0]

    def begun_anew() -> bool:
        for slot in journal.glob("?"):
            with suppress(FileNotFoundError):
                sizes.append(slot.stat().st_size)
        return "the pass is begun anew" in sender.said

    with OrderedWriters(pair, seed=12) as writers:
        wait_for(begun_anew, "the pass is begun anew", 60)
    # Three times the disks, a round more, and what the records have beside their data.
    assert sum(SIZES) < max(sizes) < 5 * sum(SIZES)
    wait_for(lambda: pair.status()["lag"]["chunks"] == 0, "it is caught up", 60)
    pair.processes[0].kill()
    found = shown(pair.store / "r")
    assert is_prefix(found, writers.history)
    assert pair.identical()


def test_a_comparison_of_a_followed_replica_ends_with_one_instant(pair: Pair) -> None:
    pair.receive()
    pair.once()
    pair.mount.crash()
    assert "not trusted" in pair.mount.mount("--distrust")
    with OrderedWriters(pair, seed=9) as writers:
        wait_for(lambda: len(writers.history) > 100, "there is something to copy")
        assert "bytes, because" in pair.once().said
    pair.processes[0].kill()
    found = shown(pair.store / "r")
    assert is_prefix(found, writers.history)


@pytest.mark.parametrize("options", [["--chunk-size", str(4 * CHUNK)], ["--cache", "none"]])
def test_chunk_sizes_and_the_page_cache_do_not_matter_to_an_instant(
    tmp_path: Path, fuse: Callable[..., Mount], options: list[str]
) -> None:
    pair = Pair(tmp_path, fuse)
    try:
        pair.mount.unmount()
        pair.mount.mount(*options)
        pair.receive()
        with OrderedWriters(pair, seed=10) as writers:
            wait_for(lambda: len(writers.history) > 100, "there is something to copy")
            pair.once()
        pair.processes[0].kill()
        found = shown(pair.store / "r")
        assert is_prefix(found, writers.history)
    finally:
        for process in pair.processes:
            process.kill()
