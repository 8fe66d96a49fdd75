"""Taking turns between receiver processes on one store, as sessions by ssh are.

A replica is held by the process that has the lock `STORE/.locks/NAME`. A link that broke can leave
its receiver behind for as long as the kernel believes in the connection, so a newer session of the
same source asks for the replica: it replaces `STORE/.turns/NAME`, and who holds the replica sees
that and ends. Both files stay: to remove one that another process has open would split them in two.

Who may write into the store may take the replica's turn; the file only has to name the source.
"""

import os
import secrets
from pathlib import Path
from typing import Literal

import msgspec

_BYTES_MAX = 1024


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who asked last for a replica. The nonce tells two requests of one source apart.

    By "session" it goes to another session of the source, by "promotion" to who makes it the disk:
    then it is given only if the sender does not answer. By "force" it is given in any case.
    """

    source_id: str
    nonce: str
    by: Literal["session", "promotion", "force"] = "session"


def read_turn(store: Path, name: str) -> Turn | None:
    """The last request for a replica; None where there is none, or none that can be read."""
    try:
        with _file(store, name).open("rb") as file:
            return msgspec.json.decode(file.read(_BYTES_MAX), type=Turn)
    except (OSError, msgspec.MsgspecError):
        return None


def ask_for_turn(
    store: Path,
    name: str,
    source_id: str,
    by: Literal["session", "promotion", "force"] = "session",
) -> Turn:
    """Ask the process that holds a replica to end its session. Raises OSError."""
    turn = Turn(source_id, secrets.token_hex(8), by)
    file = _file(store, name)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    # Not fsynced: after a crash of the host nobody holds anything.
    scratch = file.with_name(f".{name}.{turn.nonce}")
    scratch.write_bytes(msgspec.json.encode(turn))
    os.replace(scratch, file)
    return turn


def _file(store: Path, name: str) -> Path:
    return store / ".turns" / name
