"""The mount as a user and a guest meet it: real FUSE mounts, through the command line."""

import errno
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, mounts_below

CHUNK = 65536
SIZE = 16 * CHUNK
MakeMount = Callable[..., Mount]
Attach = Callable[[Path], Path]


def make_image(path: Path, size: int = SIZE, seed: int = 1) -> Path:
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


@pytest.fixture
def mounted(fuse: MakeMount, image: Path) -> Mount:
    mount = fuse(image)
    assert mount.mount() == ""
    return mount


def pread(path: Path, size: int, offset: int, flags: int = 0) -> bytes:
    """Read into page-aligned memory, as O_DIRECT wants."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, size) as buffer:
            return buffer[: os.preadv(fd, [buffer], offset)]
    finally:
        os.close(fd)


def pwrite(path: Path, data: bytes, offset: int, flags: int = 0) -> int:
    """Write once, from page-aligned memory."""
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        if not data:
            return os.pwrite(fd, data, offset)
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            return os.pwritev(fd, [buffer], offset)
    finally:
        os.close(fd)


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """A failure says what is wrong in one line, and nothing else."""
    assert result.returncode != 0
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("fusedisk: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# Content


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["cached", "direct"])
def test_reads_and_writes_are_those_of_the_image(mounted: Mount, image: Path, flags: int) -> None:
    wanted = bytearray(image.read_bytes())
    assert pread(mounted.disk(), SIZE, 0, flags) == wanted
    rng = random.Random(7)
    for _ in range(40):
        length = 4096 * rng.randint(1, 48)
        offset = 4096 * rng.randrange(0, (SIZE - length) // 4096 + 1)
        data = rng.randbytes(length)
        assert pwrite(mounted.disk(), data, offset, flags) == length
        wanted[offset : offset + length] = data
        assert pread(mounted.disk(), length, offset, flags) == data
    assert mounted.disk().read_bytes() == wanted
    assert pread(mounted.disk(), SIZE, 0, os.O_DIRECT) == wanted
    mounted.unmount()
    assert image.read_bytes() == wanted


def test_cached_and_direct_see_each_other(mounted: Mount) -> None:
    disk = mounted.disk()
    disk.read_bytes()
    pwrite(disk, b"d" * 4096, 8192, os.O_DIRECT)
    assert pread(disk, 4096, 8192) == b"d" * 4096
    pwrite(disk, b"c" * 4096, 8192)
    assert pread(disk, 4096, 8192, os.O_DIRECT) == b"c" * 4096


def test_unaligned_write_changes_only_its_bytes(mounted: Mount, image: Path) -> None:
    before = image.read_bytes()
    assert pwrite(mounted.disk(), b"xyz", CHUNK - 1) == 3
    after = image.read_bytes()
    assert after == before[: CHUNK - 1] + b"xyz" + before[CHUNK + 2 :]
    assert mounted.changed() == [2]


def test_fsync_and_fdatasync(mounted: Mount, image: Path) -> None:
    with mounted.disk().open("r+b", buffering=0) as file:
        file.write(b"synced")
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    assert image.read_bytes()[:6] == b"synced"


def test_attributes_and_listing(mounted: Mount) -> None:
    assert os.listdir(mounted.mountpoint) == ["disk.img"]
    status = mounted.disk().stat()
    assert status.st_size == SIZE
    assert status.st_mode == 0o100600
    assert os.statvfs(mounted.mountpoint).f_blocks == SIZE // 4096


def test_size_that_is_no_multiple_of_a_page(fuse: MakeMount, tmp_path: Path) -> None:
    image = make_image(tmp_path / "odd.img", SIZE + 513)
    mount = fuse(image)
    mount.mount()
    assert mount.disk().read_bytes() == image.read_bytes()
    assert pwrite(mount.disk(), b"end", SIZE + 510) == 3
    assert image.read_bytes()[-3:] == b"end"
    assert image.stat().st_size == SIZE + 513


# The edges of a disk


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["cached", "direct"])
def test_read_past_the_end_is_empty(mounted: Mount, flags: int) -> None:
    assert pread(mounted.disk(), 4096, SIZE, flags) == b""
    assert pread(mounted.disk(), 4096, SIZE + CHUNK, flags) == b""
    assert len(pread(mounted.disk(), 8192, SIZE - 4096, flags)) == 4096


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["cached", "direct"])
def test_write_past_the_end_is_enospc(mounted: Mount, image: Path, flags: int) -> None:
    before = image.read_bytes()
    for offset in (SIZE, SIZE + CHUNK):
        assert refused(lambda o=offset: pwrite(mounted.disk(), b"x" * 4096, o, flags)) == (
            errno.ENOSPC
        )
    assert refused(lambda: pwrite(mounted.disk(), b"x" * 4096, 0, flags | os.O_APPEND)) == (
        errno.ENOSPC
    )
    assert mounted.disk().stat().st_size == SIZE
    assert image.read_bytes() == before
    assert mounted.changed() == [0]


def test_cached_write_over_the_end_is_partial(mounted: Mount, image: Path) -> None:
    assert pwrite(mounted.disk(), b"y" * 8192, SIZE - 4096) == 4096
    assert image.stat().st_size == mounted.disk().stat().st_size == SIZE
    assert image.read_bytes()[-4096:] == b"y" * 4096
    assert mounted.changed() == [1]


def test_direct_write_over_the_end_never_seems_complete(mounted: Mount, image: Path) -> None:
    # The kernel may turn a short direct write into EIO (fs/fuse/file.c, fuse_get_res_by_io).
    try:
        assert pwrite(mounted.disk(), b"y" * 8192, SIZE - 4096, os.O_DIRECT) == 4096
    except OSError as error:
        assert error.errno == errno.EIO
    assert image.stat().st_size == mounted.disk().stat().st_size == SIZE
    assert pread(mounted.disk(), 4096, SIZE - 4096, os.O_DIRECT) == image.read_bytes()[-4096:]
    assert mounted.changed() == [1]


def test_zero_length_writes_change_nothing(mounted: Mount, image: Path) -> None:
    before = image.read_bytes()
    for offset in (0, SIZE, SIZE + CHUNK):
        assert pwrite(mounted.disk(), b"", offset) == 0
    assert image.read_bytes() == before
    assert mounted.changed() == [0]


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, (1 << 63) - 4096])
def test_huge_offsets(mounted: Mount, offset: int) -> None:
    assert pread(mounted.disk(), 1024, offset) == b""
    code = refused(lambda: pwrite(mounted.disk(), b"x" * 1024, offset))
    assert code in (errno.ENOSPC, errno.EFBIG)
    assert len(mounted.disk().read_bytes()) == SIZE


# What a mount does not allow


def test_namespace_and_size_are_fixed(mounted: Mount, image: Path) -> None:
    before = image.read_bytes()
    disk, other = mounted.disk(), mounted.mountpoint / "other"
    attempts: list[Callable[[], object]] = [
        lambda: os.truncate(disk, 0),
        lambda: os.truncate(disk, SIZE + 4096),
        lambda: os.close(os.open(disk, os.O_WRONLY | os.O_TRUNC)),
        lambda: os.close(os.open(other, os.O_CREAT | os.O_WRONLY)),
        lambda: disk.rename(other),
        lambda: disk.unlink(),
        lambda: other.mkdir(),
        lambda: other.symlink_to(disk),
        lambda: os.link(disk, other),
        lambda: disk.chmod(0o644),
    ]
    for number, attempt in enumerate(attempts):
        assert refused(attempt) == errno.EPERM, number
    os.truncate(disk, SIZE)
    assert os.listdir(mounted.mountpoint) == [disk.name]
    assert image.read_bytes() == before
    assert mounted.changed() == [0]


def test_unknown_names(mounted: Mount) -> None:
    for name in ("other", "disk.im", "disk.img2", ".fusedisk", "x" * 255):
        assert refused(lambda n=name: (mounted.mountpoint / n).stat()) == errno.ENOENT
    assert refused((mounted.disk() / "x").stat) == errno.ENOTDIR


def test_read_only_mount(fuse: MakeMount, image: Path) -> None:
    mount = fuse(image)
    mount.mount("--read-only")
    assert mount.disk().read_bytes() == image.read_bytes()
    assert refused(lambda: pwrite(mount.disk(), b"x", 0)) == errno.EROFS
    mount.unmount()


# Several disks, block devices


def test_two_disks(fuse: MakeMount, tmp_path: Path) -> None:
    images = [make_image(tmp_path / "a"), make_image(tmp_path / "b", 2 * CHUNK, seed=2)]
    mount = fuse(*images)
    mount.mount()
    assert sorted(os.listdir(mount.mountpoint)) == ["a", "b"]
    first = images[0].read_bytes()
    pwrite(mount.disk(1), b"z" * 10, CHUNK)
    assert mount.disk(0).read_bytes() == images[0].read_bytes() == first
    assert mount.disk(1).read_bytes() == images[1].read_bytes()
    assert mount.changed() == [0, 1]


def test_loop_device_as_image(loop_device: Attach, fuse: MakeMount, image: Path) -> None:
    device = loop_device(image)
    mount = fuse(device)
    assert mount.mount() == ""
    wanted = bytearray(image.read_bytes())
    assert mount.disk().stat().st_size == SIZE
    assert mount.disk().read_bytes() == wanted
    pwrite(mount.disk(), b"b" * 4096, CHUNK)
    wanted[CHUNK : CHUNK + 4096] = b"b" * 4096
    assert pread(mount.disk(), SIZE, 0, os.O_DIRECT) == wanted
    assert refused(lambda: pwrite(mount.disk(), b"x", SIZE)) == errno.ENOSPC
    mount.unmount()
    assert image.read_bytes() == wanted
    assert mount.mount() == ""
    assert mount.changed() == [1]
    mount.unmount()
    with device.open("r+b") as file:
        file.write(b"elsewhere")
        os.fsync(file.fileno())
    assert "not trusted" in mount.mount()


# Unmounting, crashes, and whether the change map is believed


def test_busy_mount_is_not_unmounted_and_keeps_serving(mounted: Mount) -> None:
    with mounted.disk().open("r+b", buffering=0) as file:
        assert_one_line(fusedisk("unmount", mounted.mountpoint), "not unmounted")
        assert mounted.mounted
        file.write(b"still here")
        assert pread(mounted.disk(), 10, 0, 0) == b"still here"
    mounted.unmount()


def test_clean_remount_is_silent_and_keeps_the_map(mounted: Mount) -> None:
    for chunk in (0, 3, 15):
        pwrite(mounted.disk(), b"x", chunk * CHUNK)
    assert mounted.changed() == [3]
    for _ in range(2):
        epoch = mounted.status()["epoch"]
        mounted.unmount()
        assert (mounted.state / "clean.json").exists()
        assert mounted.mount() == ""
        assert not (mounted.state / "clean.json").exists()
        assert mounted.changed() == [3]
        assert mounted.status()["epoch"] > epoch


def test_after_a_crash_what_was_in_use_counts_as_changed(mounted: Mount, image: Path) -> None:
    pwrite(mounted.disk(), b"before the crash", 0)
    mounted.crash()
    assert os.listdir(mounted.mountpoint) == []
    said = mounted.mount()
    assert said == "fusedisk: not unmounted cleanly: 1 MiB that were in use will be sent again\n"
    # All of so small a disk is one region.
    assert mounted.changed() == [16]
    assert mounted.disk().read_bytes() == image.read_bytes()
    assert image.read_bytes().startswith(b"before the crash")


def test_image_modified_while_unmounted(mounted: Mount, image: Path) -> None:
    pwrite(mounted.disk(), b"x", 0)
    mounted.unmount()
    with image.open("r+b") as file:
        file.write(b"somebody else")
    said = mounted.mount()
    assert "not trusted" in said
    assert image.name in said
    assert mounted.disk().read_bytes().startswith(b"somebody else")
    mounted.unmount()
    assert mounted.mount() == ""


@pytest.mark.parametrize("lost", ["mount.json", "0.map"])
def test_lost_state_is_said(mounted: Mount, lost: str) -> None:
    pwrite(mounted.disk(), b"x", 0)
    mounted.unmount()
    (mounted.state / lost).unlink()
    assert "not trusted" in mounted.mount()
    mounted.unmount()
    assert mounted.mount() == ""


@pytest.mark.parametrize("damaged", ["clean.json", "mount.json", "0.map"])
def test_damaged_state_is_said(mounted: Mount, damaged: str) -> None:
    mounted.unmount()
    (mounted.state / damaged).write_bytes(b"\0" * 10)
    assert "not trusted" in mounted.mount()
    mounted.unmount()


# Exclusive use


def test_second_mount_of_an_image_is_refused(fuse: MakeMount, mounted: Mount, image: Path) -> None:
    second = fuse(image, name="second")
    assert_one_line(second.try_mount(), "in use")
    assert not second.mounted
    pwrite(mounted.disk(), b"first goes on", 0)
    assert image.read_bytes().startswith(b"first goes on")


def test_mountpoint_in_use_is_refused(fuse: MakeMount, mounted: Mount, tmp_path: Path) -> None:
    other = make_image(tmp_path / "other.img")
    state = tmp_path / "other.state"
    assert_one_line(fusedisk("mount", "--state-dir", state, other, mounted.mountpoint), "not an")
    assert mounted.disk().stat().st_size == SIZE


def test_qemu_is_refused_a_mounted_image(mounted: Mount, image: Path, tmp_path: Path) -> None:
    # Not qemu-img info: for a raw image it takes no locks, whoever has the image open.
    for command in (
        [tool("qemu-img"), "convert", "-f", "raw", str(image), str(tmp_path / "copy")],
        [tool("qemu-io"), "-f", "raw", "-c", "write -P 1 0 512", str(image)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode != 0, command
        assert "lock" in result.stderr
    assert mounted.changed() == [0]
    through = [tool("qemu-img"), "convert", "-f", "raw", "-O", "raw", str(mounted.disk())]
    subprocess.run([*through, str(tmp_path / "copy")], capture_output=True, check=True)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_image_that_qemu_has_open_is_refused(fuse: MakeMount, image: Path) -> None:
    mount = fuse(image)
    qemu = subprocess.Popen(
        [tool("qemu-io"), "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert qemu.stdin is not None and qemu.stdout is not None
    try:
        # The prompt comes after the image was opened.
        assert qemu.stdout.read(4) == b"qemu"
        assert_one_line(mount.try_mount(), "in use")
        assert not mount.mounted
    finally:
        qemu.communicate(timeout=60)
    assert mount.mount() == ""


# Bad input: one line, and nothing has changed


def snapshot(directory: Path) -> dict[str, bytes | None]:
    found = sorted(directory.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["gone.img", "empty"], "gone.img"),
        (["zero.img", "empty"], "0 bytes"),
        (["full", "empty"], "neither"),
        (["disk.img", "full"], "not an empty directory"),
        (["disk.img", "gone"], "gone"),
        (["disk.img", "zero.img"], "zero.img"),
        (["disk.img", "full/disk.img", "empty"], "two images"),
        (["disk.img", "disk.img", "empty"], "two images"),
        (["--create", "100", "new.img", "empty"], "512"),
        (["--create", "0", "new.img", "empty"], "512"),
        (["--create", "lots", "new.img", "empty"], "lots"),
        (["--create", "-1", "new.img", "empty"], "-1"),
        (["--create", "9999999TiB", "new.img", "empty"], "larger"),
        (["--create", "1MiB", "new.img", "zero.img", "empty"], "0 bytes"),
        (["--chunk-size", "5000", "disk.img", "empty"], "power of two"),
        (["--chunk-size", "0", "disk.img", "empty"], "power of two"),
        (["--chunk-size", "2KiB", "disk.img", "empty"], "power of two"),
        (["--chunk-size", "1GiB", "disk.img", "empty"], "power of two"),
        (["--chunk-size", "", "disk.img", "empty"], "size"),
        (["--state-dir", "zero.img", "disk.img", "empty"], "state directory"),
    ],
)
def test_bad_input(
    fuse: MakeMount, image: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    make_image(tmp_path / "full" / "disk.img")
    (tmp_path / "zero.img").touch()
    before = snapshot(tmp_path)
    paths = (
        "disk.img",
        "full/disk.img",
        "gone.img",
        "new.img",
        "zero.img",
        "empty",
        "full",
        "gone",
    )
    result = fusedisk("mount", *(tmp_path / a if a in paths else a for a in arguments))
    assert_one_line(result, word)
    assert snapshot(tmp_path) == before
    assert mounts_below(tmp_path) == []


@pytest.mark.parametrize("command", ["unmount", "status"])
def test_what_is_not_a_mount(tmp_path: Path, command: str) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        assert_one_line(fusedisk(command, path), "not a fusedisk mount")


def test_create_makes_a_sparse_image_and_keeps_an_existing_one(
    fuse: MakeMount, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    mount = fuse(image, tmp_path / "new.img")
    assert mount.mount("--create", "1.5GiB") == ""
    assert [d["size"] for d in mount.status()["disks"]] == [SIZE, 3 << 29]
    assert mount.status()["disks"][1]["allocated"] == 0
    assert image.read_bytes() == before


def test_status_names_the_daemons_that_live(tmp_path: Path, fuse: None) -> None:
    image, mountpoint = tmp_path / "named.img", tmp_path / "named"
    mountpoint.mkdir()
    image.write_bytes(bytes(1 << 20))
    command = Path(sys.executable).with_name("fusedisk")
    subprocess.run([command, "mount", image, mountpoint], check=True)
    try:
        answer = subprocess.run(
            [command, "status", "--json", mountpoint], check=True, capture_output=True
        )
        found = json.loads(answer.stdout)
        for role in ("server", "keeper"):
            words = Path(f"/proc/{found[role]['pid']}/cmdline").read_bytes().split(b"\0")
            assert f"fusedisk.{role}".encode() in words
    finally:
        subprocess.run([command, "unmount", mountpoint], check=True)
