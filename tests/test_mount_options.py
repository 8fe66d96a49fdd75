"""Options of ``fusedisk mount``, signals, and unusual paths: real mounts."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, mounts_below, processes, wait_for
from test_mount import CHUNK, SIZE, Attach, MakeMount, assert_one_line, make_image, pwrite, refused

STOPPING = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


def start(mount: Mount, *options: str) -> subprocess.Popen[bytes]:
    where = ["--state-dir", str(mount.state)]
    command = [sys.executable, "-m", "fusedisk", "mount", *options, *where]
    return subprocess.Popen(
        [*command, *map(str, mount.images), str(mount.mountpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def usable(mount: Mount) -> bool:
    return mount.mounted and mount.disk().exists()


def stays(command: subprocess.Popen[bytes], image: Path) -> bool:
    """Whether a mount in the foreground has handed its image over and waits for the unmount."""
    folder = Path(f"/proc/{command.pid}/fd")
    return str(image) not in [os.readlink(link) for link in folder.iterdir()]


def said(mount: Mount) -> str:
    log = mount.state / "keeper.log"
    return log.read_text() if log.exists() else ""


# In the foreground


@pytest.mark.parametrize("number", STOPPING)
def test_foreground_stays_and_unmounts_cleanly_at_a_signal(
    fuse: MakeMount, image: Path, number: signal.Signals
) -> None:
    mount = fuse(image)
    command = start(mount, "--foreground")
    wait_for(lambda: usable(mount) and stays(command, image), "it is mounted")
    pwrite(mount.disk(), b"x", CHUNK)
    assert command.poll() is None
    # As Ctrl-C does it: to the whole process group.
    os.killpg(command.pid, number)
    assert command.communicate(timeout=60) == (b"", b"")
    assert command.returncode == 0
    assert not mount.mounted
    assert (mount.state / "clean.json").exists()
    assert mount.mount() == ""
    assert mount.changed() == [1]


def test_foreground_ends_when_unmounted(fuse: MakeMount, image: Path) -> None:
    mount = fuse(image)
    command = start(mount, "-f")
    wait_for(lambda: usable(mount), "it is mounted")
    mount.unmount()
    assert command.communicate(timeout=60) == (b"", b"")
    assert command.returncode == 0


def test_foreground_says_at_once_that_the_map_is_not_trusted(fuse: MakeMount, image: Path) -> None:
    mount = fuse(image)
    mount.mount()
    mount.unmount()
    os.utime(image)
    command = start(mount, "-f")
    assert command.stderr is not None
    assert b"not trusted" in command.stderr.readline()
    assert usable(mount)
    mount.unmount()
    command.communicate(timeout=60)


@pytest.mark.parametrize("foreground", [True, False])
def test_a_busy_mount_survives_sigterm_and_says_so(
    fuse: MakeMount, image: Path, foreground: bool
) -> None:
    mount = fuse(image)
    command = start(mount, *["-f"] * foreground)
    wait_for(lambda: usable(mount), "it is mounted")
    if not foreground:
        command.communicate(timeout=60)
    (keeper,) = processes("fusedisk.keeper", mount.state)
    told = command.pid if foreground else keeper
    with mount.disk().open("r+b", buffering=0) as file:
        os.kill(told, signal.SIGTERM)
        wait_for(lambda: "not unmounted" in said(mount), "the keeper has said that it is busy")
        file.write(b"still served")
        assert mount.mounted
    os.kill(told, signal.SIGTERM)
    mount.wait_ended()
    if foreground:
        command.communicate(timeout=60)
        assert command.returncode == 0
    assert not mount.mounted
    assert image.read_bytes().startswith(b"still served")
    assert mount.mount() == ""


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("delay_steps", range(5))
def test_interrupted_mount_leaves_nothing_mounted(
    fuse: MakeMount, tmp_path: Path, number: signal.Signals, delay_steps: int
) -> None:
    """Whenever the signal comes: the command fails and nothing is there, or it was done before."""
    mount = fuse(tmp_path / "new.img")
    command = start(mount, "--create", "1MiB")
    # Steps that can be awaited, so that the signal meets different phases. Earlier the interpreter
    # is still loading, and signals end it as they end any program.
    reached: list[Callable[[], object]] = [
        lambda: mount.images[0].exists(),
        lambda: mount.state.exists(),
        lambda: (mount.state / "mount.json").exists(),
        lambda: mount.daemons(),
        lambda: mount.mounted,
    ]
    wait_for(lambda: reached[delay_steps]() or command.poll() is not None, "the phase is reached")
    if command.poll() is None:
        os.killpg(command.pid, number)
    _, errors = command.communicate(timeout=60)
    assert b"Traceback" not in errors
    if command.returncode == 0:
        mount.unmount()
    else:
        mount.wait_ended()
        assert not mount.mounted
        assert command.returncode == 1
        assert len(errors.splitlines()) == 1
        assert not mount.images[0].exists()


def test_a_keeper_told_to_stop_while_it_mounts_unmounts_in_order(
    fuse: MakeMount, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes when the kernel has mounted and the keeper does not know it yet."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "fusermount3"
    stub.write_text(
        f'#!/bin/sh\n{shutil.which("fusermount3")} "$@" || exit\n'
        'case " $* " in *" -u "*) ;; *) kill -TERM $PPID ;; esac\n'
    )
    stub.chmod(0o755)
    mount = fuse(image)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    result = mount.try_mount()
    if result.returncode:
        assert_one_line(result)
    mount.wait_ended()
    assert not mount.mounted
    monkeypatch.undo()
    assert mount.mount() == ""


# Read-only


def test_read_only_opens_the_image_read_only(fuse: MakeMount, image: Path) -> None:
    mount = fuse(image)
    mount.mount("--read-only")
    server = mount.server()
    modes = []
    for link in Path(f"/proc/{server}/fd").iterdir():
        if os.readlink(link) == str(image):
            text = Path(f"/proc/{server}/fdinfo/{link.name}").read_text()
            modes.append(int(text.split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
    # The one that serves, and the witness of its flushes.
    assert modes == [os.O_RDONLY, os.O_RDONLY]
    assert refused(lambda: os.truncate(mount.disk(), SIZE)) == errno.EROFS


def test_read_only_keeps_what_is_known_of_changes(fuse: MakeMount, image: Path) -> None:
    mount = fuse(image)
    mount.mount()
    pwrite(mount.disk(), b"x", CHUNK)
    mount.unmount()
    assert mount.mount("--read-only") == ""
    mount.unmount()
    assert mount.mount() == ""
    assert mount.changed() == [1]


# Images and paths


def test_create_makes_several_images(fuse: MakeMount, tmp_path: Path) -> None:
    mount = fuse(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    mount.mount("--create", "1MiB")
    assert [disk["size"] for disk in mount.status()["disks"]] == [1 << 20] * 3
    assert sorted(os.listdir(mount.mountpoint)) == ["a", "b", "c"]


def test_create_takes_back_all_images_when_one_fails(fuse: MakeMount, tmp_path: Path) -> None:
    mount = fuse(tmp_path / "a", tmp_path / "gone" / "b")
    assert_one_line(mount.try_mount("--create", "1MiB"), "gone/b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "name", ["with spaces", "größe-日本", "a,b\\c", "-f", "tab\there", "x" * 200]
)
def test_names_of_mountpoints_and_state_directories(
    fuse: MakeMount, image: Path, name: str
) -> None:
    mount = fuse(image, name=name)
    assert mount.mount() == ""
    pwrite(mount.disk(), b"x", 0)
    assert mount.changed() == [1]
    mount.unmount()
    assert mount.mount() == ""


@pytest.mark.parametrize("name", ["with spaces.img", "größe-日本.img", "-rf", "a,b"])
def test_names_of_images(fuse: MakeMount, tmp_path: Path, name: str) -> None:
    mount = fuse(tmp_path / name)
    mount.mount("--create", "1MiB")
    assert os.listdir(mount.mountpoint) == [name]
    pwrite(mount.disk(), b"x", 0)
    assert mount.changed() == [1]
    mount.unmount()


def test_line_breaks_are_refused(fuse: MakeMount, image: Path, tmp_path: Path) -> None:
    mount = fuse(image, name="a\nb")
    before = sorted(tmp_path.rglob("*"))
    assert_one_line(mount.try_mount(), "mountpoint", "line break")
    assert_one_line(fusedisk("mount", image, mount.mountpoint), "line break")
    (tmp_path / "plain").mkdir()
    result = fusedisk("mount", "--state-dir", mount.state, image, tmp_path / "plain")
    assert_one_line(result, "state directory", "line break")
    (tmp_path / "plain").rmdir()
    assert sorted(tmp_path.rglob("*")) == before


def test_name_of_an_image_that_no_line_can_hold(fuse: MakeMount, tmp_path: Path) -> None:
    mount = fuse(tmp_path / "a\nb")
    assert_one_line(mount.try_mount("--create", "1MiB"), "rename")
    assert list(tmp_path.iterdir()) == [mount.mountpoint]


def test_relative_paths_and_a_symlinked_image(fuse: MakeMount, tmp_path: Path) -> None:
    mount = fuse(tmp_path / "real" / "disk.img")
    (tmp_path / "real").mkdir()
    mount.images[0].write_bytes(bytes(SIZE))
    mount.state = tmp_path / "real" / "disk.img.fusedisk"
    (tmp_path / "alias.img").symlink_to("real/disk.img")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fusedisk", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("mount", "alias.img", "mnt").stderr == ""
    assert os.listdir(mount.mountpoint) == ["alias.img"]
    assert (mount.state / "mount.json").exists()
    assert not (tmp_path / "alias.img.fusedisk").exists()
    assert "alias.img" in run("status", "mnt").stdout
    assert run("unmount", "mnt").returncode == 0


def test_long_state_directory(fuse: MakeMount, image: Path, tmp_path: Path) -> None:
    mount = fuse(image)
    mount.state = tmp_path / ("d" * 150) / ("e" * 150)
    assert mount.mount() == ""
    assert mount.status()["disks"][0]["size"] == SIZE
    mount.unmount()
    assert mount.mount() == ""


def test_size_that_is_no_multiple_of_a_sector(fuse: MakeMount, tmp_path: Path) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(b"o" * (CHUNK + 1))
    mount = fuse(image)
    mount.mount()
    assert mount.disk().stat().st_size == CHUNK + 1
    assert mount.status()["disks"][0]["chunks"] == 2
    pwrite(mount.disk(), b"x", CHUNK)
    assert mount.changed() == [1]


# Bad input


@pytest.mark.parametrize("size", ["10XB", "1e3", "-1", "16384PiB", "16777216TiB", "1 000", "٣"])
def test_nonsense_size_is_a_usage_error(fuse: MakeMount, tmp_path: Path, size: str) -> None:
    mount = fuse(tmp_path / "new.img")
    result = mount.try_mount("--create", size)
    assert result.returncode == 2
    assert_one_line(result, size)
    assert list(tmp_path.iterdir()) == [mount.mountpoint]


def test_size_that_the_file_system_cannot_hold(fuse: MakeMount, tmp_path: Path) -> None:
    mount = fuse(tmp_path / "new.img")
    assert_one_line(mount.try_mount("--create", "1048576TiB"), "new.img")
    assert list(tmp_path.iterdir()) == [mount.mountpoint]


@pytest.mark.parametrize(
    "arguments", [["mount"], ["mount", "x"], ["mount", "--fast", "x", "y"], ["status"], ["moult"]]
)
def test_usage_is_one_line_and_status_2(arguments: list[str]) -> None:
    result = fusedisk(*arguments)
    assert result.returncode == 2
    assert_one_line(result)


def test_help_and_no_arguments() -> None:
    for arguments in (["--help"], ["mount", "--help"]):
        result = fusedisk(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Usage: fusedisk")
    assert "Usage: fusedisk" in fusedisk().stdout + fusedisk().stderr


def test_what_is_mounted_but_not_ours(tmp_path: Path) -> None:
    for command in ("unmount", "status"):
        assert_one_line(fusedisk(command, "/proc"), "not a fusedisk mount")
    assert Path("/proc/self").exists()
    assert mounts_below(tmp_path) == []


def test_loop_device_with_clean_remount(
    loop_device: Attach, fuse: MakeMount, image: Path, tmp_path: Path
) -> None:
    mount = fuse(loop_device(image))
    command = start(mount, "--foreground")
    wait_for(lambda: usable(mount), "it is mounted")
    # The claim keeps others from writing beside us.
    assert refused(lambda: os.open(mount.images[0], os.O_RDWR | os.O_EXCL)) == errno.EBUSY
    pwrite(mount.disk(), b"b" * 4096, 3 * CHUNK)
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=60)
    assert mount.mount() == ""
    assert mount.changed() == [1]
