"""Predicted against real downtime of cutovers under 4 KiB random writes, unthrottled or paced."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import BIN, MIB, Bench, bench, run, scratch_parser, table, wait_for

_WRITE_BYTES = 4096
_TIMEOUT_SECONDS = 20
# Writes a second, None for as many as there can be; and whether the cutover may slow them.
_LOADS: dict[str, tuple[int | None, bool]] = {
    "unthrottled": (None, False),
    "unthrottled, --slow-guest": (None, True),
    "500 writes/s": (500, False),
}


class Guest(threading.Thread):
    """Writes at random; keeps the longest time that one write took, and stops when refused."""

    def __init__(self, disk: Path, size: int, rate: int | None, seed: int) -> None:
        super().__init__(daemon=True)
        self._fd = os.open(disk, os.O_WRONLY)
        self._size, self._rate, self._random = size, rate, random.Random(seed)
        self._stopping = threading.Event()
        self.stall_seconds = 0.0
        self.refused = False

    def run(self) -> None:
        """Until `stop` or a refusal; with a rate, that many writes a second."""
        begun, number = time.monotonic(), 0
        while not self._stopping.is_set():
            before = time.monotonic()
            try:
                os.pwrite(
                    self._fd,
                    os.urandom(_WRITE_BYTES),
                    self._random.randrange(self._size // _WRITE_BYTES) * _WRITE_BYTES,
                )
            except OSError:
                self.refused = True
                return
            self.stall_seconds = max(self.stall_seconds, time.monotonic() - before)
            number += 1
            if self._rate and (ahead := begun + number / self._rate - time.monotonic()) > 0:
                time.sleep(ahead)

    def stop(self) -> None:
        """End the thread and close the disk."""
        self._stopping.set()
        self.join()
        os.close(self._fd)


@contextmanager
def guest(here: Bench, size: int, rate: int | None, seed: int) -> Iterator[Guest]:
    """A guest that writes while the block lasts."""
    made = Guest(here.disk, size, rate, seed)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def cut_over(
    arguments: Any, rate: int | None, slowly: bool, seed: int
) -> tuple[int, dict[str, Any], float]:
    """(exit status, the answer, seconds it took) of one cutover of a disk of its own."""
    size = arguments.mib * MIB
    with bench(arguments.scratch) as here:
        here.image.write_bytes(os.urandom(size))
        here.mount()
        here.receive()
        here.spawn("start", "--name", "r", "--rpo", "0.5", here.mountpoint, here.address)
        wait_for(lambda: here.status().get("state") == "following", "the first fill is done")
        run("replicator", "set", "--bandwidth", arguments.bandwidth, here.mountpoint)
        with guest(here, size, rate, seed):
            time.sleep(1)
            begun = time.monotonic()
            result = subprocess.run(
                [
                    *(BIN / "replicator", "cutover", "--json", "--max-downtime"),
                    *(str(arguments.max_downtime), "--timeout", str(_TIMEOUT_SECONDS)),
                    *(["--slow-guest"] if slowly else []),
                    here.mountpoint,
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.monotonic() - begun
        if result.returncode not in (0, 3):
            raise SystemExit(f"cutover failed: {result.stderr}")
        answer = json.loads(result.stdout.splitlines()[-1])
        told = [answer.get(key) for key in ("outcome", "predicted_ms", "downtime_ms")]
        # So that a long series can be measured in parts.
        print(f"seed {seed}, {rate} writes/s, slowed {slowly}:", *told, flush=True, file=sys.stderr)
        return result.returncode, answer, seconds


def main() -> None:
    """Measure and print; fails where a downtime was longer than the bound."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--runs", type=int, default=5, help="for each load")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--bandwidth", default="none", metavar="RATE", help="of the link")
    parser.add_argument("--load", choices=list(_LOADS), help="only this one")
    parser.add_argument("--mib", type=int, default=128, help="size of the disk")
    parser.add_argument("--max-downtime", type=int, default=1000, metavar="MS")
    arguments = parser.parse_args()
    rows, late = [], 0
    seeds = range(arguments.first, arguments.first + arguments.runs)
    for load, (rate, slowly) in _LOADS.items():
        if arguments.load not in (None, load):
            continue
        answers = [cut_over(arguments, rate, slowly, seed) for seed in seeds]
        done = [(answer, seconds) for code, answer, seconds in answers if code == 0]
        real = sorted(answer["downtime_ms"] for answer, _ in done)
        predicted = sorted(answer["predicted_ms"] for answer, _ in done)
        ratios = sorted(a["downtime_ms"] / a["predicted_ms"] for a, _ in done)
        late += sum(ms > arguments.max_downtime for ms in real)
        if not done:
            rows.append([load, f"0 of {arguments.runs}", *["-"] * 5])
            continue
        middle = len(done) // 2
        rows.append(
            [
                load,
                f"{len(done)} of {arguments.runs}",
                f"{predicted[middle]:.0f} ({predicted[0]:.0f} to {predicted[-1]:.0f})",
                f"{real[middle]:.0f} ({real[0]:.0f} to {real[-1]:.0f})",
                f"{ratios[middle]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{sum(ms > arguments.max_downtime for ms in real)}",
                f"{sorted(seconds for _, seconds in done)[middle]:.1f}",
            ]
        )
    table(
        [
            *("guest", "promoted", "predicted ms", "real ms", "real / predicted"),
            *("over the bound", "seconds in all"),
        ],
        rows,
    )
    if late:
        sys.exit("a downtime was longer than --max-downtime")


if __name__ == "__main__":
    main()
