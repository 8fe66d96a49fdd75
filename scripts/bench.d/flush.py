"""How long a 4 KiB write takes while another thread flushes after every 32 MiB it wrote."""

import statistics
import sys

from common import GIB, scratch_parser, table
from fio import fio, ratio, served, settle

NAMES = ["fusedisk", "QEMU"]


def main() -> None:
    """Measure in turn, round after round, and print medians."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each run")
    arguments = parser.parse_args()
    latencies: dict[str, list[float]] = {name: [] for name in NAMES}
    speeds: dict[str, list[float]] = {name: [] for name in NAMES}
    with served(arguments.scratch, NAMES, GIB) as (disks, how):
        for _ in range(arguments.rounds):
            for name in NAMES:
                writer, flusher = fio(
                    *(f"--ioengine={how}", f"--filename={disks[name].path}", "--time_based"),
                    *(f"--runtime={arguments.seconds}", "--size=512m", "--iodepth=1"),
                    *("--name=writer", "--rw=randwrite", "--bs=4k"),
                    *("--name=flusher", "--rw=write", "--bs=1m", "--fsync=32", "--offset=512m"),
                )
                settle(disks[name].image)
                nanoseconds = writer["write"]["clat_ns"]["percentile"]["99.000000"]
                latencies[name].append(nanoseconds / 1e6)
                speeds[name].append(flusher["write"]["bw_bytes"] / (1 << 20))
                print(f"{name}: p99 {latencies[name][-1]:.2f} ms", file=sys.stderr)
    medians = [f"{statistics.median(latencies[name]):.2f}" for name in NAMES]
    rows = [
        [
            "p99 of a 4 KiB write (ms)",
            *medians,
            f"{ratio(latencies[NAMES[0]], latencies[NAMES[1]]):.2f}",
        ],
        [
            "flushing writer (MiB/s)",
            *(f"{statistics.median(speeds[name]):.0f}" for name in NAMES),
            f"{ratio(speeds[NAMES[0]], speeds[NAMES[1]]):.2f}",
        ],
    ]
    table(["", *NAMES, "ratio"], rows)


if __name__ == "__main__":
    main()
