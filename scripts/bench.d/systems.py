"""The systems that are measured side by side: each serves a raw image as a file."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import run

from fusedisk import keeper

# As many as the disk server has (fusedisk/server.py), with the page cache and past it.
NULL_THREADS = {"writeback": 4, "none": 6}
_HERE = Path(__file__).parent


@contextlib.contextmanager
def raw(image: Path, _folder: Path, _cache: str) -> Iterator[Path]:
    """The image itself."""
    yield image


@contextlib.contextmanager
def fusedisk(image: Path, folder: Path, cache: str) -> Iterator[Path]:
    """This project."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir(exist_ok=True)
    run("fusedisk", "mount", "--cache", cache, image, mountpoint)
    try:
        yield mountpoint / image.name
    finally:
        run("fusedisk", "unmount", mountpoint)


@contextlib.contextmanager
def _daemon(folder: Path, name: str, *words: str) -> Iterator[None]:
    pidfile = folder / f"{name}.pid"
    process = subprocess.Popen(["qemu-storage-daemon", *words, "--pidfile", str(pidfile)])
    try:
        # The daemon writes it once everything it was told to export is there.
        while not pidfile.exists():
            if process.poll() is not None:
                raise SystemExit("qemu-storage-daemon did not start")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()
        pidfile.unlink(missing_ok=True)


def _file_node(image: Path, cache: str) -> tuple[str, str]:
    direct = "on" if cache == "none" else "off"
    return "--blockdev", f"driver=file,node-name=disk,filename={image},cache.direct={direct}"


def _fuse_export(disk: Path) -> tuple[str, str]:
    options = "writable=on,growable=off,allow-other=off"
    return "--export", f"type=fuse,id=export,node-name=disk,mountpoint={disk},{options}"


@contextlib.contextmanager
def qemu(image: Path, folder: Path, cache: str) -> Iterator[Path]:
    """QEMU's FUSE export of the image."""
    disk = folder / "qemu.img"
    disk.touch()
    with _daemon(folder, "qemu", *_file_node(image, cache), *_fuse_export(disk)):
        yield disk


@contextlib.contextmanager
def qemu_chain(image: Path, folder: Path, cache: str) -> Iterator[Path]:
    """Two daemons: QEMU's FUSE export of an NBD export, as its users need for mirroring."""
    disk, socket = folder / "chain.img", folder / "nbd"
    disk.touch()
    listen = ("--nbd-server", f"addr.type=unix,addr.path={socket}")
    nbd = ("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on")
    client = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export=disk"
    with (
        _daemon(folder, "nbd", *_file_node(image, cache), *listen, *nbd),
        _daemon(folder, "fuse", "--blockdev", client, *_fuse_export(disk)),
    ):
        yield disk


def null(image: Path, folder: Path, cache: str) -> contextlib.AbstractContextManager[Path]:
    """A FUSE server that touches no image."""
    return _bare(image, folder, NULL_THREADS[cache])


def bare(image: Path, folder: Path, cache: str) -> contextlib.AbstractContextManager[Path]:
    """A FUSE server that does nothing but read and write an image, by two threads."""
    if cache != "writeback":
        raise SystemExit("the bare server knows no other cache than writeback")
    return _bare(image, folder, 2, image)


@contextlib.contextmanager
def _bare(image: Path, folder: Path, threads: int, *behind: Path) -> Iterator[Path]:
    program, disk = folder / "null_server", folder / "null.img"
    if not program.exists():
        compiler = ["gcc", "-O2", "-pthread", "-o", program, _HERE / "null_server.c"]
        subprocess.run(compiler, check=True)
    disk.touch()
    device = keeper.mount(str(disk), ["fsname=null", "rw"])
    words = [program, str(device), str(image.stat().st_size), str(threads), *behind]
    process = subprocess.Popen(words, pass_fds=[device])
    try:
        yield disk
    finally:
        keeper.unmount(str(disk))
        process.wait()


# Of an image, a folder to work in, and whether the image is cached ("writeback" or "none").
System = Callable[[Path, Path, str], contextlib.AbstractContextManager[Path]]

SYSTEMS: dict[str, System] = {
    "raw image": raw,
    "fusedisk": fusedisk,
    "QEMU": qemu,
    "QEMU over NBD": qemu_chain,
    "null server": null,
    "bare server": bare,
}
# The others only where they are named.
USUAL = list(SYSTEMS)[:5]


def need(*programs: str) -> None:
    """Say which package is missing. Raises SystemExit."""
    packages = {"gcc": "gcc", "fio": "fio", "qemu-storage-daemon": "qemu-system-common"}
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        names = " ".join(packages[p] for p in missing)
        sys.exit(f"{', '.join(missing)} is missing: apt-get install {names}")
