"""A disk that takes its time: whoever waits for it does not keep others waiting."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, wait_for
from faulty_image import FaultyImage
from test_mapped import read_direct

MIB = 1 << 20
SIZE = 64 * MIB
# As many as threads that serve (fusedisk/server.py).
DISKS = 4


@pytest.fixture
def slow(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[int], list[FaultyImage]]]:
    """Make some; to be asked for before ``fuse``, whose mounts lie over these."""
    with ExitStack() as served:

        def make(count: int) -> list[FaultyImage]:
            folders = [tmp_path_factory.mktemp("slow") for _ in range(count)]
            images = [FaultyImage(it, SIZE, f"disk{n}.img") for n, it in enumerate(folders)]
            return [served.enter_context(image.served()) for image in images]

        yield make


def flush(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def flushing(images: list[FaultyImage], mount: Mount) -> Iterator[list[Future[None]]]:
    """A flush of every disk, none of which ends before this does."""
    with ThreadPoolExecutor(len(images)) as pool:
        for image in images:
            image.fail(("fsync", 0, 1, 0))
        try:
            flushes = [pool.submit(flush, mount.disk(n)) for n in range(len(images))]
            for image in images:
                wait_for(lambda it=image: it.seen("fsync"), "the flush has reached the disk")
            yield flushes
        finally:
            for image in images:
                image.fail()


def test_reads_go_on_beside_the_flushes_of_several_disks(
    slow: Callable[[int], list[FaultyImage]], fuse: Callable[..., Mount]
) -> None:
    images = slow(DISKS)
    images[1].backing.write_bytes(b"r" * SIZE)
    mount = fuse(*(image.path for image in images))
    mount.mount()
    with ThreadPoolExecutor(1) as pool:
        with flushing(images, mount) as flushes:
            for length in (4096, MIB):
                reading = pool.submit(read_direct, mount.disk(1), length, 4 * MIB)
                assert reading.result(20) == b"r" * length
            assert not any(flush.done() for flush in flushes)
        for flush in flushes:
            flush.result(20)
    mount.unmount()
    assert mount.mount() == ""


def test_a_flush_in_work_is_waited_for_by_an_upgrade(
    slow: Callable[[int], list[FaultyImage]], fuse: Callable[..., Mount]
) -> None:
    (image,) = slow(1)
    mount = fuse(image.path)
    mount.mount()
    before = mount.server()
    with ThreadPoolExecutor(2) as pool:
        with flushing([image], mount) as (flush,):
            upgrade = pool.submit(fusedisk, "upgrade", mount.mountpoint)
            # Until the server has stopped reading requests.
            while wait([pool.submit(read_direct, mount.disk(), 4096, 0)], 1).done:
                time.sleep(0.05)
            assert mount.server() == before and not flush.done() and not upgrade.done()
        flush.result(20)
        assert upgrade.result(60).returncode == 0
    assert mount.server() != before
    # By the old server, and not again by the new one.
    assert len(image.seen("fsync")) == 1


def test_a_flush_of_a_killed_server_is_done_by_the_next(
    slow: Callable[[int], list[FaultyImage]], fuse: Callable[..., Mount]
) -> None:
    (image,) = slow(1)
    mount = fuse(image.path)
    mount.mount()
    with flushing([image], mount) as (flush,):
        mount.kill_server()
    flush.result(20)
    assert len(image.seen("fsync")) == 2
    wait_for(lambda: mount.status()["server"]["restarts"] == 1, "the next one is on record")
    mount.unmount()
