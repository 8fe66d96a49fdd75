"""Run the crash simulation over a range of seeds: `scripts/simulate-store --seeds N`."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from store_simulation import Simulation, Wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate-store", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--samples", type=int, default=1, help="power losses for each operation")
    options = parser.parse_args()
    shared_memory = Path("/dev/shm")
    begun, crashes, continued, compared = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        for seed in range(options.first, options.first + options.seeds):
            simulation = Simulation(Path(name), seed, options.samples)
            try:
                simulation.run()
            except Wrong as wrong:
                print(wrong, file=sys.stderr)
                return 1
            crashes += simulation.crashes
            continued += simulation.continued
            compared += simulation.compared
    seconds = time.monotonic() - begun
    print(
        f"{options.seeds} seeds, {crashes} crashes, {continued} passes and "
        f"{compared} comparisons went on, "
        f"{seconds:.1f} s: none left a mixture"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
