"""A disk as QEMU uses it: sectors of 512 bytes stay sectors, maps agree, zeroes become holes."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, unavailable
from test_discard import fallocate, holes

SECTOR = 512
SECTORS = 8
WRITES = 200
MIB = 1 << 20
KEEP, PUNCH = 1, 2

# Writes its own sectors by turns, directly; argv: disk, first sector, step.
WRITER = f"""
import mmap, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
buffer = mmap.mmap(-1, 4096)
for number in range(1, {WRITES} + 1):
    for sector in range(int(sys.argv[2]), {SECTORS}, int(sys.argv[3])):
        buffer[:{SECTOR}] = struct.pack("<II", sector, number) * {SECTOR // 8}
        with memoryview(buffer)[:{SECTOR}] as aligned:
            assert os.pwritev(fd, [aligned], sector * {SECTOR}) == {SECTOR}
"""


@pytest.fixture
def mounted(tmp_path: Path, fuse: Callable[..., Mount]) -> Mount:
    mount = fuse(tmp_path / "disk.img")
    mount.mount("--create", "8MiB")
    return mount


def need(program: str) -> None:
    if not shutil.which(program):
        unavailable(f"{program} is missing")


def test_neighbouring_sectors_of_two_processes(mounted: Mount) -> None:
    """Whoever read a block, changed a sector and wrote the block would undo the other's writes."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, mounted.disk(), str(first), "2"])
        for first in range(2)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    expected = b"".join(
        struct.pack("<II", sector, WRITES) * (SECTOR // 8) for sector in range(SECTORS)
    )
    assert mounted.images[0].read_bytes()[: len(expected)] == expected


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
def test_neighbouring_sectors_of_two_guests(mounted: Mount, aio: str) -> None:
    """QEMU without cache, as for a virtio disk: it has to know that 512 bytes can be written."""
    need("qemu-io")
    where = f"driver=file,cache.direct=on,aio={aio},locking=off,filename={mounted.disk()}"

    def start(first: int) -> subprocess.Popen[str]:
        writes = [
            f"write -q -P {number % 255 + 1} {sector * SECTOR} {SECTOR}"
            for number in range(WRITES)
            for sector in range(first, SECTORS, 2)
        ]
        process = subprocess.Popen(
            ["qemu-io", "-t", "none", "--image-opts", where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write("\n".join([*writes, "quit"]) + "\n")
        process.stdin.close()
        return process

    guests = [start(first) for first in range(2)]
    said = []
    for guest in guests:
        assert guest.stdout is not None
        said.append(guest.stdout.read())
    assert [guest.wait(60) for guest in guests] == [0, 0], said
    assert "error" not in "".join(said).lower(), said
    last = (WRITES - 1) % 255 + 1
    assert mounted.images[0].read_bytes()[: SECTORS * SECTOR] == bytes([last]) * SECTORS * SECTOR


def qemu_map(path: Path) -> list[dict[str, object]]:
    need("qemu-img")
    command = ["qemu-img", "map", "--force-share", "--output=json", "-f", "raw", path]
    found: list[dict[str, object]] = json.loads(subprocess.check_output(command))
    return found


def test_qemu_maps_the_disk_as_it_maps_the_image(mounted: Mount) -> None:
    with mounted.disk().open("r+b") as file:
        for offset, length in ((0, 4096), (MIB, 70000), (3 * MIB, MIB), (8 * MIB - 4096, 4096)):
            file.seek(offset)
            file.write(os.urandom(length))
        file.flush()
        os.fsync(file.fileno())
    assert fallocate(mounted.disk(), PUNCH | KEEP, 3 * MIB + 65536, 8192) == 0
    found = qemu_map(mounted.disk())
    assert found == qemu_map(mounted.images[0])
    assert [extent["data"] for extent in found] == [True, False] * 4 + [True]


@pytest.mark.parametrize(
    ("command", "zeroed"),
    [
        ("write -z 1M 1M", True),
        ("write -z -u 1M 1M", True),
        ("discard 1M 1M", True),
        ("write -P 0 1M 1M", True),
        ("write -P 1 1M 1M", False),
    ],
)
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_what_qemu_zeroes_becomes_a_hole(
    mounted: Mount, command: str, zeroed: bool, cache: str
) -> None:
    need("qemu-io")
    with mounted.disk().open("r+b") as file:
        file.write(b"d" * 4 * MIB)
    options = "driver=raw,discard=unmap,detect-zeroes=unmap,file.driver=file"
    options += f",cache.direct={'on' if cache == 'none' else 'off'}"
    result = subprocess.run(
        [
            *("qemu-io", "-d", "unmap", "-t", cache, "-c", command, "-c", "flush"),
            *("--image-opts", f"{options},file.filename={mounted.disk()}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    middle = bytes(MIB) if zeroed else b"\1" * MIB
    assert mounted.images[0].read_bytes()[: 4 * MIB] == b"d" * MIB + middle + b"d" * 2 * MIB
    if zeroed:
        assert holes(mounted.images[0]) == [(0, MIB), (2 * MIB, 4 * MIB)]
        assert mounted.images[0].stat().st_blocks * 512 == 3 * MIB
