"""Replicate through faults by seed: `scripts/simulate --seeds N`."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from session_simulation import SessionSimulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--trace", action="store_true", help="print the trace of each seed")
    parser.add_argument("--go-on", action="store_true", help="do not stop at a seed that fails")
    options = parser.parse_args()
    begun, checks, faults, failed = time.monotonic(), 0, 0, 0
    shared_memory = Path("/dev/shm")
    folder = shared_memory if shared_memory.is_dir() else None
    for seed in range(options.first, options.first + options.seeds):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            simulation = SessionSimulation(Path(name), seed)
            try:
                simulation.run()
            except AssertionError as wrong:
                text = str(wrong)
                print(text.splitlines()[0] if options.go_on else text, file=sys.stderr)
                failed += 1
                if not options.go_on:
                    return 1
        checks, faults = checks + simulation.checks, faults + simulation.faults
        if options.trace:
            print("\n".join(simulation.trace))
    seconds = time.monotonic() - begun
    print(
        f"{options.seeds} seeds, {faults} faults, {checks} looks, {seconds:.1f} s: "
        f"{failed or 'none'} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
