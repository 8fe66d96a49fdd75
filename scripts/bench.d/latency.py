"""A guest's 4 KiB write latency without a replica, while one fills and while it follows.

Beside a QEMU mirror in the same three states, in turn. The guest writes at a fixed rate that both
can follow; filling goes as fast as it can.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import GIB, clean_up_when_terminated, scratch_parser, table, wait_for
from fio import make_image
from replicated import Replicated, directly, mirrored, ours

_STATES = ("idle", "filling", "following")


def measure(disk: Replicated, rate: int, seconds: float) -> dict[str, dict[str, Any]]:
    """What fio says of the writes in each state."""
    words = (f"--rate_iops={rate}", "--time_based", f"--runtime={int(1000 * seconds)}ms")
    found = {"idle": disk.write(*words)}
    disk.begin()
    found["filling"] = disk.write(*words)
    if not disk.filling():
        raise SystemExit("the fill ended while it was measured: give --gib more, or --seconds less")
    wait_for(lambda: not disk.filling(), "it follows", 60)
    found["following"] = disk.write(*words)
    return found


def microseconds(write: dict[str, Any], percentile: str) -> float:
    """A percentile of the time that a write took to complete."""
    value: float = write["clat_ns"]["percentile"][percentile] / 1000
    return value


def main() -> None:
    """Measure in turn and print medians."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--gib", type=int, default=4, help="size of the disk, all of it data")
    parser.add_argument("--iops", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    clean_up_when_terminated()
    found: dict[str, list[dict[str, dict[str, Any]]]] = {"fusedisk": [], "QEMU mirror": []}
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench-", dir=arguments.scratch) as made:
        image = Path(made) / "disk.img"
        make_image(image, arguments.gib * GIB)
        for _ in range(arguments.rounds):
            for name, measured in found.items():
                with tempfile.TemporaryDirectory(dir=made) as folder:
                    serving = (
                        ours(Path(folder), image, "64KiB", directly)
                        if name == "fusedisk"
                        else mirrored(Path(folder), image, directly)
                    )
                    with serving as disk:
                        measured.append(measure(disk, arguments.iops, arguments.seconds))
    rows = []
    for state in _STATES:
        for name, measured in found.items():
            row = [state, name]
            for percentile in ("50.000000", "99.000000"):
                times = [microseconds(one[state], percentile) for one in measured]
                row.append(f"{statistics.median(times):.0f}")
            rows.append(row)
    table([f"{arguments.iops} writes/s", "", "p50 (us)", "p99 (us)"], rows)


if __name__ == "__main__":
    main()
