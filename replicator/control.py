"""The control socket of a sender: a line ``WORD [JSON]`` in, a line of JSON out.

It is for its owner only (mode 0600). The client's side is `fusedisk.controlclient`.
"""

import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from fusedisk.controlclient import REQUEST_BYTES_MAX, SILENT, ask_sender, short_path
from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.replicas import replica_names
from replicator.cutover import CutoverOptions
from replicator.following import Follower
from replicator.handover import outcome_of
from replicator.reporting import report
from replicator.settings import Changes
from replicator.verify import VerifyOptions

_ANSWER_SECONDS_MAX = 10.0

Decoded = TypeVar("Decoded")


class NoSender(FuseDiskError):
    """There is no sender of the replica, or it ended without an answer."""


def path(state: Path, name: str) -> Path:
    """Where the sender of a replica listens."""
    return state / "replicas" / f"{name}.sock"


async def serve(
    where: Path,
    follower: Follower,
    stop: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled. The caller holds the replica's lock."""
    where.unlink(missing_ok=True)
    folder = os.open(where.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(short_path(folder, where.name))
        where.chmod(0o600)
        sock.listen(16)

        async def answer(stream: trio.SocketStream) -> None:
            async with stream:
                try:
                    with trio.fail_after(_ANSWER_SECONDS_MAX):
                        word, rest = await _read_request(stream)
                    if word == "verify":
                        reply = await _verify(follower, rest, stream)
                    else:
                        reply = await _reply(follower, word, rest)
                    with trio.fail_after(_ANSWER_SECONDS_MAX):
                        await stream.send_all(json.dumps(reply).encode() + b"\n")
                except (trio.BrokenResourceError, trio.TooSlowError):
                    return
            if word == "stop":
                stop.cancel()

        task_status.started()
        await trio.serve_listeners(answer, [trio.SocketListener(sock)])
    finally:
        os.close(folder)
        where.unlink(missing_ok=True)


async def _read_request(stream: trio.SocketStream) -> tuple[str, bytes]:
    """(word, JSON); the word is empty where it is no request."""
    line = b""
    while b"\n" not in line:
        more = await stream.receive_some(REQUEST_BYTES_MAX + 1 - len(line))
        line += more
        if not more or len(line) > REQUEST_BYTES_MAX:
            return "", b""
    word, _, rest = line.partition(b"\n")[0].partition(b" ")
    return word.decode(errors="replace"), rest


async def _status(follower: Follower, _: bytes) -> dict[str, Any]:
    return await report(follower)


async def _pause(follower: Follower, _: bytes) -> dict[str, Any]:
    follower.pause(True)
    return await report(follower)


async def _resume(follower: Follower, _: bytes) -> dict[str, Any]:
    follower.pause(False)
    return await report(follower)


async def _set(follower: Follower, rest: bytes) -> dict[str, Any]:
    follower.change(_decode(rest, Changes))
    return await report(follower)


async def _cutover(follower: Follower, rest: bytes) -> dict[str, Any]:
    try:
        return await follower.cut_over(_decode(rest, CutoverOptions))
    except FuseDiskError as error:
        return {
            "outcome": await trio.to_thread.run_sync(outcome_of, follower.source, error),
            "downtime_ms": None,
            "phases": {},
            "epoch": follower.committed,
            **_failure(error),
        }


async def _verify(follower: Follower, rest: bytes, stream: trio.SocketStream) -> dict[str, Any]:
    """Compare, which may take hours, for as long as the one who asked is there."""
    reply: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            reply = (await follower.verifier.verify(_decode(rest, VerifyOptions))).report()
        except FuseDiskError as error:
            reply = _failure(error)
        nursery.cancel_scope.cancel()
    return reply


# What a sender can be asked. "stop" is answered like status; then the sender ends.
_REQUESTS: dict[str, Callable[[Follower, bytes], Awaitable[dict[str, Any]]]] = {
    "cutover": _cutover,
    "pause": _pause,
    "resume": _resume,
    "set": _set,
    "status": _status,
    "stop": _status,
}


async def _reply(follower: Follower, word: str, rest: bytes) -> dict[str, Any]:
    try:
        if word not in _REQUESTS:
            raise UsageError("not a request that this sender knows; is it of another version?")
        return await _REQUESTS[word](follower, rest)
    except FuseDiskError as error:
        return _failure(error)


def _decode(rest: bytes, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(rest, type=kind)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the request is damaged: {error}") from None


def _failure(error: FuseDiskError) -> dict[str, Any]:
    return {"error": str(error), "exit_code": error.exit_code}


def choose(state: Path, name: str | None) -> str:
    """The replica that is meant: the only one where no name is given. Raises UsageError."""
    names = replica_names(state)
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise UsageError(f"say which replica by --name: {', '.join(names) or 'there is none'}")
    if name not in names:
        raise UsageError(f"there is no replica {name}; there is: {', '.join(names) or 'none'}")
    return name


def ask(
    state: Path, name: str | None, request: str, seconds: float | None = _ANSWER_SECONDS_MAX
) -> dict[str, Any]:
    """Send a request to the sender of a replica, the only one where no name is given.

    ``seconds`` bounds the wait for the answer; None waits for as long as the sender lives.
    Raises UsageError where the name is missing or wrong, NoSender where none runs, FuseDiskError
    where it does not answer. What the request itself came to is in the answer.
    """
    name = choose(state, name)
    reply = ask_sender(state, name, request, seconds)
    if reply is None:
        raise NoSender(f"replica {name} has no running sender; start one")
    if reply.get("error") == SILENT:
        raise FuseDiskError(f"{SILENT} (process {reply['sender']['pid']}); is it stopped?")
    return reply


def command(state: Path, name: str | None, request: str) -> dict[str, Any]:
    """Like `ask`, and raises what the sender refused."""
    reply = ask(state, name, request)
    if "exit_code" in reply:
        kind = UsageError if reply["exit_code"] == UsageError.exit_code else FuseDiskError
        raise kind(str(reply["error"]))
    return reply
