"""A guest's disk with a replica, by this project and by a QEMU mirror, for what is measured on it.

The guest is fio. Ours is a file in the mount; QEMU's is the NBD export of the daemon that mirrors,
by fio's own NBD client: one hop from the guest to the server for both.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from common import Bench, run, wait_for
from fio import fio, read_through
from processes import Qmp, free_port, listens, running

Through = Callable[[str], contextlib.AbstractContextManager[str]]
"""Puts something between two ends: the address to connect to, of the address that listens."""


@contextlib.contextmanager
def directly(address: str) -> Iterator[str]:
    """Nothing between two ends."""
    yield address


class Replicated(Protocol):
    """A disk, and its replica once that was begun."""

    def write(self, *words: str) -> dict[str, Any]:
        """Let the guest write 4 KiB blocks at random places; what fio says of the writes."""

    def begin(self) -> None:
        """Begin the first fill; returns while it runs."""

    def filling(self) -> bool:
        """Whether the first fill runs."""


def _random_writes(*words: str) -> dict[str, Any]:
    (job,) = fio("--name=guest", "--rw=randwrite", "--bs=4k", "--iodepth=1", *words)
    written: dict[str, Any] = job["write"]
    return written


class Ours:
    """This project's."""

    def __init__(self, here: Bench, address: str) -> None:
        self._here, self._address = here, address

    def write(self, *words: str) -> dict[str, Any]:
        """Let the guest write 4 KiB blocks at random places; what fio says of the writes."""
        return _random_writes("--ioengine=psync", f"--filename={self._here.disk}", *words)

    def begin(self) -> None:
        """Begin the first fill; returns while it runs."""
        where = self._here.mountpoint, self._address
        self._here.spawn("start", "--name", "r", "--rpo", "1", *where)
        wait_for(lambda: self._here.status().get("state") in ("filling", "following"), "it fills")

    def filling(self) -> bool:
        """Whether the first fill runs."""
        return self._here.status().get("state") != "following"


@contextlib.contextmanager
def ours(folder: Path, image: Path, chunk: str, through: Through) -> Iterator[Ours]:
    """An image that is mounted, and a receiver."""
    here = Bench(folder)
    here.image = image
    here.address = f"tcp://127.0.0.1:{free_port()}"
    try:
        run("fusedisk", "mount", "--chunk-size", chunk, image, here.mountpoint)
        read_through(here.disk)
        here.receive()
        with through(here.address) as address:
            yield Ours(here, address)
            here.end_processes()
        run("replicator", "forget", here.mountpoint, "--name", "r")
    finally:
        here.close()


class Mirrored:
    """A QEMU mirror's."""

    def __init__(self, qmp: Qmp, guest: Path, address: str, size: int) -> None:
        self._qmp, self._address, self._size = qmp, address, size
        self._uri = f"nbd+unix:///s?socket={guest}"

    def write(self, *words: str) -> dict[str, Any]:
        """Let the guest write 4 KiB blocks at random places; what fio says of the writes."""
        return _random_writes(
            "--ioengine=nbd", f"--uri={self._uri}", f"--size={self._size}", *words
        )

    def begin(self) -> None:
        """Begin the first fill; returns while it runs."""
        host, _, port = self._address.removeprefix("tcp://").rpartition(":")
        server = {"type": "inet", "host": host, "port": port}
        node = {"node-name": "n"}
        self._qmp.call("blockdev-add", driver="nbd", server=server, export="t", **node)
        job = {"job-id": "j", "device": "s", "target": "n", "sync": "full"}
        self._qmp.call("blockdev-mirror", **job)

    def filling(self) -> bool:
        """Whether the first fill runs."""
        (job,) = self._qmp.call("query-block-jobs")
        return not job["ready"]


@contextlib.contextmanager
def mirrored(folder: Path, image: Path, through: Through) -> Iterator[Mirrored]:
    """A daemon that serves an image and can mirror it, and one that exports the target."""
    size = image.stat().st_size
    read_through(image)
    target, guest, monitor = folder / "target.img", folder / "guest", folder / "qmp"
    with target.open("wb") as file:
        file.truncate(size)
    port = free_port()
    export = running(
        *("qemu-storage-daemon", "--blockdev"),
        f"driver=file,node-name=t,filename={target},discard=unmap",
        *("--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"),
        *("--export", "type=nbd,id=e,node-name=t,writable=on"),
        log=folder / "export.log",
    )
    server = running(
        *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=s,filename={image}"),
        *("--nbd-server", f"addr.type=unix,addr.path={guest}"),
        *("--export", "type=nbd,id=e,node-name=s,writable=on"),
        *("--chardev", f"socket,id=m,path={monitor},server=on,wait=off"),
        *("--monitor", "chardev=m"),
        log=folder / "server.log",
    )
    with export, through(f"tcp://127.0.0.1:{port}") as address, server:
        wait_for(lambda: listens(port), "the export is there")
        wait_for(guest.exists, "the server is there")
        qmp = Qmp(monitor)
        yield Mirrored(qmp, guest, address, size)
        qmp.close()
