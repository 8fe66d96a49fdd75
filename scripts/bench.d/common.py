"""What the benchmarks share: scratch space, the commands, peak memory, and a table."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def clean_up_when_terminated() -> None:
    """Let SIGTERM take mounts, daemons and files away too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def scratch_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark can be told."""
    parser = argparse.ArgumentParser(description=description)
    default = os.environ.get("TMPDIR", tempfile.gettempdir())
    parser.add_argument("--scratch", type=Path, default=default, help="where there is room")
    return parser


def run(*words: str | Path) -> str:
    """Run one of the two commands to its end; its output. Raises where it fails."""
    result = subprocess.run(
        [BIN / words[0], *map(str, words[1:])], check=False, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {result.stderr}")
    return result.stdout


def peak_bytes(pid: int) -> int:
    """Resident high-water mark of a process that lives."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"process {pid} is gone")


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = 3600, *, poll: float = 0.1
) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"timed out waiting until {what}")
        time.sleep(poll)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is also Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |", flush=True)


class Bench:
    """A mounted disk and a receiver, in a scratch directory that is removed in any case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image, self.mountpoint = folder / "disk.img", folder / "mnt"
        self.store = folder / "store"
        self.address = f"unix://{folder / 'receiver'}"
        self.mountpoint.mkdir()
        self.store.mkdir()
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def state(self) -> Path:
        """The mount's state directory."""
        return self.image.with_name(self.image.name + ".fusedisk")

    @property
    def disk(self) -> Path:
        """The disk as its guest sees it."""
        return self.mountpoint / self.image.name

    @property
    def replica(self) -> Path:
        """The copy on the target."""
        return self.store / "r" / self.image.name

    def mount(self) -> float:
        """Mount; seconds taken."""
        begun = time.monotonic()
        run("fusedisk", "mount", self.image, self.mountpoint)
        return time.monotonic() - begun

    def spawn(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start a replicator process that ends with the benchmark."""
        with (self.folder / f"log{len(self.processes)}").open("w") as log:
            process = subprocess.Popen(
                [BIN / "replicator", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def receive(self, *words: str) -> subprocess.Popen[str]:
        """Start the receiver and wait until it listens."""
        receiver = self.spawn("receive", "--store", self.store, *words, self.address)
        assert receiver.stdout is not None
        if not receiver.stdout.readline().startswith("listening"):
            raise SystemExit("the receiver did not start")
        return receiver

    def status(self) -> dict[str, Any]:
        """The replica's status; empty before there is one."""
        found = json.loads(run("replicator", "status", "--json", self.mountpoint))["replicas"]
        return found[0] if found else {}

    def end_processes(self) -> None:
        """End the processes that were started."""
        while self.processes:
            process = self.processes.pop()
            process.terminate()
            process.wait()

    def close(self) -> None:
        """End all that was started."""
        self.end_processes()
        if self.mountpoint.is_mount():
            run("fusedisk", "unmount", self.mountpoint)


@contextlib.contextmanager
def bench(scratch: Path) -> Iterator[Bench]:
    """A Bench in a directory below ``scratch``."""
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench-", dir=scratch) as name:
        made = Bench(Path(name))
        try:
            yield made
        finally:
            made.close()
