"""Whether a link with delay is filled, and whether --bandwidth is kept, also when it is changed."""

import os
import sys
import time
from pathlib import Path

from common import MIB, Bench, bench, run, scratch_parser, table, wait_for

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from proxy import Proxy

_SETTLE_SECONDS = 1.0


def filled(here: Bench, name: str, proxy: Proxy, mib: int) -> float:
    """MiB a second of a first fill over a proxy."""
    begun = time.monotonic()
    run("replicator", "start", "--once", "--name", name, here.mountpoint, proxy.address)
    return mib / (time.monotonic() - begun)


def carried(proxy: Proxy, seconds: float) -> float:
    """MiB a second that go through, after a moment."""
    time.sleep(_SETTLE_SECONDS)
    begun, before = time.monotonic(), proxy.carried
    time.sleep(seconds)
    return (proxy.carried - before) / MIB / (time.monotonic() - begun)


def main() -> None:
    """Fill over a slow link with and without delay; then keep to one rate and to another."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--mib", type=int, default=192, help="of data in the disk")
    parser.add_argument("--link", type=int, default=40, help="what the link carries, MiB/s")
    parser.add_argument("--delay-ms", type=int, default=50, help="there and back")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each rate")
    arguments = parser.parse_args()
    with bench(arguments.scratch) as here:
        with here.image.open("wb") as file:
            for _ in range(arguments.mib):
                file.write(os.urandom(MIB))
        here.mount()
        here.receive()
        rate = arguments.link * MIB
        rows = []
        for delay_ms in (0, arguments.delay_ms):
            with Proxy(here.address, delay_seconds=delay_ms / 2000, rate=rate) as proxy:
                got = filled(here, f"delay{delay_ms}", proxy, arguments.mib)
                rows.append([f"{delay_ms}", f"{got:.1f}"])
        table(["delay there and back (ms)", "first fill (MiB/s)"], rows)
        print()
        with Proxy(here.address) as proxy:
            words = ("--name", "r", "--bandwidth", "4MiB", here.mountpoint, proxy.address)
            here.spawn("start", *words)
            wait_for(lambda: proxy.carried > MIB, "it sends", 60)
            rows = [["4", f"{carried(proxy, arguments.seconds):.2f}"]]
            run("replicator", "set", "--name", "r", "--bandwidth", "8MiB", here.mountpoint)
            rows.append(["8", f"{carried(proxy, arguments.seconds):.2f}"])
        table(["--bandwidth (MiB/s)", f"carried over {arguments.seconds:g} s (MiB/s)"], rows)


if __name__ == "__main__":
    main()
