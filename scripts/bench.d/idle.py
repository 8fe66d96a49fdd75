"""What a replica costs that has nothing to do: processor time and traffic of an idle huge disk."""

import json
import os
import time
from pathlib import Path

from common import TIB, bench, scratch_parser, table, wait_for

PERCENT_MAX = 2.0
"""Of one processor, all processes together."""


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, in user and kernel mode."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print; fails where idling is not cheap."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--tib", type=int, default=15, help="ext4 ends just below 16")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rpo", default="5")
    arguments = parser.parse_args()
    with bench(arguments.scratch) as here:
        with here.image.open("wb") as file:
            file.truncate(arguments.tib * TIB)
        here.mount()
        receiver = here.receive()
        sender = here.spawn(
            "start", "--name", "r", "--rpo", arguments.rpo, here.mountpoint, here.address
        )
        wait_for(lambda: here.status().get("state") == "following", "it follows")
        pids = json.loads((here.state / "pids.json").read_text())
        watched = {"sender": sender.pid, "receiver": receiver.pid}
        watched |= {name: pids[name] for name in ("server", "keeper")}
        before = {name: cpu_seconds(pid) for name, pid in watched.items()}
        sent = here.status()["sent"]["bytes"]
        time.sleep(arguments.seconds)
        status = here.status()
        used = {name: cpu_seconds(pid) - before[name] for name, pid in watched.items()}
    rows = [
        [name, f"{seconds:.2f}", f"{100 * seconds / arguments.seconds:.2f}"]
        for name, seconds in [*used.items(), ("all", sum(used.values()))]
    ]
    of = f"idle image of {arguments.tib} TiB, {arguments.seconds:g} s, --rpo {arguments.rpo}"
    table([of, "CPU seconds", "percent of a processor"], rows)
    traffic, age = status["sent"]["bytes"] - sent, status["rpo"]["age"]
    print(f"{traffic} bytes sent; age of the point {age:.1f} s")
    if sum(used.values()) > PERCENT_MAX / 100 * arguments.seconds:
        raise SystemExit(f"idling takes more than {PERCENT_MAX} percent of a processor")


if __name__ == "__main__":
    main()
