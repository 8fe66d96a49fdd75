"""Reads come out of a mapping of the image: what is wrong with the image stays an errno."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from direct import read_direct

MIB = 1 << 20


def server_memory(mount: Mount, field: str) -> int:
    """A figure of the server's /proc/PID/status in bytes."""
    status = Path(f"/proc/{mount.server()}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def test_reads_follow_writes_holes_and_changes_of_size(fuse: Callable[..., Mount], tmp_path: Path):
    """Of all lengths, whether the pages are cached, written, punched or new."""
    content = bytearray(os.urandom(4 * MIB))
    image = tmp_path / "disk.img"
    image.write_bytes(content)
    mount = fuse(image)
    mount.mount()
    seed = random.Random(5)
    with mount.disk().open("r+b", buffering=0) as disk, image.open("rb") as file:
        for _ in range(300):
            offset = seed.randrange(len(content) // 512) * 512
            length = min(seed.choice([512, 4096, 69632, MIB]), len(content) - offset)
            what = seed.randrange(4)
            if what == 0:
                content[offset : offset + length] = data = seed.randbytes(length)
                assert os.pwrite(disk.fileno(), data, offset) == length
                os.fsync(disk.fileno())
            elif what == 1:
                content[offset : offset + length] = bytes(length)
                words = ["fallocate", "-p", "-o", str(offset), "-l", str(length), str(mount.disk())]
                subprocess.run(words, check=True)
            elif what == 2:
                # As if memory had been short: mapped pages stay, the others go.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert read_direct(mount.disk(), length, offset) == content[offset : offset + length]


@pytest.mark.parametrize("length", [4096, MIB])
def test_image_cut_short_is_an_error_and_no_crash(
    fuse: Callable[..., Mount], tmp_path: Path, length: int
):
    """The mapped pages behind the new end are gone: SIGBUS for who touches them."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 * MIB))
    mount = fuse(image)
    mount.mount()
    before = mount.server()
    assert len(read_direct(mount.disk(), length, 2 * MIB)) == length
    os.truncate(image, MIB)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            read_direct(mount.disk(), length, 2 * MIB)
    os.truncate(image, 4 * MIB)
    assert read_direct(mount.disk(), length, 2 * MIB) == bytes(length)
    assert mount.server() == before


def test_page_tables_are_given_back(fuse: Callable[..., Mount], tmp_path: Path):
    """After reading more than they may stand for; readers meanwhile notice nothing."""
    size = 20 << 30
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, size)
    with image.open("r+b") as file:
        # Every 2 MiB of the image take a page of page tables, once one page there was read.
        for offset in range(0, size, 2 * MIB):
            os.pwrite(file.fileno(), offset.to_bytes(8, "little"), offset)
    mount = fuse(image)
    mount.mount()
    before = server_memory(mount, "VmPTE")
    for offset in range(0, size, 2 * MIB):
        assert read_direct(mount.disk(), 4096, offset)[:8] == offset.to_bytes(8, "little")
    # Read in all were 40 MiB of them. What came after they were given back, at 32 MiB, stays.
    wait_for(lambda: server_memory(mount, "VmPTE") < before + (16 << 20), "they are given back")
