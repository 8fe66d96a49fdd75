"""The keeper: mounts, holds the ``/dev/fuse`` descriptor, and watches over the disk server.

Standard library only, and as little as possible: what isn't here cannot take the mount away.
"""

import argparse
import json
import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

log = logging.getLogger("fusedisk.keeper")


class MountFailed(Exception):
    """fusermount3 refused; the message is its own."""


def mount(mountpoint: str, options: list[str]) -> int:
    """Mount and return the ``/dev/fuse`` descriptor (libfuse's ``_FUSE_COMMFD`` protocol).

    fusermount3 opens and mounts with its own rights, so this works for every user, and passes the
    descriptor over the socket named in the environment (libfuse: lib/mount.c). Raises MountFailed.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        result = subprocess.run(
            ["fusermount3", "-o", ",".join(options), "--", mountpoint],
            env=dict(os.environ, _FUSE_COMMFD=str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        theirs.close()
        if result.returncode != 0:
            raise MountFailed(result.stderr.strip() or "fusermount3 failed")
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise MountFailed("fusermount3 passed no descriptor")
    return fds[0]


def unmount(mountpoint: str, *, lazy: bool = False) -> str | None:
    """Unmount; return why it failed, or None."""
    result = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return None if result.returncode == 0 else result.stderr.strip()


def run(arguments: argparse.Namespace) -> int:
    """Mount, serve until the mount is gone, and say over ``arguments.ready`` how it began."""
    try:
        device = mount(arguments.mountpoint, arguments.options.split("\n"))
    except (MountFailed, OSError) as error:
        os.write(arguments.ready, f"{error}\n".encode())
        return 1
    inherited = [int(x) for x in arguments.images.split(",")]
    log.info("mounted %s", arguments.mountpoint)
    server = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "fusedisk.server"),
            *("--state", arguments.state, "--device", str(device)),
            *("--ready", str(arguments.ready), "--images", arguments.images),
            *("--uid", arguments.uid, "--gid", arguments.gid, "--mode", arguments.mode),
        ],
        pass_fds=[device, arguments.ready, arguments.lock, *inherited],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A Ctrl-C at the terminal is for the keeper, which unmounts in order.
        start_new_session=True,
    )
    os.close(arguments.ready)
    # Read by `fusedisk status`, which therefore needs no answer from anybody.
    pids = {"keeper": os.getpid(), "server": server.pid}
    (Path(arguments.state) / "pids.json").write_text(json.dumps(pids))

    def stop(*_: object) -> None:
        failure = unmount(arguments.mountpoint)
        if failure:
            log.warning("told to stop, but not unmounted: %s", failure)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    status = server.wait()
    if status != 0:
        # The disk is gone; leaving the dead mount would only give every caller ENOTCONN.
        log.error("the disk server ended with status %d", status)
        unmount(arguments.mountpoint, lazy=True)
    log.info("ended")
    return 0 if status == 0 else 1


def main() -> int:
    """Entry point of the background keeper; see fusedisk.mounting for who starts it."""
    parser = argparse.ArgumentParser(prog="fusedisk.keeper")
    for name in ("--state", "--mountpoint", "--options", "--images", "--uid", "--gid", "--mode"):
        parser.add_argument(name, required=True)
    parser.add_argument("--ready", type=int, required=True)
    parser.add_argument("--lock", type=int, required=True)
    arguments = parser.parse_args()
    handler = logging.handlers.RotatingFileHandler(
        Path(arguments.state) / "keeper.log", maxBytes=1 << 20, backupCount=3
    )
    logging.basicConfig(
        level=logging.INFO, handlers=[handler], format="%(asctime)s %(levelname)s %(message)s"
    )
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
