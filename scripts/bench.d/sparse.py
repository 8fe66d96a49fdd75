"""What an empty disk of many TiB costs: time to mount, first fill, and room of its change map."""

import time

from common import MIB, TIB, bench, run, scratch_parser, table

MOUNT_SECONDS_MAX = 2.0


def main() -> None:
    """Measure and print; fails where mounting takes too long."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--tib", type=int, default=15, help="ext4 ends just below 16")
    arguments = parser.parse_args()
    with bench(arguments.scratch) as here:
        with here.image.open("wb") as file:
            file.truncate(arguments.tib * TIB)
        mounted = here.mount()
        here.receive()
        begun = time.monotonic()
        run("replicator", "start", "--once", "--name", "r", here.mountpoint, here.address)
        filled = time.monotonic() - begun
        begun = time.monotonic()
        run("fusedisk", "status", here.mountpoint)
        shown = time.monotonic() - begun
        files = [here.state / "0.map", here.replica]
        used = [f"{path.stat().st_blocks * 512 / MIB:.2f} MiB" for path in files]
    rows = [
        ["time to mount", f"{mounted:.2f} s"],
        ["first fill (start --once)", f"{filled:.2f} s"],
        ["fusedisk status", f"{shown:.2f} s"],
        ["change map, allocated", used[0]],
        ["replica, allocated", used[1]],
    ]
    table([f"empty image of {arguments.tib} TiB", "figure"], rows)
    if mounted > MOUNT_SECONDS_MAX:
        raise SystemExit(f"mounting took more than {MOUNT_SECONDS_MAX} s")


if __name__ == "__main__":
    main()
