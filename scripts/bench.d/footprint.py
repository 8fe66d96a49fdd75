"""What a mount takes: memory of its processes, and room of the change map of a disk of many TiB."""

import json
import os
import random
import time
from pathlib import Path

from common import MIB, TIB, bench, run, scratch_parser, table, wait_for


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(pid: int, field: str) -> str:
    """A figure of /proc/PID/smaps_rollup (kB there), in MiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return f"{int(line.split()[1]) / 1024:.1f}"
    raise SystemExit(f"process {pid} is gone")


def main() -> None:
    """Write a little of a large disk, then look at what that takes."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--tib", type=int, default=15, help="ext4 ends just below 16")
    parser.add_argument("--writes", type=int, default=1000, help="of 4 KiB, at random places")
    arguments = parser.parse_args()
    size, noise = arguments.tib * TIB, random.Random(1)
    with bench(arguments.scratch) as here:
        with here.image.open("wb") as file:
            file.truncate(size)
        here.mount()
        disk = os.open(here.disk, os.O_WRONLY)
        for _ in range(arguments.writes):
            os.pwrite(disk, b"x" * 4096, noise.randrange(size // 4096) * 4096)
        os.fsync(disk)
        os.close(disk)
        status = json.loads(run("fusedisk", "status", "--json", here.mountpoint))
        keeper, server = status["keeper"]["pid"], status["server"]["pid"]
        wait_for(lambda: len(children(keeper)) == 2, "the spare server is there", 60)
        spare = next(pid for pid in children(keeper) if pid != server)
        # The spare goes on loading its code for a moment.
        time.sleep(2)
        rows = [
            [name, memory(pid, "Rss"), memory(pid, "Pss"), memory(pid, "Private_Dirty")]
            for name, pid in (("server", server), ("spare server", spare), ("keeper", keeper))
        ]
        room = (here.state / "0.map").stat().st_blocks * 512 / MIB
    table(["process", "RSS (MiB)", "PSS (MiB)", "private (MiB)"], rows)
    writes = f"{arguments.writes} writes of 4 KiB at random places"
    print(f"\nchange map of {arguments.tib} TiB after {writes}: {room:.2f} MiB allocated")


if __name__ == "__main__":
    main()
