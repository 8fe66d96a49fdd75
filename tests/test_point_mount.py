"""Recovery points mounted: read and written by real programs while replication goes on."""

import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import mounts_below, processes, unavailable, wait_for
from guest import Guest
from test_clones import MakeFilesystem, filesystem
from test_points import run
from test_replication import Pair, guest_write, pair

from replicator.manifest import ReplicaDisk
from replicator.replica import Replica
from replicator.scratch import Room, Scratch
from replicator.store import Store

__all__ = ["filesystem", "pair"]
MIB = 1 << 20


class View:
    """A directory on which points are mounted."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir()

    def mount(self, replica: Path, *options: str | Path) -> None:
        result = run("mount", *options, replica, self.mountpoint)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def unmount(self) -> None:
        result = run("unmount", self.mountpoint)
        assert (result.returncode, result.stderr) == (0, "")

    def servers(self) -> list[int]:
        return processes("mount", self.mountpoint)

    def digests(self) -> list[str]:
        return [digest(path) for path in sorted(self.mountpoint.iterdir())]

    def clean_up(self) -> None:
        if str(self.mountpoint) in mounts_below(self.mountpoint):
            subprocess.run(["fusermount3", "-u", "-z", self.mountpoint], check=True)
        wait_for(lambda: not self.servers(), "the view's process has ended")


@pytest.fixture
def view(tmp_path: Path) -> Iterator[View]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        unavailable("/dev/fuse is missing or not ours to use")
    made = View(tmp_path / "view")
    yield made
    made.clean_up()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def points(replica: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run("points", "--json", replica).stdout)["points"]
    return found


class Replicated:
    """A pair that replicates, and a replica that keeps the newest three points."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.replica = pair.store / "r"
        receiver = pair.run("receive", "--store", pair.store, "--keep", "3", pair.address)
        wait_for(lambda: receiver.out.read_text().endswith("\n"), "the receiver listens")
        pair.address = receiver.out.read_text().removeprefix("listening on ").strip()
        self.receiver = receiver
        pair.wait_following(pair.start())
        self.step()

    def step(self) -> tuple[int, list[str]]:
        """The guest writes; the newest point after it, and the digests of the disks then."""
        before = points(self.replica)[-1:]
        guest_write(self.pair.mount.disk(), os.urandom(30_000), random.randrange(MIB))
        wait_for(lambda: points(self.replica)[-1:] != before, "there is another point")
        self.pair.wait_identical()
        newest = points(self.replica)[-1]["id"]
        assert isinstance(newest, int)
        return newest, [digest(image) for image in self.pair.images]


@pytest.mark.parametrize("kind", ["undo", "clone"])
def test_a_point_stays_mounted_while_replication_goes_on(
    filesystem: MakeFilesystem, pair: Pair, view: View, kind: str
) -> None:
    if kind == "clone":
        pair.store = filesystem("xfs")
    pair_ = Replicated(pair)
    point, want = pair_.step()
    view.mount(pair_.replica, "--point", str(point))
    for _ in range(5):
        pair_.step()
    assert view.digests() == want
    # Points go once a pass is applied, which is after its images are seen to be identical.
    wait_for(lambda: len(points(pair_.replica)) == 4, "three are kept beside the mounted one")
    listed = {p["id"]: p["in_use"] for p in points(pair_.replica)}
    assert listed[point] is True
    said = f"point {point} is kept for as long as it is in use"
    wait_for(lambda: said in pair_.receiver.said, "the log says why")
    assert pair_.receiver.said.count(said) == 1
    with pytest.raises(OSError, match="Read-only"):
        (view.mountpoint / pair.images[0].name).open("r+b")

    # A killed one leaves no point that would be kept for ever, and a mount that can be taken away.
    (server,) = view.servers()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not view.servers(), "the view's process has ended")
    pair_.step()
    wait_for(lambda: point not in {p["id"] for p in points(pair_.replica)}, "its point is let go")
    view.unmount()
    view.mount(pair_.replica)
    assert view.digests() == [digest(image) for image in pair.images]
    view.unmount()
    assert view.servers() == []


