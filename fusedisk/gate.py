"""The gate as a lease: it stays closed only while the process that closed it lives.

The closer holds a flock on ``STATE/gate`` from before it sets the gate bit until after it clears
it. The kernel drops the lock when that process dies, however it dies. A server whose writer meets a
closed gate tries the lock: getting it means that the holder is gone.

Invariant: gate bit set => lock held, or its holder dead.
"""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from fusedisk.changemap import Control
from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence


def take_lease(state: Path) -> int:
    """Lock the gate; closing the returned descriptor gives it back. Raises BlockingIOError."""
    fd = os.open(state / "gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def release_if_abandoned(state: Path, control: Control, images: Iterable[Path]) -> None:
    """Open the gate of a dead holder; where a promotion was begun, fence instead.

    With an unknown outcome both sides must not be writable, so writes fail until it is resolved.
    """
    try:
        fd = take_lease(state)
    except BlockingIOError:
        return
    try:
        if control.gated:
            open_gate(control, images)
    finally:
        os.close(fd)


def open_gate(control: Control, images: Iterable[Path]) -> None:
    """Let writers through, or refuse them where a promotion is on record; the caller has the lease.

    Invariant: with a promotion begun and not settled, the gate opens only behind the fence.
    """
    try:
        begun = read_fence(images) is not None
    except FuseDiskError:
        # A record that cannot be read is a record.
        begun = True
    if begun:
        control.set_fence(True)
    control.set_gate(False)
