"""Which folios of the page cache a guest's large writes meet, and that the content stays right."""

import ctypes
import mmap
import os
import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Mount
from direct import read_direct, write_direct

MIB = 1 << 20
PAGE = 4096
# Bits of /proc/kpageflags: a page of a folio of more than one (kernel-page-flags.h).
COMPOUND = 1 << 15 | 1 << 16


def in_large_folios(image: Path, offset: int, length: int) -> int:
    """How many pages of a range of an image are cached in folios of more than one page."""
    fd = os.open(image, os.O_RDONLY)
    try:
        with mmap.mmap(fd, length, mmap.MAP_PRIVATE, offset=offset) as view:
            view.madvise(mmap.MADV_RANDOM)
            for at in range(0, length, PAGE):
                view[at]
            start = ctypes.c_char.from_buffer(view)
            frames = _frames(ctypes.addressof(start), length // PAGE)
            del start
    finally:
        os.close(fd)
    with Path("/proc/kpageflags").open("rb", buffering=0) as flags:
        words = (struct.unpack("Q", os.pread(flags.fileno(), 8, frame * 8)) for frame in frames)
        return sum(bool(word & COMPOUND) for (word,) in words)


def _frames(address: int, count: int) -> list[int]:
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), 8 * count, address // PAGE * 8)
    return [entry & ((1 << 55) - 1) for entry in struct.unpack(f"{count}Q", entries)]


@pytest.fixture
def read_through(fuse: Callable[..., Mount], tmp_path: Path) -> Mount:
    """A mount whose disk was read from end to end, a page at a time, and is clean."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        # In one call, which makes large folios where the filesystem has any.
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
    if not os.access("/proc/kpageflags", os.R_OK) or not in_large_folios(image, 0, MIB):
        pytest.skip("this kernel or filesystem shows no large folios")
    mount = fuse(image)
    mount.mount()
    with mount.disk().open("rb", buffering=0) as disk:
        while disk.read(PAGE):
            pass
    # Again, out of the page cache, whose pages are free to go once that is answered.
    read_direct(mount.disk(), MIB, MIB)
    assert in_large_folios(image, 0, 4 * MIB) == 0
    return mount


def test_a_large_write_makes_its_folios_anew(read_through: Mount):
    """Of clean pages; those around it stay as they are."""
    content, image = os.urandom(MIB), read_through.images[0]
    before = image.read_bytes()
    # From the middle of a page of 64 KiB, whose other half is not its own.
    write_direct(read_through.disk(), content, MIB + 32 * 1024)
    whole = MIB // PAGE - 16
    assert in_large_folios(image, MIB, 2 * MIB) == whole
    expected = before[: MIB + 32 * 1024] + content + before[2 * MIB + 32 * 1024 :]
    assert image.read_bytes() == expected
    assert read_through.disk().read_bytes() == expected
    # They are kept, whether dirty or clean.
    for _ in range(2):
        write_direct(read_through.disk(), content, MIB + 32 * 1024)
        assert in_large_folios(image, MIB, 2 * MIB) == whole
        with image.open("r+b") as file:
            os.fsync(file.fileno())


def test_pages_that_the_disk_lacks_are_kept(read_through: Mount):
    """One dirty page in the range, and nothing of it is dropped."""
    image = read_through.images[0]
    before = bytearray(image.read_bytes())
    before[MIB : MIB + PAGE] = page = os.urandom(PAGE)
    write_direct(read_through.disk(), page, MIB)
    before[MIB + PAGE : 2 * MIB + PAGE] = content = os.urandom(MIB)
    write_direct(read_through.disk(), content, MIB + PAGE)
    write_direct(read_through.disk(), content[: MIB // 2], 3 * MIB)
    before[3 * MIB : 3 * MIB + MIB // 2] = content[: MIB // 2]
    write_direct(read_through.disk(), content[:MIB], 3 * MIB)
    before[3 * MIB : 4 * MIB] = content
    assert image.read_bytes() == before
    # The first had a dirty neighbour only; the last had dirty pages that were large already.
    assert in_large_folios(image, 3 * MIB, MIB // 2) == MIB // 2 // PAGE
    assert in_large_folios(image, 3 * MIB + MIB // 2, MIB // 2) == 0


def test_readers_and_writers_of_one_place_see_no_old_bytes(read_through: Mount):
    """Each writer numbers its blocks; a reader never sees less than was written before it asked."""
    image, path = read_through.images[0], read_through.disk()
    done = [0] * 4
    ended = threading.Event()

    def write(area: int) -> None:
        seed = random.Random(area)
        for number in range(1, 60):
            length = seed.choice([PAGE, 128 * 1024, 512 * 1024, MIB])
            # The first block is in each, so that its number is known.
            write_direct(path, struct.pack("Q", number) * (length // 8), area * MIB)
            done[area] = number

    def read(area: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, PAGE) as buffer:
            while not ended.is_set():
                least = done[area]
                assert os.preadv(fd, [buffer], area * MIB) == PAGE
                numbers = struct.unpack(f"{PAGE // 8}Q", buffer)
                if least:
                    assert min(numbers) >= least
        os.close(fd)

    def clean() -> None:
        with image.open("r+b") as file:
            while not ended.is_set():
                os.fsync(file.fileno())

    with ThreadPoolExecutor(9) as threads:
        readers = [threads.submit(read, area) for area in range(4)] + [threads.submit(clean)]
        writers = [threads.submit(write, area) for area in range(4)]
        try:
            for writer in writers:
                writer.result()
        finally:
            ended.set()
        for reader in readers:
            reader.result()
