"""``fusedisk mount`` for users who are not root, and what others see of a mount: real mounts."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import processes
from test_mount import SIZE, MakeMount, assert_one_line, make_image, pwrite

NOBODY = 65534
# What runs our commands: the interpreter, its packages, and this checkout.
INSTALLED = [Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[1]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img")


def as_other(call: Callable[[], object], uid: int = NOBODY, gid: int = NOBODY) -> int:
    """The errno, or 0, with which ``call`` ends in a process of another user."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            call()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


root_only = pytest.mark.skipif(os.getuid() != 0, reason="changes the user")


@root_only
def test_owner_and_mode_are_seen_and_enforced(
    open_folder: Path, fuse: MakeMount, image: Path
) -> None:
    mount = fuse(image)
    mount.mountpoint = open_folder
    mount.mount("--uid", "1234", "--gid", "4321", "--mode", "640", "--allow-other")
    for path, kind in ((mount.disk(), 0o100640), (mount.mountpoint, 0o040750)):
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode) == (1234, 4321, kind)

    def write() -> None:
        pwrite(mount.disk(), b"owner", 0)

    def read() -> None:
        with mount.disk().open("rb") as file:
            file.read(1)

    assert as_other(write, 1234, 1) == 0
    assert image.read_bytes().startswith(b"owner")
    assert (as_other(read, 1, 4321), as_other(write, 1, 4321)) == (0, errno.EACCES)
    assert as_other(read) == as_other(write) == errno.EACCES


@root_only
def test_without_allow_other_only_the_mounting_user_gets_in(
    open_folder: Path, fuse: MakeMount, image: Path
) -> None:
    mount = fuse(image)
    mount.mountpoint = open_folder
    mount.mount("--uid", str(NOBODY), "--mode", "666")
    assert as_other(lambda: mount.disk().stat()) == errno.EACCES
    assert as_other(lambda: os.listdir(mount.mountpoint)) == errno.EACCES
    assert mount.disk().stat().st_uid == NOBODY


@pytest.mark.parametrize(
    ("option", "value"),
    [("--mode", "999"), ("--mode", "1777"), ("--mode", "rw"), ("--uid", "-1"), ("--gid", "x")],
)
def test_nonsense_owner_and_mode(
    fuse: MakeMount, image: Path, tmp_path: Path, option: str, value: str
) -> None:
    mount = fuse(image)
    before = sorted(tmp_path.rglob("*"))
    result = mount.try_mount(option, value)
    assert result.returncode == 2
    assert_one_line(result, option)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody gets to, as nobody but us does to tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# Arguments: a scratch directory, a device node, then pairs of a directory that must stay reachable
# and its parent that other users cannot pass, which is hidden behind an empty one.
NAMESPACE = r"""
set -e
scratch=$1 node=$2
shift 2
# What other tests have mounted just now would stay mounted here when they let go of it.
for device in $(sed -n 's,^\(/dev/loop[0-9]*\) .*,\1,p' /proc/self/mounts); do
    umount --lazy "$device"
done
umount --all --lazy --types fuse.fusedisk,fuse.fusedisk-point
mount --bind "$node" /dev/fuse
number=0
while [ $# -gt 0 ]; do
    number=$((number + 1))
    mkdir "$scratch/$number"
    mount --bind "$1" "$scratch/$number"
    mountpoint -q "$2" || mount -t tmpfs -o mode=755 tmpfs "$2"
    mkdir -p "$1"
    mount --bind "$scratch/$number" "$1"
    shift 2
done
echo ready
exec cat
"""


def closed_parent(path: Path) -> Path | None:
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