def test_what_is_written_to_a_view_is_gone_with_it(tmp_path: Path, view: View) -> None:
    if os.geteuid() != 0:
        unavailable("only root attaches loop devices")
    image = tmp_path / "ext4.img"
    image.touch()
    os.truncate(image, 24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    (tmp_path / "store").mkdir()
    content = image.read_bytes()
    disks = [ReplicaDisk("disk.img", len(content), 65536)]
    with Store(tmp_path / "store", keep="3") as store, Replica.open(store, "vm", "s", disks) as vm:
        for epoch in range(1, 4):
            vm.begin(epoch)
            for at in range(0, len(content), MIB):
                piece = content[at : at + MIB] if epoch == 1 else bytes([epoch]) * MIB
                vm.write(0, at, piece)
            vm.commit("g", epoch)
            vm.apply()
    replica = tmp_path / "store/vm"
    view.mount(replica, "--point", "1", "--writable", "--scratch", tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    disk = view.mountpoint / "disk.img"
    attach = ["losetup", "--find", "--show", disk]
    found = subprocess.run(attach, capture_output=True, text=True, check=True)
    device = Path(found.stdout.strip())
    try:
        assert subprocess.run(["e2fsck", "-f", "-y", device], capture_output=True).returncode == 0
        # Through the loop device, as a guest's file system would.
        with device.open("r+b", buffering=0) as file:
            file.seek(20 * MIB)
            file.write(b"gone" * MIB)
            os.fsync(file.fileno())
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert disk.read_bytes()[20 * MIB :] == b"gone" * MIB
    wait_for(lambda: run("unmount", view.mountpoint).returncode == 0, "the loop device lets go")
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    view.mount(replica, "--point", "1")
    assert (view.mountpoint / "disk.img").read_bytes() == content


def test_a_guest_boots_from_a_point_while_replication_goes_on(
    pair: Pair, view: View, tmp_path: Path
) -> None:
    replicated = Replicated(pair)
    point, want = replicated.step()
    view.mount(replicated.replica, "--point", str(point), "--writable", "--room", "16MiB")
    folder = tmp_path / "guest"
    folder.mkdir()
    script = """
        echo digest $(sha256sum </dev/vda)
        head -c 200000 /dev/urandom >/noise
        dd if=/noise of=/dev/vda bs=4096 seek=3 conv=notrunc,fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda bs=4096 skip=3 2>/dev/null | head -c 200000 | cmp - /noise && echo kept
        """
    disk = view.mountpoint / pair.images[0].name
    drive = ("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe")
    guest = Guest(folder, script, *drive, programs=[])
    try:
        for _ in range(3):
            _, latest = replicated.step()
        guest.wait_ended()
    finally:
        guest.close()
    assert f"digest {want[0]}" in guest.said and "kept" in guest.said, guest.said
    assert [digest(image) for image in pair.images] == latest
    pair.wait_identical()


def test_mounts_are_refused_in_one_line(tmp_path: Path, view: View) -> None:
    (tmp_path / "store").mkdir()
    disks = [ReplicaDisk("disk.img", 65536, 65536)]
    with Store(tmp_path / "store") as store, Replica.open(store, "vm", "s", disks) as vm:
        replica = tmp_path / "store/vm"
        filling = run("mount", replica, view.mountpoint)
        vm.begin(1)
        vm.commit("g", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for result, reason in (
        (filling, "has no recovery point yet"),
        (run("mount", replica, view.mountpoint, "--point", "9"), "no recovery point 9"),
        (run("mount", tmp_path / "store/none", view.mountpoint), "is no replica"),
        (run("mount", replica, tmp_path / "full"), "not an empty directory"),
        (run("mount", replica, tmp_path / "none"), "cannot mount on"),
        (run("mount", replica, view.mountpoint, "--scratch", "/tmp"), "--writable"),
        (run("mount", replica, view.mountpoint, "-w", "--scratch", tmp_path / "x"), "cannot make"),
        (run("unmount", view.mountpoint), "is no mounted recovery point"),
    ):
        assert result.returncode in (1, 2) and reason in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert mounts_below(tmp_path) == []


@pytest.mark.parametrize("seed", range(3))
def test_scratch_reads_as_an_array(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    below = rng.randbytes(10 * 4096 + 700)
    model = bytearray(below)
    room = Room(8 * 4096)
    scratch = Scratch(tmp_path, len(below), room, lambda at, n: below[at : at + n])
    full = 0
    for _ in range(300):
        start = rng.randrange(len(below))
        data = rng.randbytes(rng.randint(0, min(9000, len(below) - start)))
        try:
            scratch.write(start, data)
            model[start : start + len(data)] = data
        except OSError as error:
            full += 1
            assert "used up" in str(error)
        start = rng.randrange(len(below))
        length = rng.randint(0, len(below) - start)
        assert scratch.read(start, length) == model[start : start + length]
    assert full
    scratch.close()
    assert list(tmp_path.iterdir()) == []
