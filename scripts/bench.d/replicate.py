"""First fill over loopback TCP, beside a QEMU mirror, nbdcopy and cp, in one run.

Every system copies the same image, half of it random data, to a new file on the same filesystem,
in turn, several rounds. What is counted is the copying alone, not the start of the programs. Ours
hashes at both ends and syncs the replica before it commits; none of the others does either.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import BIN, GIB, MIB, run, scratch_parser, table, wait_for

_PIECE_BYTES = 4 * MIB
_TICKS = os.sysconf("SC_CLK_TCK")


def make_image(path: Path, size: int) -> None:
    """Half of it random data, in pieces with holes between them."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 2 * _PIECE_BYTES):
            os.pwrite(file.fileno(), os.urandom(_PIECE_BYTES), offset)
        os.fsync(file.fileno())


def cpu_seconds(*pids: int) -> float:
    """User and system time of processes that live."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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


class Copies:
    """The systems; each returns seconds and seconds of CPU, and leaves ``target`` behind."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.image = folder / "disk.img"
        self.mountpoint = folder / "mnt"
        self.target = folder / "target.img"
        self.mountpoint.mkdir()

    def fusedisk(self) -> tuple[float, float]:
        """A first fill, from the state filling to the state following."""
        store = self.folder / "store"
        store.mkdir()
        heard, sent = self.folder / "receiver.log", self.folder / "sender.log"
        address = f"tcp://127.0.0.1:{free_port()}"
        receive = (BIN / "replicator", "receive", "--store", store, address)
        start = (BIN / "replicator", "start", "--name", "r", self.mountpoint, address)
        with running(*receive, log=heard) as receiver:
            wait_said(heard, "listening", receiver)
            with running(*start, log=sent) as sender:
                wait_said(sent, "filling", sender)
                begun, cpu = time.monotonic(), cpu_seconds(sender.pid, receiver.pid)
                wait_said(sent, "following", sender)
                seconds = time.monotonic() - begun
                used = cpu_seconds(sender.pid, receiver.pid) - cpu
        run("replicator", "forget", self.mountpoint, "--name", "r")
        (store / "r" / self.image.name).rename(self.target)
        shutil.rmtree(store)
        return seconds, used

    def qemu(self) -> tuple[float, float]:
        """blockdev-mirror to an NBD export, until the job is ready."""
        port = free_port()
        monitor = self.folder / "qmp"
        self._new_target()
        export = running(
            *("qemu-storage-daemon", "--blockdev"),
            f"driver=file,node-name=t,filename={self.target},discard=unmap",
            *("--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"),
            *("--export", "type=nbd,id=e,node-name=t,writable=on"),
            log=self.folder / "export.log",
        )
        mirror = running(
            *("qemu-storage-daemon", "--blockdev"),
            f"driver=file,node-name=s,filename={self.image},read-only=on",
            *("--chardev", f"socket,id=m,path={monitor},server=on,wait=off"),
            *("--monitor", "chardev=m"),
            log=self.folder / "mirror.log",
        )
        with export as target, mirror as source:
            wait_for(lambda: _listens(port), "the export is there")
            qmp = Qmp(monitor)
            server = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
            qmp.call("blockdev-add", driver="nbd", server=server, export="t", **{"node-name": "n"})
            cpu, begun = cpu_seconds(source.pid, target.pid), time.monotonic()
            qmp.call(
                "blockdev-mirror",
                **{"job-id": "j", "device": "s", "target": "n", "sync": "full"},
            )
            qmp.wait_event("BLOCK_JOB_READY")
            seconds = time.monotonic() - begun
            used = cpu_seconds(source.pid, target.pid) - cpu
            qmp.close()
        monitor.unlink(missing_ok=True)
        return seconds, used

    def nbdcopy(self) -> tuple[float, float]:
        """Nbdcopy to nbdkit's file plugin, told that the target is empty."""
        port = free_port()
        self._new_target()
        serve = ("nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", self.target)
        with running(*serve, log=self.folder / "nbdkit.log") as server:
            wait_for(lambda: _listens(port), "nbdkit is there")
            cpu = cpu_seconds(server.pid)
            seconds, used = _timed(
                "nbdcopy", "--destination-is-zero", self.image, f"nbd://127.0.0.1:{port}"
            )
            return seconds, used + cpu_seconds(server.pid) - cpu

    def cp(self) -> tuple[float, float]:
        """A local copy, as a bound."""
        return _timed("cp", "--sparse=always", self.image, self.target)

    def _new_target(self) -> None:
        with self.target.open("wb") as file:
            file.truncate(self.size)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _timed(*words: str | Path) -> tuple[float, float]:
    begun = time.monotonic()
    process = subprocess.Popen([str(word) for word in words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{words[0]} failed")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure in turn and print medians."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--gib", type=int, default=4, help="size of the image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="one of the systems, by the first word of its row")
    arguments = parser.parse_args()
    size = arguments.gib * GIB
    folder = Path(arguments.scratch) / f"fusedisk-bench-{os.getpid()}"
    folder.mkdir()
    try:
        here = Copies(folder, size)
        make_image(here.image, size)
        systems: dict[str, tuple[Callable[[], tuple[float, float]], str]] = {
            "fusedisk (xxh3 at both ends, fsync)": (here.fusedisk, "replicator"),
            "QEMU blockdev-mirror to NBD": (here.qemu, "qemu-storage-daemon"),
            "nbdcopy to nbdkit": (here.nbdcopy, "nbdcopy"),
            "cp --sparse=always (no network)": (here.cp, "cp"),
        }
        if arguments.only:
            systems = {k: v for k, v in systems.items() if k.startswith(arguments.only)}
        missing = [
            name
            for name, (_, tool) in systems.items()
            if tool != "replicator" and shutil.which(tool) is None
        ]
        figures: dict[str, list[tuple[float, float]]] = {}
        run("fusedisk", "mount", here.image, here.mountpoint)
        try:
            for _ in range(arguments.rounds):
                for name, (copy, _) in systems.items():
                    if name not in missing:
                        figures.setdefault(name, []).append(copy())
                        # Once is enough: the image is the same.
                        if len(figures[name]) == 1:
                            subprocess.run(["cmp", here.image, here.target], check=True)
                        here.target.unlink()
        finally:
            run("fusedisk", "unmount", here.mountpoint)
    finally:
        shutil.rmtree(folder)
    gib = size / 2 / GIB
    rows = []
    for name, found in figures.items():
        seconds = statistics.median(s for s, _ in found)
        used = statistics.median(c for _, c in found)
        rows.append([name, f"{seconds:.2f}", f"{gib / seconds:.2f}", f"{used / gib:.2f}"])
    rows += [[name, "not installed", "-", "-"] for name in missing]
    table([f"{gib:.0f} GiB of data in {2 * gib:.0f}", "seconds", "GiB/s", "CPU s per GiB"], rows)


if __name__ == "__main__":
    main()
