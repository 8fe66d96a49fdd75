"""What the activity log costs a guest: writes to regions on record, first writes, a wide disk.

The server without a log is one that found it damaged, and gave it up.
"""

import contextlib
import json
import mmap
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import GIB, MIB, Bench, bench, scratch_parser, table, wait_for
from fio import engine, fio, make_image, ratio, settle

from fusedisk.activityfile import REGION_BYTES, first_regions, parse

BLOCK = 4096


def written(here: Bench, how: str, seconds: int) -> float:
    """Random writes a second in the first 256 MiB."""
    words = [f"--ioengine={how}", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based"]
    words += ["--name=guest", f"--filename={here.disk}", "--size=256m", f"--runtime={seconds}"]
    return float(fio(*words)[0]["write"]["iops"])


@contextlib.contextmanager
def direct(disk: Path) -> Iterator[tuple[int, mmap.mmap]]:
    """A descriptor for direct I/O, and a block for it."""
    fd = os.open(disk, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as block:
            block[:] = os.urandom(BLOCK)
            yield fd, block
    finally:
        os.close(fd)


def first_writes(here: Bench, regions: range) -> list[float]:
    """How long a write into each of these regions takes, in ms."""
    found = []
    with direct(here.disk) as (fd, block):
        for region in regions:
            begun = time.monotonic()
            os.pwrite(fd, block, region * REGION_BYTES)
            found.append((time.monotonic() - begun) * 1000)
    return found


def durable_writes(here: Bench) -> int:
    """How often the log's file was written: the sum of its blocks' sequence numbers."""
    record = json.loads((here.state / "mount.json").read_text())
    return sum(parse((here.state / "activity").read_bytes(), record["generation"]).sequences)


def without_log(here: Bench) -> None:
    """Mount, then let a server follow that finds the log damaged."""
    here.mount()
    server = json.loads((here.state / "pids.json").read_text())["server"]
    log = here.state / "activity"
    log.write_bytes(b"")
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not log.exists(), "a server has given the log up", 60)


def compare(scratch: Path, rounds: int, seconds: int) -> None:
    """Writes to regions on record and first writes, in turn with the log and without."""
    speeds: list[list[float]] = [[], []]
    waits: list[list[float]] = [[], []]
    with bench(scratch) as logged, bench(scratch) as bare:
        for here in (logged, bare):
            make_image(here.image, GIB)
            settle(here.image, drop=True)
        logged.mount()
        without_log(bare)
        how = engine(scratch)
        for number in range(rounds):
            # Who is first changes, so that neither gains by it.
            for which in (0, 1) if number % 2 else (1, 0):
                speeds[which].append(written((logged, bare)[which], how, seconds))
        regions = range(256 * MIB // REGION_BYTES, GIB // REGION_BYTES)
        for which in (0, 1):
            waits[which] = first_writes((logged, bare)[which], regions)
    ratios = [a / b for a, b in zip(*speeds, strict=True)]
    rows = [
        ["4 KiB random writes a second"]
        + [f"{statistics.median(found):,.0f}" for found in speeds]
        + [f"{ratio(*speeds):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"],
        ["first write into a region, median (ms)"]
        + [f"{statistics.median(found):.2f}" for found in waits]
        + [f"{statistics.median(waits[0]) / statistics.median(waits[1]):.0f}"],
        [f"the longest of {len(regions)} (ms)", *(f"{max(found):.1f}" for found in waits), ""],
    ]
    table([f"{rounds} rounds of {seconds} s", "with the log", "without", "ratio"], rows)


def wide(scratch: Path, gib: int, seconds: int, rate: int) -> None:
    """A guest that writes slowly all over a wide disk: how often it waits for the record."""
    noise = random.Random(1)
    regions = first_regions([gib * GIB])[-1]
    writes = seconds * rate
    with bench(scratch) as here:
        with here.image.open("wb") as file:
            file.truncate(gib * GIB)
        here.mount()
        before, touched = durable_writes(here), set()
        with direct(here.disk) as (fd, block):
            for _ in range(writes):
                region = noise.randrange(regions)
                touched.add(region)
                os.pwrite(fd, block, region * REGION_BYTES)
                time.sleep(1 / rate)
        found = durable_writes(here) - before
    print(
        f"\n{writes} writes at {rate} a second, at random over {regions} regions ({gib} GiB), of "
        f"which they touched {len(touched)}: the log was written {found} times"
    )


def main() -> None:
    """Measure and print."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=1, help="of each run")
    parser.add_argument("--gib", type=int, default=12, help="size of the wide disk")
    parser.add_argument("--wide-seconds", type=int, default=60)
    parser.add_argument("--rate", type=int, default=50, help="writes a second on the wide disk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench-", dir=arguments.scratch) as scratch:
        compare(Path(scratch), arguments.rounds, arguments.seconds)
    wide(arguments.scratch, arguments.gib, arguments.wide_seconds, arguments.rate)


if __name__ == "__main__":
    main()
