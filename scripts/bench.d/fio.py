"""Running fio on systems that are served side by side, and comparing what it says."""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import MIB, clean_up_when_terminated
from systems import SYSTEMS, need


@dataclass(frozen=True)
class Served:
    """A backing image, and the file in which a guest sees it."""

    image: Path
    path: Path


@contextlib.contextmanager
def images(scratch: Path, names: Sequence[str], size: int) -> Iterator[tuple[dict[str, Path], str]]:
    """A copy of one image for each system, out of the page cache; with the engine for fio."""
    need("fio", "qemu-storage-daemon", "gcc")
    clean_up_when_terminated()
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench-", dir=scratch) as made:
        copies = {}
        for name in names:
            folder = Path(made) / name.replace(" ", "-")
            folder.mkdir()
            copies[name] = folder / "disk.img"
            make_image(copies[name], size)
            settle(copies[name], drop=True)
        yield copies, engine(Path(made))


@contextlib.contextmanager
def served(
    scratch: Path, names: Sequence[str], size: int, cache: str = "writeback"
) -> Iterator[tuple[dict[str, Served], str]]:
    """Serve a copy of one image by each system, all at once; with the engine for fio.

    So those compared run seconds apart and meet the same disturbances.
    """
    with images(scratch, names, size) as (copies, how), contextlib.ExitStack() as systems:
        disks = {}
        for name, image in copies.items():
            opened = systems.enter_context(SYSTEMS[name](image, image.parent, cache))
            disks[name] = Served(image, opened)
            read_through(opened)
        yield disks, how


def fio(*words: str) -> list[dict[str, Any]]:
    """Run fio with direct I/O; what it says of each job."""
    result = subprocess.run(
        ["fio", "--output-format=json", "--direct=1", "--randrepeat=0", *words],
        check=False,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"fio: {result.stderr or result.stdout}")
    jobs: list[dict[str, Any]] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
    return jobs


def make_image(path: Path, size: int) -> None:
    """Written from end to end, so that no system meets a hole or an unwritten extent."""
    with path.open("wb") as file:
        piece = os.urandom(MIB)
        for _ in range(size // MIB):
            file.write(piece)
        os.fsync(file.fileno())


def engine(scratch: Path) -> str:
    """io_uring, or libaio where the kernel refuses that."""
    words = ["fio", "--name=try", "--ioengine=io_uring", "--size=4k", f"--filename={scratch}/try"]
    tried = subprocess.run(words, check=False, capture_output=True)
    return "libaio" if tried.returncode else "io_uring"


def settle(image: Path, *, drop: bool = False) -> None:
    """Write back what earlier runs left behind, and forget what they cached."""
    fd = os.open(image, os.O_RDWR)
    try:
        os.fsync(fd)
        if drop:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_through(disk: Path) -> None:
    """Let a system fill the page cache in its own way, so that none is measured on a cold one."""
    words = ["dd", f"if={disk}", "of=/dev/null", "bs=1M", "iflag=direct", "status=none"]
    subprocess.run(words, check=True)


def ratio(ours: list[float], others: list[float]) -> float:
    """The median over rounds: what ran side by side met the same disturbances."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))
