"""A mount whose images are read and written past the page cache."""

import ctypes
import mmap
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from faulty_image import FaultyImage
from test_replication import Pair, pair
from verifying_load import Load, cut_over, kill_server, mount_disks, replicated

from fusedisk.changemap import ChangeMap, Control
from fusedisk.disk import Disk

__all__ = ["pair"]

MIB = 1 << 20
KILLS = int(os.environ.get("FUSEDISK_SERVER_KILLS", "4"))


def cached_pages(path: Path) -> int:
    """How many pages of a file the page cache holds (mincore(2))."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
        )
        return sum(page & 1 for page in found)


def test_the_page_cache_stays_empty_and_every_length_is_served(
    fuse: Callable[..., Mount], tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    content = bytearray(os.urandom(4 * MIB))
    image.write_bytes(content)
    mount = fuse(image)
    mount.mount("--cache", "none")
    chance = random.Random(7)
    fd = os.open(mount.disk(), os.O_RDWR)
    try:
        for _ in range(200):
            offset = chance.randrange(len(content))
            length = min(chance.choice([1, 700, 4096, 70_001, MIB]), len(content) - offset)
            if chance.random() < 0.7:
                content[offset : offset + length] = data = chance.randbytes(length)
                assert os.pwrite(fd, data, offset) == length
            assert os.pread(fd, length, offset) == content[offset : offset + length]
        os.fsync(fd)
    finally:
        os.close(fd)
    assert cached_pages(image) == 0
    mount.unmount()
    assert image.read_bytes() == content


def test_neighbours_in_one_block_do_not_undo_each_other(
    fuse: Callable[..., Mount], tmp_path: Path
) -> None:
    """Direct writes of less than a block reach the server side by side."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    mount = fuse(image)
    mount.mount("--cache", "none")
    rounds, writers, piece = 400, 4, 64

    def write(writer: int) -> None:
        fd = os.open(mount.disk(), os.O_RDWR | os.O_DIRECT)
        try:
            for number in range(1, rounds + 1):
                data = number.to_bytes(4, "little") * (piece // 4)
                assert os.pwrite(fd, data, (number % 4 * writers + writer) * piece) == piece
        finally:
            os.close(fd)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    mount.unmount()
    content = image.read_bytes()
    for slot in range(4 * writers):
        last = max(n for n in range(1, rounds + 1) if n % 4 == slot // writers)
        expected = last.to_bytes(4, "little") * (piece // 4)
        assert content[slot * piece : (slot + 1) * piece] == expected


def test_a_hole_beside_a_small_write_in_its_block_stays(tmp_path: Path) -> None:
    """The write has read the block's old bytes already, and puts them back."""
    image = FaultyImage(tmp_path, MIB)
    image.backing.write_bytes(b"o" * MIB)
    control = Control.create(tmp_path / "control", 1)
    changes = ChangeMap.create(tmp_path / "map", MIB, 65536)
    with image.served(), ThreadPoolExecutor(2) as pool:
        fd = os.open(image.path, os.O_RDWR | os.O_DIRECT)
        try:
            disk = Disk(control, changes, fd)
            image.fail(("read", 0, 4096, 0))
            writing = pool.submit(disk.write, b"w" * 512, 0)
            try:
                wait_for(lambda: image.seen("read"), "the block is read")
                zeroing = pool.submit(disk.zero, 512, 4096 - 512)
                # Time enough for a hole that does not wait for the write.
                wait([zeroing], 0.5)
            finally:
                image.fail()
            assert writing.result(20) == 512
            zeroing.result(20)
        finally:
            os.close(fd)
    assert image.backing.read_bytes()[:4097] == b"w" * 512 + bytes(4096 - 512) + b"o"


def test_servers_killed_under_cached_and_direct_writers(
    fuse: Callable[..., Mount], tmp_path: Path
) -> None:
    """In and across blocks, with a replica beside them."""
    mount = mount_disks(tmp_path, fuse, "--cache", "none")
    load = Load(mount)
    chance = random.Random(KILLS)
    try:
        with replicated(mount, tmp_path) as replica:
            for _ in range(KILLS):
                load.progress()
                time.sleep(chance.uniform(0, 0.4))
                kill_server(mount)
            load.progress()
            load.end()
            cut_over(mount)
        load.verify([replica / image.name for image in mount.images])
    finally:
        load.stop()
    mount.unmount()
    load.verify(mount.images)


def test_a_sender_reads_past_the_cache_too(pair: Pair) -> None:
    """Comparison by hash, passes and verification of an image that is never cached."""
    pair.mount.unmount()
    pair.mount.mount("--cache", "none")
    pair.receive()
    sender = pair.start("--rpo", "0.1")
    pair.wait_following(sender)
    assert all(cached_pages(image) == 0 for image in pair.images)
    fd = os.open(pair.mount.disk(), os.O_RDWR | os.O_DIRECT)
    try:
        for number in range(20):
            with mmap.mmap(-1, 4096) as block:
                block[:8] = number.to_bytes(8, "little")
                os.pwrite(fd, block, number * 65536)
    finally:
        os.close(fd)
    pair.wait_identical()
    pair.stop(sender)


@pytest.mark.parametrize("size", [MIB + 100, 513])
def test_an_image_that_does_not_end_with_a_block_is_refused(
    fuse: Callable[..., Mount], tmp_path: Path, size: int
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(size))
    mount = fuse(image)
    refused = mount.try_mount("--cache", "none")
    assert refused.returncode == 1 and "leave out --cache none" in refused.stderr
    mount.mount()
