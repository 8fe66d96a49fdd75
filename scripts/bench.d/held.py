"""A guest's 4 KiB write latency while a capture is held open, as by a link that carries nothing.

Against none, in turn on the same mount. A write to a chunk that the capture has, and that nobody
wrote since, copies the chunk first (spilling); one to a chunk that was copied only looks.
"""

import contextlib
import statistics
from collections.abc import Iterator

from common import MIB, bench, clean_up_when_terminated, run, scratch_parser, table, wait_for
from fio import fio, make_image, read_through
from latency import microseconds

from fusedisk.capture import Capture
from fusedisk.changemap import Control
from replicator.captured import SPILL_BYTES

CHUNK = 64 << 10
_STATES = ("no capture", "held, copied before", "held, spilling")


@contextlib.contextmanager
def held(state: str, control: Control) -> Iterator[Capture]:
    """A capture of all that was written so far; nobody reads it."""
    capture = Capture(state, control, SPILL_BYTES, CHUNK)
    try:
        capture.open(0)
        wait_for(capture.closed, "the epoch is closed")
        yield capture
        if not capture.intact:
            raise SystemExit("the capture was given up while it was measured: give --mib less")
    finally:
        capture.close()


def main() -> None:
    """Measure in turn and print medians."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--mib", type=int, default=512, help="size of the disk, all of it data")
    parser.add_argument("--iops", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    clean_up_when_terminated()
    rate = (f"--rate_iops={arguments.iops}", "--time_based")
    found: dict[str, list[tuple[float, float, int]]] = {state: [] for state in _STATES}
    with bench(arguments.scratch) as here:
        make_image(here.image, arguments.mib * MIB)
        run("fusedisk", "mount", "--chunk-size", str(CHUNK), here.image, here.mountpoint)
        read_through(here.disk)
        control = Control(here.state / "control", True)
        guest = ("--name=guest", "--ioengine=psync", f"--filename={here.disk}")

        def measure(state: str, capture: Capture | None) -> None:
            words = ("--rw=randwrite", "--bs=4k", f"--runtime={int(1000 * arguments.seconds)}ms")
            before = 0 if capture is None else capture.spilled_bytes
            write = fio(*guest, *rate, *words)[0]["write"]
            spilled = 0 if capture is None else capture.spilled_bytes - before
            times = microseconds(write, "50.000000"), microseconds(write, "99.000000")
            found[state].append((*times, spilled // CHUNK))

        # Only what is marked is part of a capture.
        fio(*guest, "--rw=write", "--bs=1m")
        for _ in range(arguments.rounds):
            measure("no capture", None)
            with held(str(here.state), control) as capture:
                measure("held, spilling", capture)
                fio(*guest, "--rw=write", "--bs=1m")
                measure("held, copied before", capture)
    rows = []
    for state, rounds in found.items():
        p50, p99, copied = (statistics.median(each) for each in zip(*rounds, strict=True))
        rows.append([state, f"{p50:.0f}", f"{p99:.0f}", f"{copied:.0f}"])
    table([f"{arguments.iops} writes/s", "p50 (us)", "p99 (us)", "chunks copied"], rows)


if __name__ == "__main__":
    main()
