"""How far the epoch counter may have come: a bound that a crash of the host leaves (STATE/epochs).

The counter itself is in memory that is written to the disk at no known time. A replica may hold
any epoch that was ever closed, so a mount after a crash starts beyond the bound, which is durable
before the counter comes near it.
"""

import fcntl
import os
from pathlib import Path

import msgspec

from fusedisk.changemap import EPOCH_MAX, Control
from fusedisk.state import write_durably

# 65536 epochs: a sender that closes five a second writes it every three and a half hours.
STEP = 1 << 16
# Raised when fewer than these are left. Senders close epochs at the same time, each after its own
# look at the bound: far fewer than this, so none can pass it.
_LEFT_MIN = 1 << 12


class _Bound(msgspec.Struct, forbid_unknown_fields=True):
    limit: int


def read_bound(state: Path) -> int | None:
    """No epoch beyond it was ever opened; None where that is not known."""
    try:
        bound = msgspec.json.decode((state / "epochs").read_bytes(), type=_Bound)
    except (OSError, msgspec.MsgspecError):
        return None
    return bound.limit if 0 < bound.limit <= EPOCH_MAX else None


def raise_bound(state: Path, least: int) -> int:
    """Make the bound at least ``least``, durably; return it. Raises OSError."""
    # Invariant: it never goes back, whoever else raises it.
    fd = os.open(state / "epochs.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        limit = max(read_bound(state) or 0, min(least, EPOCH_MAX))
        write_durably(state / "epochs", msgspec.json.encode(_Bound(limit)))
    finally:
        os.close(fd)
    return limit


def reserve(state: Path, control: Control) -> None:
    """Before an epoch is opened: see to it that the bound is far enough. Raises OSError."""
    if control.limit - control.epoch < _LEFT_MIN and control.limit < EPOCH_MAX:
        control.limit = raise_bound(state, control.epoch + STEP)
