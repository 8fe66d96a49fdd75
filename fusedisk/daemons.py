"""The daemons of a mount, as the keeper wrote them down and /proc confirms."""

from pathlib import Path
from typing import NamedTuple

import msgspec


class Daemons(NamedTuple):
    """Process ids, None for one that does not live.

    ``restarts``: how often a server followed another; ``refused``: how many upgrades were given up.
    """

    keeper: int | None
    server: int | None
    restarts: int
    refused: int


class _Record(msgspec.Struct):
    keeper: int
    server: int
    restarts: int
    refused: int = 0


def read_daemons(state: Path) -> Daemons:
    """The daemons that live; none while they start, or where the record is damaged."""
    try:
        found = msgspec.json.decode((state / "pids.json").read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return Daemons(None, None, 0, 0)
    return Daemons(
        found.keeper if _lives("keeper", found.keeper, state) else None,
        found.server if _lives("server", found.server, state) else None,
        found.restarts,
        found.refused,
    )


def _lives(role: str, pid: int, state: Path) -> bool:
    # The id may by now be anybody's, also another mount's.
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"fusedisk.{role}".encode() in command and bytes(state) in command
