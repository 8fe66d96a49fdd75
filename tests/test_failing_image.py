"""A backing that fails: an errno for the guest, the same server, and no acknowledged data lost."""

import errno
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, unavailable
from faulty_image import FaultyImage
from test_discard import KEEP, PUNCH, fallocate
from test_mapped import read_direct

MIB = 1 << 20
SIZE = 12 * MIB
LENGTHS = (4096, MIB)


@pytest.fixture
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyImage]:
    """To be asked for before ``fuse``, whose mounts lie over it."""
    with FaultyImage(tmp_path_factory.mktemp("failing"), SIZE).served() as image:
        yield image


def write_direct(disk: Path, data: bytes, offset: int) -> int:
    """Past the kernel's own cache of the mounted file."""
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            return os.pwritev(fd, [buffer], offset)
    finally:
        os.close(fd)


def code_of(call: Callable[..., object], *arguments: object) -> int:
    """The errno that it fails with."""
    with pytest.raises(OSError) as failed:
        call(*arguments)
    return failed.value.errno or 0


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_every_fault_is_an_errno_and_passes(
    failing: FaultyImage, fuse: Callable[..., Mount], cache: str
) -> None:
    content = bytearray(os.urandom(SIZE))
    failing.backing.write_bytes(content)
    mount = fuse(failing.path)
    mount.mount("--cache", cache)
    disk, before = mount.disk(), mount.server()
    for length in LENGTHS:
        failing.fail(("read", 2 * MIB, 3 * MIB, errno.EIO))
        for _ in range(3):
            assert code_of(read_direct, disk, length, 2 * MIB) == errno.EIO
        assert read_direct(disk, length, 4 * MIB) == content[4 * MIB : 4 * MIB + length]
        failing.fail()
        assert read_direct(disk, length, 2 * MIB) == content[2 * MIB : 2 * MIB + length]
    for code in (errno.EIO, errno.ENOSPC):
        for length in LENGTHS:
            data = os.urandom(length)
            # The larger one fails in its middle.
            failing.fail(("write", 6 * MIB + length // 2, 7 * MIB, code))
            assert code_of(write_direct, disk, data, 6 * MIB) == code
            assert write_direct(disk, data, 8 * MIB) == length
            failing.fail()
            assert write_direct(disk, data, 6 * MIB) == length
            content[6 * MIB : 6 * MIB + length] = content[8 * MIB : 8 * MIB + length] = data
            assert read_direct(disk, length, 6 * MIB) == data
        failing.fail(("fallocate", 10 * MIB, 11 * MIB, code))
        assert fallocate(disk, PUNCH | KEEP, 10 * MIB, MIB) == code
        failing.fail()
        assert fallocate(disk, PUNCH | KEEP, 10 * MIB, MIB) == 0
        content[10 * MIB : 11 * MIB] = bytes(MIB)
        assert write_direct(disk, b"again" * 4096, 10 * MIB) == 5 * 4096
        content[10 * MIB : 10 * MIB + 5 * 4096] = b"again" * 4096
    fail_a_flush(failing, disk)
    assert mount.server() == before
    # After a flush that failed nothing vouches for the image, whatever succeeded since.
    result = fusedisk("unmount", mount.mountpoint)
    assert result.returncode == 1 and "a flush failed" in result.stderr
    mount.wait_ended()
    assert not (mount.state / "clean.json").exists()
    assert failing.backing.read_bytes() == content


def fail_a_flush(failing: FaultyImage, disk: Path) -> None:
    """It is reported, and the next one works."""
    fd = os.open(disk, os.O_RDWR)
    try:
        for code in (errno.EIO, errno.ENOSPC):
            failing.fail(("fsync", 0, 1, code))
            assert code_of(os.fsync, fd) == code
            failing.fail()
            os.fsync(fd)
    finally:
        os.close(fd)


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 8 MiB; to be asked for before ``fuse``."""
    folder = tmp_path_factory.mktemp("small")
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        unavailable(f"no small file system: {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system_is_enospc_and_keeps_what_was_acknowledged(
    small: Path, fuse: Callable[..., Mount]
) -> None:
    image = small / "disk.img"
    image.touch()
    os.truncate(image, 3 * SIZE)
    mount = fuse(image)
    mount.state = mount.mountpoint.with_name("state")
    mount.mount()
    disk, before = mount.disk(), mount.server()
    content = bytearray(3 * SIZE)
    refused = []
    for offset in range(0, 3 * SIZE, MIB):
        data = os.urandom(MIB // 2)
        try:
            assert write_direct(disk, data, offset) == len(data)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused.append(offset)
        else:
            content[offset : offset + len(data)] = data
    assert refused
    for offset in range(0, 3 * SIZE, MIB):
        if offset not in refused:
            data = bytes(content[offset : offset + MIB])
            assert read_direct(disk, MIB, offset) == data
            # In holes too: to read is not to take room.
            assert read_direct(disk, 4096, offset + MIB // 2) == bytes(4096)
    assert fallocate(disk, PUNCH | KEEP, 0, 2 * MIB) == 0
    content[: 2 * MIB] = bytes(2 * MIB)
    data = os.urandom(MIB)
    assert write_direct(disk, data, refused[-1]) == MIB
    content[refused[-1] : refused[-1] + MIB] = data
    assert mount.server() == before
    mount.unmount()
    found = image.read_bytes()
    for offset in range(0, 3 * SIZE, MIB):
        if offset not in refused[:-1]:
            assert found[offset : offset + MIB] == content[offset : offset + MIB]
