"""Speed of a guest's direct I/O: this project, QEMU's FUSE export, and the limits on both sides."""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from common import GIB, scratch_parser, table
from fio import fio, images, ratio, read_through, served, settle
from freememory import little_free, recall, room_to_dirty
from systems import SYSTEMS, USUAL

# Name, fio's pattern, block size, depth.
Load = tuple[str, str, str, int]
# A load, the name of a system, and I/Os a second.
Run = tuple[Load, str, float]
LOADS: list[Load] = [
    ("4 KiB random read, depth 1", "randread", "4k", 1),
    ("4 KiB random read, depth 16", "randread", "4k", 16),
    ("4 KiB random write, depth 1", "randwrite", "4k", 1),
    ("4 KiB random write, depth 16", "randwrite", "4k", 16),
    ("1 MiB sequential read", "read", "1m", 4),
    ("1 MiB sequential write", "write", "1m", 4),
    ("1 MiB random read, depth 8", "randread", "1m", 8),
]
# Of a cached image the last one is as the fifth.
CACHED_LOADS = LOADS[:6]
OURS, PEER, LIMIT = "fusedisk", "QEMU", "null server"


def measure(disk: Path, size: int, how: str, load: Load, seconds: int) -> float:
    """One run of fio; I/Os a second."""
    _, pattern, block, depth = load
    words = [f"--ioengine={how}", f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}"]
    words += ["--name=guest", f"--filename={disk}", f"--size={size}", "--time_based"]
    job = fio(*words, f"--runtime={seconds}")[0]
    return float(job["read" if "read" in pattern else "write"]["iops"])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each run")
    parser.add_argument("--gib", type=int, default=1, help="size of the image")
    parser.add_argument("--cache", choices=("writeback", "none"), default="writeback")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="serve each anew for each run, with its image out of the page cache",
    )
    parser.add_argument("--systems", help="some of them, separated by commas")
    parser.add_argument("--loads", help="some of them, by number from 1, separated by commas")
    return parser.parse_args()


def warm_runs(arguments: argparse.Namespace, names: list[str], loads: list[Load]) -> Iterator[Run]:
    """All are served at once and read through, so that those compared run seconds apart."""
    size = arguments.gib * GIB
    with (
        served(arguments.scratch, names, size, arguments.cache) as (disks, how),
        little_free(room_to_dirty(size)),
    ):
        for load, name in itertools.product(loads * arguments.rounds, names):
            # Again, since other work on the machine may have taken the cache away.
            read_through(disks[name].path)
            recall(size)
            yield load, name, measure(disks[name].path, size, how, load, arguments.seconds)
            settle(disks[name].image)


def cold_runs(arguments: argparse.Namespace, names: list[str], loads: list[Load]) -> Iterator[Run]:
    """Each is served anew: pages that a server has mapped could not be taken from the cache."""
    size = arguments.gib * GIB
    with images(arguments.scratch, names, size) as (copies, how), little_free(room_to_dirty(size)):
        for load, name in itertools.product(loads * arguments.rounds, names):
            image = copies[name]
            settle(image, drop=True)
            recall(2 * size)
            with SYSTEMS[name](image, image.parent, arguments.cache) as disk:
                yield load, name, measure(disk, size, how, load, arguments.seconds)


def main() -> None:
    """Measure each system in turn, load by load and round after round, and print medians."""
    arguments = parse()
    names = arguments.systems.split(",") if arguments.systems else USUAL
    loads = LOADS if arguments.cold or arguments.cache == "none" else CACHED_LOADS
    if arguments.loads:
        loads = [LOADS[int(number) - 1] for number in arguments.loads.split(",")]
    seen: dict[tuple[str, str], list[float]] = {}
    for load, name, speed in (cold_runs if arguments.cold else warm_runs)(arguments, names, loads):
        seen.setdefault((load[0], name), []).append(speed)
        print(f"{name}: {load[0]}: {speed:,.0f}", file=sys.stderr)
    ratios = [other for other in (PEER, LIMIT) if other in names and OURS in names]
    rows = []
    for load in loads:
        runs = {name: seen[load[0], name] for name in names}
        unit = "MiB/s" if load[2] == "1m" else "IOPS"
        rows.append(
            [f"{load[0]} ({unit})"]
            + [f"{statistics.median(runs[name]):,.0f}" for name in names]
            + [f"{ratio(runs[OURS], runs[other]):.2f}" for other in ratios]
        )
    state = f"cache {arguments.cache}, {'cold' if arguments.cold else 'warm'}"
    print(f"fio, {arguments.rounds} rounds of {arguments.seconds} s, {state}, medians\n")
    table(["load", *names, *(f"{OURS} / {other}" for other in ratios)], rows)


if __name__ == "__main__":
    main()
