"""Peak memory of sender and receiver over the first fill of a large image and passes after it."""

import os
import random
import time
from pathlib import Path

from common import GIB, MIB, Bench, bench, peak_bytes, scratch_parser, table, wait_for

LIMIT_BYTES = 200 * MIB
_PIECE_BYTES = 4 * MIB


def make_image(path: Path, size: int) -> None:
    """Half of it random data, in pieces with holes between them."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 2 * _PIECE_BYTES):
            os.pwrite(file.fileno(), os.urandom(_PIECE_BYTES), offset)


def guest_pass(here: Bench, size: int, mib: int, noise: random.Random) -> None:
    """Change so much of the disk at random places, and wait until the replica has it."""
    fd = os.open(here.disk, os.O_WRONLY)
    try:
        for _ in range(mib * 4):
            os.pwrite(fd, os.urandom(256 << 10), noise.randrange(size // MIB) * MIB)
        os.fsync(fd)
    finally:
        os.close(fd)
    wait_for(lambda: here.status()["lag"]["bytes"] == 0, "the pass is committed")


def main() -> None:
    """Measure and print; fails beyond the limit."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--gib", type=int, default=8, help="size of the image")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--pass-mib", type=int, default=256, help="data written for each pass")
    arguments = parser.parse_args()
    size = arguments.gib * GIB
    peaks: list[int] = []
    rows: list[list[str]] = []
    with bench(arguments.scratch) as here:
        make_image(here.image, size)
        here.mount()
        receiver = here.receive()
        begun = time.monotonic()
        sender = here.spawn("start", "--name", "r", "--rpo", "0.5", here.mountpoint, here.address)

        def note(phase: str) -> None:
            now = [peak_bytes(sender.pid), peak_bytes(receiver.pid)]
            peaks.extend(now)
            seconds = time.monotonic() - begun
            rows.append([phase, f"{seconds:.0f}", *(f"{peak / MIB:.0f}" for peak in now)])

        wait_for(lambda: here.status().get("state") == "following", "the first fill is done")
        note(f"first fill, {arguments.gib} GiB, half allocated")
        noise = random.Random(1)
        for number in range(1, arguments.passes + 1):
            begun = time.monotonic()
            guest_pass(here, size, arguments.pass_mib, noise)
            note(f"pass {number}, {arguments.pass_mib} MiB")
    head = ["after", "seconds", "sender VmHWM (MiB)", "receiver VmHWM (MiB)"]
    table(head, rows)
    if max(peaks) > LIMIT_BYTES:
        raise SystemExit(f"more than {LIMIT_BYTES / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
