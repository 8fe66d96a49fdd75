"""The disk server: answers the kernel's requests until the mount is gone, then records it clean."""

import argparse
import functools
import logging
import logging.handlers
import os
import sys
from pathlib import Path

import pyfuse3
import trio

from fusedisk.changemap import ChangeMap, Control
from fusedisk.filesystem import DiskFilesystem, ServedDisk
from fusedisk.gate import release_if_abandoned
from fusedisk.state import read_mount_record, record_clean

log = logging.getLogger("fusedisk.server")

# Writers held at a closed gate keep a task each, and reads must still find one.
_TASKS_MAX = 1024


async def _serve(arguments: argparse.Namespace) -> None:
    state: Path = arguments.state
    record = read_mount_record(state)
    control = Control(state / "control", True)
    maps = [ChangeMap(state / f"{i}.map", True) for i in range(len(record.disks))]
    fds: list[int] = arguments.images
    disks = [
        ServedDisk(disk.name, fd, disk.size, changes)
        for disk, fd, changes in zip(record.disks, fds, maps, strict=True)
    ]
    paths = [Path(disk.path) for disk in record.disks]
    operations = DiskFilesystem(
        control,
        disks,
        arguments.uid,
        arguments.gid,
        arguments.mode,
        functools.partial(release_if_abandoned, state, control, paths),
    )
    # libfuse 3.3 and later takes a mounted descriptor in place of a mountpoint.
    pyfuse3.init(operations, f"/dev/fd/{arguments.device}", set())
    try:
        os.write(arguments.ready, b"ready\n")
        os.close(arguments.ready)
        await pyfuse3.main(min_tasks=4, max_tasks=_TASKS_MAX)
    finally:
        pyfuse3.close(unmount=False)
    # The kernel has let go of the device: nobody can write any more.
    await trio.to_thread.run_sync(record_clean, state, fds, control, maps)
    log.info("unmounted, clean")


def main() -> int:
    """Entry point; started by the keeper with everything opened and locked."""
    parser = argparse.ArgumentParser(prog="fusedisk.server")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--ready", type=int, required=True)
    parser.add_argument("--images", type=lambda s: [int(x) for x in s.split(",")], required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--mode", type=lambda s: int(s, 8), required=True)
    arguments = parser.parse_args()
    handler = logging.handlers.RotatingFileHandler(
        arguments.state / "server.log", maxBytes=1 << 20, backupCount=3
    )
    logging.basicConfig(
        level=logging.INFO, handlers=[handler], format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        trio.run(_serve, arguments)
    except Exception:
        log.exception("the disk server failed; the mount will not be trusted as clean")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
