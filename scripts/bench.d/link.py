"""Whether a link with delay is filled, and whether --bandwidth is kept, also when it is changed.

The link is a proxy in Python, which carries less than the rate that it is set to. So a socket that
is written to without end is measured through it, too, as the most that a fill can reach.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common import MIB, Bench, bench, run, scratch_parser, table, wait_for

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from proxy import Proxy

_SETTLE_SECONDS = 1.0


def whole(proxy: Proxy, mib: int) -> float:
    """MiB a second, from when 1 MiB has gone through until all has."""
    wait_for(lambda: proxy.carried >= MIB, "it sends", 60, poll=0.002)
    begun, first = time.monotonic(), proxy.carried
    wait_for(lambda: proxy.carried >= mib * MIB, "all has gone through", 600, poll=0.002)
    return (proxy.carried - first) / MIB / (time.monotonic() - begun)


def filled(here: Bench, name: str, proxy: Proxy, mib: int) -> float:
    """Of a first fill, without the start of the program and without the commit."""
    sender = here.spawn("start", "--once", "--name", name, here.mountpoint, proxy.address)
    rate = whole(proxy, mib)
    if sender.wait():
        raise SystemExit("the fill failed")
    return rate


@contextlib.contextmanager
def sink(path: Path) -> Iterator[str]:
    """A listener that takes one connection's data and forgets it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def take() -> None:
        connection, _ = listener.accept()
        with connection:
            while connection.recv(MIB):
                pass

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield f"unix://{path}"
    finally:
        thread.join()
        listener.close()


def written(proxy: Proxy, mib: int) -> float:
    """Of a socket that is written to, as fast as it takes it."""

    def write() -> None:
        with socket.create_connection(("127.0.0.1", port)) as end:
            for _ in range(mib):
                end.sendall(data)

    data = os.urandom(MIB)
    port = int(proxy.address.rpartition(":")[2])
    thread = threading.Thread(target=write)
    thread.start()
    rate = whole(proxy, mib)
    thread.join()
    return rate


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
            delay = delay_ms / 2000
            with (
                sink(here.folder / f"sink{delay_ms}") as plain,
                Proxy(plain, delay_seconds=delay, rate=rate) as proxy,
            ):
                most = written(proxy, arguments.mib)
            with Proxy(here.address, delay_seconds=delay, rate=rate) as proxy:
                got = filled(here, f"delay{delay_ms}", proxy, arguments.mib)
            rows.append([f"{delay_ms}", f"{got:.1f}", f"{most:.1f}", f"{got / most:.2f}"])
        columns = ["first fill (MiB/s)", "plain socket (MiB/s)", "ratio"]
        table(["delay there and back (ms)", *columns], rows)
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
