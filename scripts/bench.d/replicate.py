"""First fill over loopback TCP, beside a QEMU mirror, nbdcopy, rsync and cp, in one run.

Every system copies the same image, half of it random data, to a new file on the same filesystem,
in turn, several rounds. What is counted is the copying alone, not the start of the programs. Ours
hashes at both ends and syncs the replica before it commits; none of the others does either.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from common import BIN, GIB, MIB, clean_up_when_terminated, run, scratch_parser, table, wait_for
from processes import Qmp, cpu_seconds, free_port, listens, running, wait_said

_PIECE_BYTES = 4 * MIB
_REAPED_SECONDS = 0.2


def make_image(path: Path, size: int) -> None:
    """Half of it random data, in pieces with holes between them."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 2 * _PIECE_BYTES):
            os.pwrite(file.fileno(), os.urandom(_PIECE_BYTES), offset)
        os.fsync(file.fileno())


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
            wait_for(lambda: listens(port), "the export is there")
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
            wait_for(lambda: listens(port), "nbdkit is there")
            cpu = cpu_seconds(server.pid)
            seconds, used = _timed(
                "nbdcopy", "--destination-is-zero", self.image, f"nbd://127.0.0.1:{port}"
            )
            return seconds, used + cpu_seconds(server.pid) - cpu

    def rsync(self) -> tuple[float, float]:
        """To an rsync daemon, the whole file, holes left out where it is written."""
        port = free_port()
        config, pid_file = self.folder / "rsyncd.conf", self.folder / "rsyncd.pid"
        config.write_text(
            f"address = 127.0.0.1\nport = {port}\nuse chroot = no\npid file = {pid_file}\n"
            f"[bench]\npath = {self.folder}\nread only = no\nuid = {os.getuid()}\n"
            f"gid = {os.getgid()}\n"
        )
        serve = ("rsync", "--daemon", "--no-detach", f"--config={config}")
        with running(*serve, log=self.folder / "rsyncd.log") as server:
            wait_for(lambda: listens(port), "rsync is there")
            cpu = cpu_seconds(server.pid)
            seconds, used = _timed(
                *("rsync", "--sparse", "--whole-file", self.image),
                f"rsync://127.0.0.1:{port}/bench/{self.target.name}",
            )
            # What its child used is known once that has been waited for.
            time.sleep(_REAPED_SECONDS)
            used += cpu_seconds(server.pid) - cpu
        pid_file.unlink(missing_ok=True)
        return seconds, used

    def cp(self) -> tuple[float, float]:
        """A local copy, as a bound."""
        return _timed("cp", "--sparse=always", self.image, self.target)

    def _new_target(self) -> None:
        with self.target.open("wb") as file:
            file.truncate(self.size)


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
    clean_up_when_terminated()
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
            "rsync --sparse to its daemon": (here.rsync, "rsync"),
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
    table([f"{gib:g} GiB of data in {2 * gib:g}", "seconds", "GiB/s", "CPU s per GiB"], rows)


if __name__ == "__main__":
    main()