class Somebody:
    """A user who is not root, in a mount namespace whose /dev/fuse has a chosen mode."""

    def __init__(self, home: Path, device_mode: int) -> None:
        self.home = home
        node = home.with_name("fuse")
        os.mknod(node, 0o020000 | device_mode, Path("/dev/fuse").stat().st_rdev)
        node.chmod(device_mode)
        hidden = [(path, closed_parent(path)) for path in INSTALLED]
        pairs = [str(p) for pair in hidden if pair[1] is not None for p in pair]
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", NAMESPACE, "sh"]
        self._holder = subprocess.Popen(
            [*unshare, str(home.parent), str(node), *pairs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        user = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
        enter = ["nsenter", "--mount", f"--target={self._holder.pid}", "setpriv", *user]
        enter += ["env", f"--chdir={self.home}"]
        return subprocess.run(
            [*enter, *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env=dict(os.environ, HOME=str(self.home)),
            check=False,
        )

    def fusedisk(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "fusedisk", *arguments)

    def end(self) -> None:
        for pid in processes("fusedisk.server", self.home / "disk.img.fusedisk"):
            os.kill(pid, signal.SIGKILL)
        self._holder.communicate(timeout=60)


@pytest.fixture
def somebody(open_folder: Path) -> Iterator[Callable[..., Somebody]]:
    if os.getuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("becomes another user, and needs /dev/fuse")
    for name in ("unshare", "nsenter", "setpriv"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    home = open_folder / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    made: list[Somebody] = []

    def make(device_mode: int = 0o666) -> Somebody:
        made.append(Somebody(home, device_mode))
        if made[-1].run(sys.executable, "-c", "import fusedisk").returncode != 0:
            pytest.skip("another user cannot read this checkout")
        return made[-1]

    yield make
    for user in made:
        user.end()


def test_a_user_who_is_not_root(somebody: Callable[..., Somebody]) -> None:
    user = somebody()
    (user.home / "mnt").mkdir()
    os.chown(user.home / "mnt", NOBODY, NOBODY)
    assert user.fusedisk("mount", "--create", "1MiB", "disk.img", "mnt").stderr == ""
    assert (user.home / "disk.img").stat().st_uid == NOBODY
    write = user.run("dd", "if=/dev/zero", "of=mnt/disk.img", "bs=64k", "count=2", "conv=notrunc")
    assert write.returncode == 0, write.stderr
    status = user.fusedisk("status", "mnt")
    assert "2 of 16 chunks" in status.stdout
    result = user.fusedisk("unmount", "mnt")
    assert (result.returncode, result.stderr) == (0, "")
    assert (user.home / "disk.img.fusedisk" / "clean.json").exists()


def test_a_user_whom_the_device_refuses_is_told_so(somebody: Callable[..., Somebody]) -> None:
    user = somebody(0o600)
    (user.home / "mnt").mkdir()
    os.chown(user.home / "mnt", NOBODY, NOBODY)
    result = user.fusedisk("mount", "--create", "1MiB", "disk.img", "mnt")
    assert result.returncode == 1
    assert_one_line(result, "/dev/fuse", "Permission denied")
    assert not (user.home / "disk.img").exists()


def test_a_user_needs_leave_to_allow_others(somebody: Callable[..., Somebody]) -> None:
    if "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
        pytest.skip("this machine allows it")
    user = somebody()
    (user.home / "mnt").mkdir()
    os.chown(user.home / "mnt", NOBODY, NOBODY)
    result = user.fusedisk("mount", "--allow-other", "--create", "1MiB", "disk.img", "mnt")
    assert_one_line(result, "user_allow_other", "/etc/fuse.conf")


def test_read_only_needs_no_write_permission(somebody: Callable[..., Somebody]) -> None:
    user = somebody()
    image = user.home / "disk.img"
    image.write_bytes(b"r" * SIZE)
    image.chmod(0o444)
    (user.home / "mnt").mkdir()
    os.chown(user.home / "mnt", NOBODY, NOBODY)
    assert_one_line(user.fusedisk("mount", "disk.img", "mnt"), "Permission denied", "disk.img")
    assert user.fusedisk("mount", "--read-only", "disk.img", "mnt").stderr == ""
    assert user.run("cmp", "disk.img", "mnt/disk.img").returncode == 0
    assert user.run("sh", "-c", ": >>mnt/disk.img").returncode != 0
    assert user.fusedisk("unmount", "mnt").returncode == 0


@root_only
def test_image_and_mountpoint_that_are_not_ours(somebody: Callable[..., Somebody]) -> None:
    user = somebody()
    secret = user.home / "secret.img"
    secret.write_bytes(bytes(SIZE))
    secret.chmod(0o600)
    (user.home / "roots").mkdir()
    (user.home / "roots" / "mnt").mkdir(mode=0o755)
    before = sorted(user.home.rglob("*"))
    assert_one_line(user.fusedisk("mount", "secret.img", "roots"), "not an empty")
    assert_one_line(user.fusedisk("mount", "secret.img", "roots/mnt"), "Permission denied")
    result = user.fusedisk("mount", "--create", "1MiB", "new.img", "roots/mnt")
    assert_one_line(result, "cannot mount")
    assert [p for p in sorted(user.home.rglob("*")) if "new.img.fusedisk" not in str(p)] == before
