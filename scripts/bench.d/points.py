"""What a pass costs a store against a plain write of the same bytes, and what its points take up.

Each store is on a loop device with a filesystem of its own, whose written sectors are counted. The
file below it is written beforehand and nothing of it is discarded, as with a disk: else whoever
writes to new places, as a journal and a clone do, pays for the room that its filesystem finds too.
"""

import contextlib
import itertools
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash
from common import MIB, scratch_parser, table

from replicator.clones import clone_path
from replicator.exclusive import exclusive_bytes
from replicator.manifest import ReplicaDisk
from replicator.records import Piece
from replicator.replica import Replica
from replicator.store import Store

RUN_BYTES, BATCH_BYTES = 64 << 10, 4 << 20


class Cost(NamedTuple):
    """Of one pass: seconds, bytes that reached the device, and bytes a point takes up."""

    seconds: float
    written: int
    point: float = 0


_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}


@contextlib.contextmanager
def device(scratch: Path, size: int) -> Iterator[Path]:
    """A loop device over a file that is written already."""
    with tempfile.NamedTemporaryFile(prefix="fusedisk-bench-", dir=scratch) as image:
        zeros = bytes(16 * MIB)
        for _ in range(0, size, len(zeros)):
            image.write(zeros)
        image.flush()
        os.fsync(image.fileno())
        attach = ["losetup", "--find", "--show", "--direct-io=on", image.name]
        found = subprocess.run(attach, check=True, capture_output=True, text=True)
        loop = found.stdout.strip()
        try:
            yield Path(loop)
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)


@contextlib.contextmanager
def filesystem(loop: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """Mount a new one; its path, and the statistics of its device."""
    # What it has to say beside errors is for people.
    subprocess.run([*_MAKE[kind], loop], check=True, capture_output=True)
    options = ["-o", "nodiscard"] if kind == "btrfs" else []
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench-") as path:
        subprocess.run(["mount", *options, loop, path], check=True)
        try:
            yield Path(path), Path("/sys/block") / loop.name / "stat"
        finally:
            subprocess.run(["umount", path], check=True)


def written(stat: Path) -> int:
    """Bytes written to a device so far."""
    return int(stat.read_text().split()[6]) * 512


class Load:
    """The same passes for every store."""

    def __init__(self, size: int, count: int, pass_bytes: int) -> None:
        rng = random.Random(1)
        self.size = size
        noise = [rng.randbytes(RUN_BYTES) for _ in range(64)]
        self._noise = [(data, xxhash.xxh3_128_digest(data)) for data in noise]
        places = range(0, size, RUN_BYTES)
        chosen = [rng.sample(places, pass_bytes // RUN_BYTES) for _ in range(count)]
        # In the order of a sender, which reads a disk from its begin to its end.
        self.passes = [sorted(places), *(sorted(each) for each in chosen)]

    def content(self, number: int) -> Iterator[tuple[int, bytes, bytes]]:
        """(offset, data, digest) of a pass; the first one fills the disk."""
        for index, offset in enumerate(self.passes[number]):
            data, digest = self._noise[(index + 7 * number) % len(self._noise)]
            yield offset, data, digest


def plain(loop: Path, kind: str, load: Load) -> list[Cost]:
    """The passes written to a file and synced."""
    costs = []
    with filesystem(loop, kind) as (path, stat):
        fd = os.open(path / "disk", os.O_RDWR | os.O_CREAT)
        for number in range(len(load.passes)):
            os.sync()
            begun, before = time.monotonic(), written(stat)
            for offset, data, _ in load.content(number):
                os.pwrite(fd, data, offset)
            os.fsync(fd)
            costs.append(Cost(time.monotonic() - begun, written(stat) - before))
        os.close(fd)
    return costs[1:]


def replicated(loop: Path, kind: str, load: Load, keep: str) -> list[Cost]:
    """The passes committed to a replica and applied."""
    costs = []
    disks = [ReplicaDisk("disk", load.size, 65536)]
    with (
        filesystem(loop, kind) as (path, stat),
        Store(path, keep=keep) as store,
        Replica.open(store, "r", "source", disks) as replica,
    ):
        for number in range(len(load.passes)):
            os.sync()
            begun, before = time.monotonic(), written(stat)
            replica.begin(number + 1)
            # As a receiver does.
            content = load.content(number)
            while batch := list(itertools.islice(content, BATCH_BYTES // RUN_BYTES)):
                pieces = [Piece(0, at, memoryview(data), digest) for at, data, digest in batch]
                replica.write_many(pieces)
            replica.commit("generation", number + 1)
            replica.apply()
            costs.append(Cost(time.monotonic() - begun, written(stat) - before))
        points = replica.manifest.points
        used = [
            point.undo_bytes
            if point.clone is None
            else exclusive_bytes(clone_path(path / "r", point.clone, 0))
            for point in points[1:-1]
        ]
        point = statistics.mean(used) if used else 0.0
    return [Cost(cost.seconds, cost.written, point) for cost in costs[1:]]


def main() -> None:
    """Measure all stores in turn, round after round, and print medians against the plain write."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=4, help="of each round")
    parser.add_argument("--mib", type=int, default=128, help="of each pass")
    parser.add_argument("--disk", type=int, default=512, help="size of the disk in MiB")
    arguments = parser.parse_args()
    load = Load(arguments.disk * MIB, arguments.passes, arguments.mib * MIB)
    kinds = ("ext4", "xfs", "btrfs")
    costs: dict[tuple[str, str], list[Cost]] = {}
    # Disk, journals or clones of all passes, undo records of them, and what filesystems want free.
    room = 2 * (arguments.disk + (arguments.passes + 2) * arguments.mib) * MIB
    with device(arguments.scratch, room) as loop:
        for _, kind in itertools.product(range(arguments.rounds), kinds):
            costs.setdefault((kind, "plain write"), []).extend(plain(loop, kind, load))
            for keep, what in (("1", "no points"), ("50", "every point kept")):
                found = replicated(loop, kind, load, keep)
                costs.setdefault((kind, what), []).extend(found)
    rows = []
    for (kind, what), found in costs.items():
        base = costs[kind, "plain write"]
        seconds = statistics.median(cost.seconds for cost in found)
        sectors = statistics.median(cost.written for cost in found)
        rows.append(
            [
                *(kind, what, f"{seconds * 1000:.0f}"),
                f"{seconds / statistics.median(cost.seconds for cost in base):.2f}",
                f"{sectors / MIB:.0f}",
                f"{sectors / (arguments.mib * MIB):.2f}",
                f"{found[-1].point / MIB:.0f}" if what.startswith("every") else "",
            ]
        )
    head = ["store", "", "ms a pass", "time ratio", "MiB written", "write ratio", "MiB a point"]
    table(head, rows)


if __name__ == "__main__":
    main()
