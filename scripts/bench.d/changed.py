"""Time to find what changed in a huge disk of which a guest wrote a few chunks."""

import os
import random
import statistics
import time
from collections.abc import Callable

from common import TIB, bench, scratch_parser, table

from replicator.source import Source

_WRITE = b"\1" * 4096


def milliseconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    """Write through the mount, then look as a sender does, in a process of its own."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--tib", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    rows = []
    with bench(arguments.scratch) as here:
        with here.image.open("wb") as file:
            file.truncate(arguments.tib * TIB)
        here.mount()
        disk = os.open(here.disk, os.O_RDWR)
        chunk = 64 << 10
        for one in random.sample(range(arguments.tib * TIB // chunk), arguments.chunks):
            os.pwrite(disk, _WRITE, one * chunk)
        os.close(disk)
        source = Source(here.mountpoint)
        since = source.control.epoch - 1
        looks: dict[str, Callable[[], object]] = {
            "count them": lambda: source.changed_bytes(since),
            "list their ranges": lambda: list(source.changed_ranges(0, since)),
        }
        if len(list(source.changed_ranges(0, since))) != arguments.chunks:
            raise SystemExit("not what was written was found")
        for name, look in looks.items():
            times = [milliseconds(look) for _ in range(arguments.rounds)]
            rows.append([name, f"{statistics.median(times):.2f}", f"{max(times):.2f}"])
        source.close()
    of = f"{arguments.chunks} changed chunks of {arguments.tib} TiB"
    table([of, "median (ms)", f"longest of {arguments.rounds} (ms)"], rows)


if __name__ == "__main__":
    main()
