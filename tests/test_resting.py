"""Threads that rest while a guest writes in a row: some do, and nobody waits for them."""

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from faulty_image import FaultyImage

MIB = 1 << 20
SIZE = 64 * MIB
# More than make a row (fusedisk/resting.pyx), and into all regions of the activity log.
ROW = SIZE // MIB


@pytest.fixture
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyImage]:
    """To be asked for before ``fuse``, whose mount lies over it."""
    with FaultyImage(tmp_path_factory.mktemp("slow"), SIZE).served() as image:
        yield image


@pytest.fixture
def two_processors() -> Iterator[None]:
    """What is started meanwhile may use two; where there are more, fewer threads rest, or none."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    yield
    os.sched_setaffinity(0, before)


@contextmanager
def opened(disk: Path) -> Iterator[int]:
    """For direct I/O, once for all: to open it and to close it are requests, too."""
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def write_mib(fd: int, at: int) -> None:
    with mmap.mmap(-1, MIB) as buffer:
        assert os.pwrite(fd, buffer, at) == MIB


def read_page(fd: int, at: int) -> bytes:
    with mmap.mmap(-1, 4096) as buffer:
        return buffer[: os.preadv(fd, [buffer], at)]


def write_row(fd: int, first: int = 0) -> None:
    for number in range(first, ROW):
        write_mib(fd, number * MIB)


@contextmanager
def writing(fd: int, first: int = 0) -> Iterator[None]:
    """One large write after the other, of a single writer, who waits for nobody's turn."""
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            write_row(fd, first)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def at_rest(server: int) -> int:
    """How many of the threads that serve wait, but not for the kernel's requests."""
    waiting = 0
    for task in Path(f"/proc/{server}/task").iterdir():
        # A thread may have ended since.
        with suppress(FileNotFoundError, ProcessLookupError):
            serves = (task / "comm").read_text().startswith("serve")
            waiting += serves and "futex" in (task / "wchan").read_text()
    return waiting


@pytest.mark.usefixtures("two_processors")
def test_two_of_four_threads_rest_in_a_row(fuse: Callable[..., Mount], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    mount = fuse(image)
    mount.mount()
    with opened(mount.disk()) as fd:
        with writing(fd):
            wait_for(lambda: at_rest(mount.server()) == 2, "two threads rest")
        wait_for(lambda: at_rest(mount.server()) == 0, "all serve again")


@pytest.mark.usefixtures("two_processors")
def test_who_rests_steps_in_for_those_that_are_stuck(
    slow: FaultyImage, fuse: Callable[..., Mount]
) -> None:
    mount = fuse(slow.path)
    mount.mount()
    with opened(mount.disk()) as fd, ThreadPoolExecutor(4) as pool:
        write_row(fd)
        before = len(slow.seen("write"))
        slow.fail(("write", 0, SIZE, 0))
        try:
            places = [40 * MIB, 44 * MIB, 48 * MIB]
            writes = [pool.submit(write_mib, fd, at) for at in places]
            wait_for(lambda: len(slow.seen("write")) > before, "a write is stuck")
            # Two threads at work cannot end; the third write and this are for those at rest.
            reading = pool.submit(read_page, fd, 0)
            assert reading.result(20) == bytes(4096)
            assert not any(write.done() for write in writes)
        finally:
            slow.fail()
        for write in writes:
            write.result(20)


@pytest.mark.usefixtures("two_processors")
def test_nobody_rests_while_others_are_held_up(
    slow: FaultyImage, fuse: Callable[..., Mount]
) -> None:
    mount = fuse(slow.path)
    mount.mount()
    with opened(mount.disk()) as fd, ThreadPoolExecutor(2) as pool:
        before = len(slow.seen("read"))
        slow.fail(("read", 0, SIZE, 0))
        try:
            reads = [pool.submit(read_page, fd, at) for at in (0, 8 * MIB)]
            wait_for(lambda: len(slow.seen("read")) == before + 2, "both reads are stuck")
            # Elsewhere, since the pages that are being read are locked.
            with writing(fd, 16):
                for _ in range(200):
                    assert at_rest(mount.server()) == 0
            assert not any(read.done() for read in reads)
        finally:
            slow.fail()
        for read in reads:
            read.result(20)
