"""First fill over loopback TCP, beside a QEMU mirror, nbdcopy, rsync and cp, in one run.

Every system copies the same image, half of it random data, to a new file on the same filesystem,
in turns that begin with another one each round, from an image that is in the page cache. What is
counted is the copying alone, not the start of the programs: up to where all was sent, and up to
where it is durable. Ours hashes at both ends and syncs the replica; the copies of the others, who
hash nothing, are synced by the benchmark when they are done, in the same count.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import BIN, GIB, MIB, clean_up_when_terminated, run, scratch_parser, table, wait_for
from freememory import little_free, recall
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


class Copied(NamedTuple):
    """Seconds until all was sent and until it was durable, and seconds of CPU for both."""

    sent: float
    durable: float
    cpu: float


class Copies:
    """The systems; each leaves ``target`` behind.

    Memory is recalled when all is ready, since soon after that it is given back again.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.image = folder / "disk.img"
        self.mountpoint = folder / "mnt"
        self.target = folder / "target.img"
        self.mountpoint.mkdir()

    def fusedisk(self) -> Copied:
        """A first fill, from the state filling to the state following."""
        store = self.folder / "store"
        store.mkdir()
        heard, sent = self.folder / "receiver.log", self.folder / "sender.log"
        address = f"tcp://127.0.0.1:{free_port()}"
        receive = (BIN / "replicator", "receive", "--store", store, address)
        start = (BIN / "replicator", "start", "--name", "r", self.mountpoint, address)
        with running(*receive, log=heard) as receiver:
            wait_said(heard, "listening", receiver)
            recall()
            with running(*start, log=sent) as sender:
                wait_said(sent, "filling", sender)
                begun, cpu = time.monotonic(), cpu_seconds(sender.pid, receiver.pid)
                wait_said(sent, "all is sent", sender)
                seconds = time.monotonic() - begun
                wait_said(sent, "following", sender)
                durable = time.monotonic() - begun
                used = cpu_seconds(sender.pid, receiver.pid) - cpu
        run("replicator", "forget", self.mountpoint, "--name", "r")
        (store / "r" / self.image.name).rename(self.target)
        shutil.rmtree(store)
        return Copied(seconds, durable, used)

    def qemu(self) -> Copied:
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
            recall()
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
        return self._synced(seconds, used)

    def nbdcopy(self) -> Copied:
        """Nbdcopy to nbdkit's file plugin, told that the target is empty."""
        port = free_port()
        self._new_target()
        serve = ("nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", self.target)
        with running(*serve, log=self.folder / "nbdkit.log") as server:
            wait_for(lambda: listens(port), "nbdkit is there")
            recall()
            cpu = cpu_seconds(server.pid)
            seconds, used = _timed(
                "nbdcopy", "--destination-is-zero", self.image, f"nbd://127.0.0.1:{port}"
            )
            return self._synced(seconds, used + cpu_seconds(server.pid) - cpu)

    def rsync(self) -> Copied:
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
            recall()
            cpu = cpu_seconds(server.pid)
            seconds, used = _timed(
                *("rsync", "--sparse", "--whole-file", self.image),
                f"rsync://127.0.0.1:{port}/bench/{self.target.name}",
            )
            # What its child used is known once that has been waited for.
            time.sleep(_REAPED_SECONDS)
            used += cpu_seconds(server.pid) - cpu
        pid_file.unlink(missing_ok=True)
        return self._synced(seconds, used)

    def cp(self) -> Copied:
        """A local copy, as a bound."""
        recall()
        return self._synced(*_timed("cp", "--sparse=always", self.image, self.target))

    def _synced(self, sent: float, cpu: float) -> Copied:
        begun, used = time.monotonic(), time.process_time()
        with self.target.open("rb") as file:
            os.fsync(file.fileno())
        durable = sent + time.monotonic() - begun
        return Copied(sent, durable, cpu + time.process_time() - used)

    def _new_target(self) -> None:
        with self.target.open("wb") as file:
            file.truncate(self.size)


def _warm(image: Path) -> None:
    """Bring an image into the page cache, out of which the mount or want of memory may have put it.

    With the kernel's readahead, as whoever wrote or copied the image would have left it.
    """
    subprocess.run(["dd", f"if={image}", "of=/dev/null", "bs=1M", "status=none"], check=True)


def _timed(*words: str | Path) -> tuple[float, float]:
    begun = time.monotonic()
    process = subprocess.Popen([str(word) for word in words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{words[0]} failed")
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime


def in_turn(
    here: Copies, systems: dict[str, Callable[[], Copied]], rounds: int
) -> dict[str, list[Copied]]:
    """Each system once a round, which begins with another one each time."""
    figures: dict[str, list[Copied]] = {name: [] for name in systems}
    for number in range(rounds):
        names = deque(systems)
        names.rotate(-number)
        for name in names:
            _warm(here.image)
            figures[name].append(systems[name]())
            # Once is enough: the image is the same.
            if len(figures[name]) == 1:
                subprocess.run(["cmp", here.image, here.target], check=True)
            here.target.unlink()
    return figures


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
        systems: dict[str, tuple[Callable[[], Copied], str]] = {
            "fusedisk (xxh3 at both ends)": (here.fusedisk, "replicator"),
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
        there = {name: copy for name, (copy, _) in systems.items() if name not in missing}
        run("fusedisk", "mount", here.image, here.mountpoint)
        try:
            with little_free(size):
                figures = in_turn(here, there, arguments.rounds)
        finally:
            run("fusedisk", "unmount", here.mountpoint)
    finally:
        shutil.rmtree(folder)
    gib = size / 2 / GIB
    rows = []
    for name, found in figures.items():
        sent, durable, used = (statistics.median(column) for column in zip(*found, strict=True))
        speeds = (f"{sent:.2f}", f"{gib / sent:.2f}", f"{durable:.2f}", f"{gib / durable:.2f}")
        rows.append([name, *speeds, f"{used / gib:.2f}"])
    rows += [[name, "not installed", *4 * ["-"]] for name in missing]
    columns = ["sent (s)", "GiB/s", "durable (s)", "GiB/s", "CPU s per GiB"]
    table([f"{gib:g} GiB of data in {2 * gib:g}", *columns], rows)


if __name__ == "__main__":
    main()
