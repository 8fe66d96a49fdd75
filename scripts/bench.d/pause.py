"""How long a direct 4 KiB write takes at most while the server is killed, a spare one ready."""

import json
import mmap
import os
import random
import signal
import statistics
import threading
import time
from pathlib import Path

from common import MIB, bench, scratch_parser, table, wait_for
from footprint import children

_SIZE = 64 * MIB
_BLOCK = 4096


class Writer(threading.Thread):
    """Writes at random places, one after the other; ``longest`` is what the owner resets."""

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self._fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
        self.stopping = threading.Event()
        self.longest, self.count = 0.0, 0

    def run(self) -> None:
        """Until it is told to stop. Raises OSError at an error, which there must not be."""
        chance, block = random.Random(1), mmap.mmap(-1, _BLOCK)
        while not self.stopping.is_set():
            begun = time.monotonic()
            os.pwrite(self._fd, block, chance.randrange(_SIZE // _BLOCK) * _BLOCK)
            self.longest = max(self.longest, time.monotonic() - begun)
            self.count += 1
        os.close(self._fd)


def spare_is_ready(keeper: int, server: int) -> bool:
    """Whether a child of the keeper has loaded its code and waits for the word to begin."""
    spares = [pid for pid in children(keeper) if pid != server]
    return any(Path(f"/proc/{pid}/wchan").read_text().endswith("pipe_read") for pid in spares)


def daemons(state: Path) -> tuple[int, int]:
    """Process ids of keeper and server."""
    pids = json.loads((state / "pids.json").read_text())
    return pids["keeper"], pids["server"]


def main() -> None:
    """Kill one server after another; median and longest of the pauses."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    pauses = []
    with bench(arguments.scratch) as here:
        with here.image.open("wb") as file:
            file.truncate(_SIZE)
        here.mount()
        writer = Writer(here.disk)
        writer.start()
        try:
            for _ in range(arguments.kills):
                keeper, server = daemons(here.state)
                wait_for(lambda k=keeper, s=server: spare_is_ready(k, s), "a spare is ready", 60)
                before, writer.longest = writer.count, 0.0
                os.kill(server, signal.SIGKILL)
                wait_for(lambda n=before: writer.count > n + 100, "the guest goes on", 60)
                wait_for(lambda s=server: daemons(here.state)[1] != s, "the next is named", 60)
                pauses.append(1000 * writer.longest)
        finally:
            writer.stopping.set()
            writer.join()
    head = [f"{arguments.kills} kills with a spare server ready", "median", "longest"]
    table(head, [["pause (ms)", f"{statistics.median(pauses):.0f}", f"{max(pauses):.0f}"]])


if __name__ == "__main__":
    main()
