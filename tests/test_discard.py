"""Discards and holes through a real mount: the right errno, the right content, space given back."""

import ctypes
import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, unavailable

MIB = 1 << 20
SIZE = 4 * MIB + 512
KEEP, PUNCH, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
libc = ctypes.CDLL(None, use_errno=True)


def fallocate(path: Path, mode: int, offset: int, length: int) -> int:
    """The errno, or 0."""
    fd = os.open(path, os.O_RDWR)
    try:
        failed = libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
        return ctypes.get_errno() if failed else 0
    finally:
        os.close(fd)


def holes(path: Path) -> list[tuple[int, int]]:
    """(begin, end) of all data, as SEEK_DATA and SEEK_HOLE tell."""
    found, at = [], 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return found
            at = os.lseek(fd, data, os.SEEK_HOLE)
            found.append((data, at))
    finally:
        os.close(fd)


@pytest.fixture
def full(tmp_path: Path, fuse: Callable[..., Mount]) -> Mount:
    image = tmp_path / "disk.img"
    image.write_bytes(b"d" * SIZE)
    mount = fuse(image)
    mount.mount()
    return mount


@pytest.mark.parametrize(
    ("mode", "offset", "length", "zeroed"),
    [
        (PUNCH | KEEP, MIB, MIB, (MIB, 2 * MIB)),
        (ZERO, MIB, MIB, (MIB, 2 * MIB)),
        (ZERO | KEEP, MIB, MIB, (MIB, 2 * MIB)),
        (PUNCH | KEEP, 513, 4096, (513, 4609)),
        (ZERO, SIZE - 600, 600, (SIZE - 600, SIZE)),
        (PUNCH | KEEP, 3 * MIB, 1 << 40, (3 * MIB, SIZE)),
        (ZERO | KEEP, 3 * MIB, 1 << 40, (3 * MIB, SIZE)),
        (PUNCH | KEEP, SIZE, MIB, (0, 0)),
        (PUNCH | KEEP, 1 << 40, MIB, (0, 0)),
    ],
)
def test_ranges_become_zeros(
    full: Mount, mode: int, offset: int, length: int, zeroed: tuple[int, int]
) -> None:
    blocks = full.images[0].stat().st_blocks
    assert fallocate(full.disk(), mode, offset, length) == 0
    begin, end = zeroed
    expected = b"d" * begin + bytes(end - begin) + b"d" * (SIZE - end)
    assert full.disk().read_bytes() == expected
    assert full.images[0].read_bytes() == expected
    whole_pages = max(end // 4096 - -(-begin // 4096), 0)
    assert full.images[0].stat().st_blocks <= blocks - 8 * whole_pages
    assert holes(full.disk()) == holes(full.images[0])
    chunks = -(-end // 65536) - begin // 65536 if end > begin else 0
    assert full.changed() == [chunks]


@pytest.mark.parametrize(
    ("mode", "offset", "length", "code"),
    [
        (0, 0, MIB, errno.EOPNOTSUPP),
        (KEEP, 0, MIB, errno.EOPNOTSUPP),
        (0, SIZE, MIB, errno.EOPNOTSUPP),
        (KEEP, SIZE, MIB, errno.EOPNOTSUPP),
        (ZERO, SIZE - 512, 1024, errno.ENOSPC),
        (ZERO, SIZE, 512, errno.ENOSPC),
        (COLLAPSE, 0, 4096, errno.EOPNOTSUPP),
        (INSERT, 0, 4096, errno.EOPNOTSUPP),
        (PUNCH, 0, 4096, errno.EOPNOTSUPP),
        (PUNCH | KEEP, 0, 0, errno.EINVAL),
        (PUNCH | KEEP, -4096, 4096, errno.EINVAL),
        (PUNCH | KEEP, (1 << 63) - 4096, 8192, errno.EFBIG),
    ],
)
def test_what_is_refused_changes_nothing(
    full: Mount, mode: int, offset: int, length: int, code: int
) -> None:
    assert fallocate(full.disk(), mode, offset, length) == code
    assert full.images[0].read_bytes() == b"d" * SIZE
    assert full.disk().stat().st_size == SIZE
    assert full.changed() == [0]


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_device_of_large_blocks_takes_any_range(
    tmp_path: Path,
    loop_device: Callable[..., Path],
    fuse: Callable[..., Mount],
    cache: str,
) -> None:
    """It makes holes of whole blocks only, and nothing tells a guest so."""
    backing = tmp_path / "backing"
    content = bytearray(b"d" * MIB)
    backing.write_bytes(content)
    mount = fuse(loop_device(backing, "--sector-size", "4096"))
    mount.mount("--cache", cache)
    ranges = [(512, 512), (8192, 4096), (16384 - 512, 4608), (65536 - 1, 2), (131072 + 7, 70_001)]
    for (offset, length), mode in zip(ranges, [PUNCH | KEEP, ZERO, ZERO | KEEP] * 2, strict=False):
        assert fallocate(mount.disk(), mode, offset, length) == 0
        content[offset : offset + length] = bytes(length)
        assert mount.disk().read_bytes() == content
    assert mount.changed() == [4]
    mount.unmount()
    assert mount.images[0].read_bytes() == content


def test_a_discard_of_a_whole_sparse_disk_marks_nothing(
    tmp_path: Path, fuse: Callable[..., Mount]
) -> None:
    mount = fuse(tmp_path / "disk.img")
    mount.mount("--create", "1TiB")
    assert fallocate(mount.disk(), PUNCH | KEEP, 0, 1 << 40) == 0
    assert mount.changed() == [0]
    assert holes(mount.disk()) == []


def test_qemu_discards_and_zeroes(full: Mount) -> None:
    commands = ["discard 1M 1M", "write -P 0 3M 512k", "write -P 7 512 512"]
    words = [word for command in commands for word in ("-c", command)]
    options = "driver=raw,discard=unmap,detect-zeroes=unmap,file.driver=file,cache.direct=on"
    where = f"{options},file.filename={full.disk()}"
    try:
        result = subprocess.run(
            ["qemu-io", "--image-opts", "-d", "unmap", "-t", "none", *words, where],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        unavailable("qemu-utils are missing")
    assert result.returncode == 0, result.stdout + result.stderr
    expected = bytearray(b"d" * SIZE)
    expected[512:1024] = b"\x07" * 512
    expected[MIB : 2 * MIB] = bytes(MIB)
    expected[3 * MIB : 3 * MIB + (512 << 10)] = bytes(512 << 10)
    assert full.images[0].read_bytes() == expected
    begins = [MIB, 2 * MIB, 3 * MIB, 3 * MIB + (512 << 10)]
    assert [edge for run in holes(full.disk()) for edge in run][1:-1] == begins
