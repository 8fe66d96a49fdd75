"""The lock by which one replica has one sender: `replicas/NAME.lock` in the state directory."""

import fcntl
import os
from pathlib import Path

from fusedisk.errors import FuseDiskError


def lock_replica(state: Path, name: str) -> int:
    """Make sure that one sender serves a replica. Raises FuseDiskError where one runs."""
    folder = state / "replicas"
    folder.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise FuseDiskError(
            f"replica {name} has a running sender; stop it first, or choose another --name"
        ) from None
    return fd
