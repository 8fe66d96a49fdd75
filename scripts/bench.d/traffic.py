"""Bytes on the wire per byte that a guest writes, in 4 KiB blocks at random, beside a QEMU mirror.

Both at their defaults, which is 64 KiB of granularity, and ours with chunks of 4 KiB as well.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import MIB, clean_up_when_terminated, scratch_parser, table, wait_for
from fio import make_image
from replicated import Replicated, mirrored, ours

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from proxy import Proxy

# Longer than the pause between two passes of ours; keep-alives go on.
_QUIET_SECONDS, _QUIET_BYTES = 2.5, 4096


class Counter:
    """A proxy between two ends, and what it carried to the target."""

    proxy: Proxy

    @contextlib.contextmanager
    def through(self, address: str) -> Iterator[str]:
        """Counts what goes to an address."""
        with Proxy(address) as self.proxy:
            yield self.proxy.address

    def wait_quiet(self) -> int:
        """Wait until nothing is left to send; all that was carried."""
        while True:
            before = self.proxy.carried
            time.sleep(_QUIET_SECONDS)
            if self.proxy.carried - before < _QUIET_BYTES:
                return self.proxy.carried


def measure(disk: Replicated, counter: Counter, mib: int, rate: int) -> float:
    """Bytes carried for each byte written."""
    disk.begin()
    wait_for(lambda: not disk.filling(), "it follows", 60)
    before = counter.wait_quiet()
    written = disk.write(f"--rate_iops={rate}", f"--io_size={mib}m")["io_bytes"]
    ratio: float = (counter.wait_quiet() - before) / written
    return ratio


def main() -> None:
    """Measure each in turn."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--mib", type=int, default=512, help="size of the disk")
    parser.add_argument("--written-mib", type=int, default=16)
    parser.add_argument("--iops", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    clean_up_when_terminated()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench-", dir=arguments.scratch) as made:
        for number in range(arguments.rounds):
            counter = Counter()
            for name in ("64KiB", "4KiB", "QEMU"):
                folder = Path(made) / f"{name}{number}"
                folder.mkdir()
                image = folder / "disk.img"
                make_image(image, arguments.mib * MIB)
                serving = (
                    mirrored(folder, image, counter.through)
                    if name == "QEMU"
                    else ours(folder, image, name, counter.through)
                )
                with serving as disk:
                    ratio = measure(disk, counter, arguments.written_mib, arguments.iops)
                label = "QEMU mirror" if name == "QEMU" else f"fusedisk, chunks of {name}"
                found.setdefault(label, []).append(ratio)
    of = f"{arguments.written_mib} MiB written in a disk of {arguments.mib}, 4 KiB random"
    rows = [[name, f"{statistics.median(ratios):.2f}"] for name, ratios in found.items()]
    table([of, "bytes on the wire per byte written"], rows)


if __name__ == "__main__":
    main()
