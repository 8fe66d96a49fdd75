"""Asking a sender over its control socket: a line ``WORD [JSON]`` out, a line of JSON back."""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

REQUEST_BYTES_MAX = 16384
REPLY_BYTES_MAX = 1 << 20
SILENT = "the sender does not answer"
"""The ``error`` of an answer made up here, for a sender that is there and says nothing."""


def short_path(folder: int, name: str) -> str:
    """A path to a socket in an open folder: it ends at 107 bytes, a state directory's need not."""
    return f"/proc/self/fd/{folder}/{name}"


def ask_sender(
    state: Path, name: str, request: str, seconds: float | None
) -> dict[str, Any] | None:
    """The answer of a replica's sender; None where none runs, as after a SIGKILL.

    A sender that does not answer in time gives ``{"error": SILENT, "sender": {"pid"}}``.
    """
    try:
        folder = os.open(state / "replicas", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    silent: dict[str, Any] = {"error": SILENT, "sender": {"pid": None}}
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(seconds)
            try:
                sock.connect(short_path(folder, f"{name}.sock"))
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            silent["sender"]["pid"] = _listener_pid(sock)
            sock.sendall(request.encode() + b"\n")
            with sock.makefile("rb") as answers:
                line = answers.readline(REPLY_BYTES_MAX)
    except ConnectionError:
        return None
    except OSError:
        return silent
    finally:
        os.close(folder)
    try:
        reply = json.loads(line)
    except ValueError:
        # It ended before its answer was complete.
        return None
    return reply if isinstance(reply, dict) else None


def _listener_pid(sock: socket.socket) -> int:
    """The process that listens; the kernel noted it at listen() (unix(7), SO_PEERCRED)."""
    size = struct.calcsize("3i")
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    return pid
