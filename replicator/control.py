"""The control socket of a sender: a word in, a JSON line out; for its owner only (mode 0600)."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import trio

from fusedisk.errors import FuseDiskError, UsageError
from replicator.cutover import CutoverOptions, OutcomeUnknown
from replicator.following import Follower, ReplicaRecord

_REQUEST_BYTES_MAX = 16384
_REPLY_BYTES_MAX = 1 << 20
_ANSWER_SECONDS_MAX = 10.0


def path(state: Path, name: str) -> Path:
    """Where the sender of a replica listens."""
    return state / "replicas" / f"{name}.sock"


def _short(folder: int, name: str) -> str:
    # A socket's path ends at 107 bytes, a state directory's need not.
    return f"/proc/self/fd/{folder}/{name}"


async def serve(where: Path, follower: Follower, stop: trio.CancelScope) -> None:
    """Answer ``status`` and ``stop`` until cancelled. The caller holds the replica's lock."""
    where.unlink(missing_ok=True)
    folder = os.open(where.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(_short(folder, where.name))
        where.chmod(0o600)
        sock.listen(16)

        async def answer(stream: trio.SocketStream) -> None:
            try:
                with trio.fail_after(_ANSWER_SECONDS_MAX):
                    request = await stream.receive_some(_REQUEST_BYTES_MAX)
                word, _, rest = request.partition(b" ")
                if word == b"cutover":
                    reply = await _cutover(follower, rest)
                else:
                    reply = follower.report() if word in (b"status", b"stop") else {}
                with trio.fail_after(_ANSWER_SECONDS_MAX):
                    await stream.send_all(json.dumps(reply).encode() + b"\n")
            except (trio.BrokenResourceError, trio.TooSlowError):
                return
            if word == b"stop":
                stop.cancel()

        await trio.serve_listeners(answer, [trio.SocketListener(sock)])
    finally:
        os.close(folder)
        where.unlink(missing_ok=True)


async def _cutover(follower: Follower, rest: bytes) -> dict[str, Any]:
    try:
        options = msgspec.json.decode(rest, type=CutoverOptions)
        return await follower.cut_over(options)
    except (msgspec.MsgspecError, FuseDiskError) as error:
        code = error.exit_code if isinstance(error, FuseDiskError) else 2
        outcome = "unknown" if code == OutcomeUnknown.exit_code else "rolled-back"
        return {"outcome": outcome, "error": str(error), "exit_code": code}


def _request(
    state: Path, name: str, word: str, seconds: float = _ANSWER_SECONDS_MAX
) -> dict[str, Any] | None:
    """The sender's answer, or None where none runs."""
    try:
        folder = os.open(state / "replicas", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(seconds)
            sock.connect(_short(folder, f"{name}.sock"))
            sock.sendall(word.encode())
            with sock.makefile("rb") as answers:
                reply = json.loads(answers.readline(_REPLY_BYTES_MAX))
            return reply if isinstance(reply, dict) else None
    except (OSError, ValueError):
        return None
    finally:
        os.close(folder)


def _records(state: Path) -> list[ReplicaRecord]:
    found = []
    for file in sorted((state / "replicas").glob("*.json")):
        try:
            found.append(msgspec.json.decode(file.read_bytes(), type=ReplicaRecord))
        except (OSError, msgspec.MsgspecError) as error:
            raise FuseDiskError(f"{file} is damaged: {error}; remove it") from None
    return found


def _names(state: Path) -> list[str]:
    running = {file.stem for file in (state / "replicas").glob("*.sock")}
    return sorted(running | {record.name for record in _records(state)})


def reports(state: Path) -> list[dict[str, Any]]:
    """A status entry for each replica; ``stopped`` where no sender answers."""
    records = {record.name: record for record in _records(state)}
    found = []
    for name in _names(state):
        live = _request(state, name, "status")
        if live is None and name in records:
            record = records[name]
            live = {
                "name": name,
                "address": record.address,
                "state": "stopped",
                "epoch": {"committed": record.epoch},
                "error": None,
            }
        if live is not None:
            found.append(live)
    return found


def ask(
    state: Path, name: str | None, word: str, seconds: float = _ANSWER_SECONDS_MAX
) -> dict[str, Any]:
    """Send a request to the sender of a replica, the only one where no name is given.

    Raises UsageError where the name is missing or wrong, FuseDiskError where no sender runs.
    """
    names = _names(state)
    if name is None:
        if len(names) != 1:
            raise UsageError(f"say which replica by --name: {', '.join(names) or 'there is none'}")
        name = names[0]
    reply = _request(state, name, word, seconds)
    if reply is None:
        raise FuseDiskError(f"replica {name} has no running sender; start one")
    return reply
