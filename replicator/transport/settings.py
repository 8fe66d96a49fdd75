"""What the user says about transports besides the address."""

import sys
from dataclasses import dataclass
from pathlib import Path

REMOTE_COMMAND = "replicator"


@dataclass(frozen=True)
class Settings:
    """Options of the commands that connect or listen.

    ``tls`` is the directory of ca.pem, cert.pem and key.pem, None for the default places. ``allow``
    are the names of certificates that may connect; empty means any of the CA. ``remote_command``
    starts the remote `replicator` by ssh, and is given to the shell there as it is.
    """

    tls: Path | None = None
    insecure: bool = False
    allow: tuple[str, ...] = ()
    remote_command: str = REMOTE_COMMAND


def may_ask() -> bool:
    """Whether somebody sits at a terminal who can answer a question of ssh's."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
