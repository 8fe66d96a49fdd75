"""The gate as a lease: it stays closed only while the process that closed it lives, and says so.

The closer holds a flock on ``STATE/gate`` from before it sets the gate bit until after it clears
it. The kernel drops the lock when that process dies, however it dies. A server whose writer meets a
closed gate tries the lock: getting it means that the holder is gone. One that lives but stands
still, or waits for a disk, is found by the time to which it keeps the gate closed
(fusedisk.gateword).

Invariant: gate bit set => lock held, or its holder dead.
"""

import fcntl
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from fusedisk.changemap import Control
from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from fusedisk.gateword import forget_time, let_go_if_due

log = logging.getLogger("fusedisk.gate")


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
    """Open the gate of a holder that is dead, or late; where a promotion was begun, fence instead.

    With an unknown outcome both sides must not be writable, so writes fail until it is resolved.
    """
    try:
        fd = take_lease(state)
    except BlockingIOError:
        if let_go_if_due(control):
            refused = ", and writes are refused until it is resolved" if control.fenced else ""
            log.warning("the cutover does not go on: its gate was let go%s", refused)
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
    forget_time(control)
