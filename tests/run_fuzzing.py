"""The fuzzer of the protocol from the command line: see tests/wire_fuzzing.py."""

import argparse
import sys
import traceback

from wire_fuzzing import check_input


def main() -> int:
    """Run inputs; the seed of one that fails is printed and makes it again."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; then one up")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.inputs):
        try:
            check_input(seed)
        except Exception:
            traceback.print_exc()
            print(f"failed: scripts/fuzz --inputs 1 --seed {seed}")
            return 1
    print(f"{options.inputs} inputs, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
