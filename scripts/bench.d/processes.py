"""Processes beside ours: their end, their CPU time, and QEMU's monitor."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import wait_for

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(*pids: int) -> float:
    """User and system time of processes that live, and of their children that ended."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])
    return total / _TICKS


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether a connection to a port of this host is taken."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running(*words: str | Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the block."""
    with log.open("w") as said:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            text=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_said(log: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait for a line in a log, looking often enough to take the time by it."""
    while text not in log.read_text():
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.002)


class Qmp:
    """A QMP monitor on a Unix socket."""

    def __init__(self, path: Path) -> None:
        wait_for(path.exists, "the monitor is there")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        """Run a command. Raises SystemExit where it fails."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise SystemExit(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def wait_event(self, name: str) -> None:
        """Wait until an event comes."""
        while json.loads(self._file.readline()).get("event") != name:
            pass

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
