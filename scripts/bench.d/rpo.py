"""How old the newest committed point is while a guest writes all the time, against `--rpo`.

What `replicator status --json` says is sampled; each sample above the bound is a miss.
"""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Iterator

from common import MIB, bench, clean_up_when_terminated, scratch_parser, table, wait_for
from fio import make_image

SAMPLE_SECONDS = 0.25


@contextlib.contextmanager
def writing(disk: str, rate: int) -> Iterator[None]:
    """A guest that writes 4 KiB at random places, so many a second, until the block ends."""
    words = ["--rw=randwrite", "--bs=4k", "--direct=1", "--time_based", "--runtime=3600"]
    guest = ["fio", "--name=guest", "--ioengine=psync", f"--filename={disk}", *words]
    process = subprocess.Popen([*guest, f"--rate_iops={rate}"], stdout=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise SystemExit("the guest ended while it was measured")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Follow under load, sample, and print a row."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--mib", type=int, default=1024, help="size of the disk, all of it data")
    parser.add_argument("--rpo", type=float, default=2)
    parser.add_argument("--iops", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--keep", default="12", help="which points the target keeps")
    arguments = parser.parse_args()
    clean_up_when_terminated()
    ages = []
    with bench(arguments.scratch) as here:
        make_image(here.image, arguments.mib * MIB)
        here.mount()
        here.receive("--keep", arguments.keep)
        rpo = f"{arguments.rpo:g}"
        here.spawn("start", "--name", "r", "--rpo", rpo, here.mountpoint, here.address)
        wait_for(lambda: here.status().get("state") == "following", "it follows")
        with writing(str(here.disk), arguments.iops):
            # The fill's own age, and the guest's begin, are no part of it.
            time.sleep(2 * arguments.rpo)
            deadline = time.monotonic() + arguments.seconds
            while time.monotonic() < deadline:
                ages.append(here.status()["lag"]["seconds"])
                time.sleep(SAMPLE_SECONDS)
    misses = sum(age > arguments.rpo for age in ages)
    p95 = sorted(ages)[int(0.95 * (len(ages) - 1))]
    seconds = [f"{age:.2f}" for age in (statistics.median(ages), p95, max(ages))]
    row = [f"{arguments.iops} writes/s, --rpo {rpo}", *seconds]
    row += [str(count) for count in (misses, len(ages))]
    head = ["age of the newest point", "median (s)", "p95 (s)", "max (s)", "misses", "samples"]
    table(head, [row])


if __name__ == "__main__":
    main()
