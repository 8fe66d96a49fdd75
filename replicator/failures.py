"""What a receiver's last word says of an error: whether the sender may try again."""

import errno

from fusedisk.errors import FuseDiskError
from replicator.deciding import OtherRoot
from replicator.journal import JournalDamaged
from replicator.messages import RemoteProtocolError
from replicator.replica import TargetFull
from replicator.room import FULL
from replicator.store import ReplicaBusy

# A disk or a filesystem that may be looked after, and a host that is short of something for now.
_IO_ERRORS = frozenset(
    {
        *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.EROFS, errno.ESTALE),
        *(errno.ETIMEDOUT, errno.EREMOTEIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)


def failure_code(error: Exception) -> str:
    """Of a last word; "refused" alone tells the sender that trying again is of no use."""
    match error:
        case RemoteProtocolError():
            return "protocol"
        case TargetFull():
            return "full"
        case FuseDiskError() if _is_full(error.__cause__):
            # Not of a pass, but of what is needed besides: a manifest, a new replica.
            return "full"
        case _ if isinstance(error, JournalDamaged) or isinstance(error.__cause__, JournalDamaged):
            # The sender repairs it by comparing.
            return "damaged"
        case ReplicaBusy():
            return "busy"
        case OtherRoot():
            return "differs"
        case FuseDiskError() if _may_pass(error.__cause__):
            return "io"
        case FuseDiskError():
            return "refused"
        case _:
            return "io"


def _may_pass(cause: BaseException | None) -> bool:
    """Whether what fails so may work again, by itself or once somebody has looked after it."""
    return isinstance(cause, OSError) and cause.errno in _IO_ERRORS


def _is_full(cause: BaseException | None) -> bool:
    return isinstance(cause, OSError) and cause.errno in FULL
