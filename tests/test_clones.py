"""Passes and recovery points as clones: on XFS and Btrfs, and mixed with undo records anywhere."""

import errno
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import unavailable
from test_points import DISKS, SIZES, Model, run

from fusedisk.errors import FuseDiskError
from replicator.clones import clone_directory
from replicator.exclusive import exclusive_bytes
from replicator.files import Files
from replicator.journal import journal_directory
from replicator.livepoint import LivePoint, PointGone
from replicator.manifest import ReplicaDisk, read_manifest
from replicator.replica import Replica
from replicator.store import Store

MIB = 1 << 20
MakeFilesystem = Callable[[str], Path]


@pytest.fixture
def filesystem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeFilesystem]:
    """Mount a filesystem of 320 MiB that has reflinks; request it before what uses it."""
    mounted: list[Path] = []

    def make(kind: str) -> Path:
        if os.geteuid() != 0:
            unavailable("only root mounts filesystems")
        folder = tmp_path_factory.mktemp(kind)
        image, path = folder / "image", folder / "mounted"
        image.touch()
        os.truncate(image, 320 * MIB)
        path.mkdir()
        for command in ([f"mkfs.{kind}", "-q", image], ["mount", "-o", "loop", image, path]):
            try:
                result = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                unavailable(f"{command[0]} is missing")
            if result.returncode != 0:
                unavailable(result.stderr)
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", path], check=True)


class CopyingFiles(Files):
    """Clones by copying, so that any filesystem will do; or has none."""

    def __init__(self) -> None:
        self.clones = True

    def can_clone(self, directory: Path, fd: int) -> bool:
        return self.clones

    def clone(self, source: int, fd: int) -> None:
        size = os.fstat(source).st_size
        self.write(fd, [os.pread(source, size, 0)], 0)

    def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
        assert offset % 4096 == 0 and (
            length % 4096 == 0 or offset + length == os.fstat(fd).st_size
        )
        self.write(fd, [os.pread(source, length, offset)], offset)


class CountingFiles(CopyingFiles):
    """Notes what is cloned into an image: (disk, offset, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.cloned: list[tuple[str, int, int]] = []

    def clone(self, source: int, fd: int) -> None:
        self._note(fd, 0, os.fstat(source).st_size)
        super().clone(source, fd)

    def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
        self._note(fd, offset, length)
        super().clone_range(source, fd, offset, length)

    def _note(self, fd: int, offset: int, length: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        if name.startswith("disk"):
            self.cloned.append((name, offset, length))


def live(store: Store, point: int) -> list[bytes]:
    view = LivePoint(store, "vm", point)
    try:
        return [view.read(n, 0, size) for n, size in enumerate(SIZES)]
    finally:
        view.close()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_points_are_clones_where_the_filesystem_has_them(
    filesystem: MakeFilesystem, tmp_path: Path, kind: str
) -> None:
    path, model = filesystem(kind), Model(3)
    with Store(path, keep="4") as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            model.fill(replica)
            image = path / "vm/disk0"
            before = image.stat().st_ino
            newest = LivePoint(store, "vm")
            for _ in range(8):
                model.step(replica)
            # Pinned before it had clones, and read while the images changed under it.
            assert [newest.read(n, 0, size) for n, size in enumerate(SIZES)] == model.points[1]
            newest.close()
            model.step(replica)
            manifest = replica.manifest
            # A pass without changes has nothing to keep: its point is read through the next one.
            assert [point.clone is None for point in manifest.points].count(False) >= 2
            assert not journal_directory(path / "vm").exists()
            assert image.stat().st_ino == before
            model.check(store, manifest)
            for point in manifest.points:
                assert live(store, point.id) == model.points[point.epoch]
            middle = manifest.points[1]
            replica.roll_back(middle.id)
            assert [(path / "vm" / d.name).read_bytes() for d in DISKS] == model.points[
                middle.epoch
            ]
            assert image.stat().st_ino == before
            listed = len(replica.manifest.points)
        found = json.loads(run("points", "--json", path / "vm").stdout)["points"]
        assert len(found) == listed and "clone" in [point["kind"] for point in found]
        assert 0 < sum(point["used"] for point in found) <= len(found) * (sum(SIZES) + 8192)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_points_that_are_clones_outlive_a_promotion(filesystem: MakeFilesystem, kind: str) -> None:
    path, model = filesystem(kind), Model(4)
    with Store(path, keep="3") as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            model.fill(replica)
            for _ in range(3):
                model.step(replica)
            view = LivePoint(store, "vm")
            replica.promote("token", model.epoch)
        # The guest goes on with the image.
        for disk in DISKS:
            (path / "vm" / disk.name).write_bytes(os.urandom(disk.size))
        manifest = read_manifest(path / "vm")
        assert manifest is not None and len(manifest.points) == 3
        for point in manifest.points:
            assert live(store, point.id) == model.points[point.epoch]
        assert [view.read(n, 0, s) for n, s in enumerate(SIZES)] == model.points[model.epoch]
        view.close()


@pytest.mark.parametrize("seed", range(6))
def test_both_kinds_of_points_side_by_side(tmp_path: Path, seed: int) -> None:
    """As when a store is moved from one filesystem to another and back."""
    model, files, rng = Model(seed), CopyingFiles(), random.Random(seed)
    with Store(tmp_path, files, "6,3x10m") as store:
        for _ in range(8):
            files.clones = not files.clones
            with Replica.open(store, "vm", "src", DISKS) as replica:
                if not model.epoch:
                    model.fill(replica)
                for _ in range(rng.randint(1, 5)):
                    model.step(replica)
                    model.check(store, replica.manifest)
            assert read_manifest(tmp_path / "vm") == replica.manifest
            for point in replica.manifest.points:
                assert live(store, point.id) == model.points[point.epoch]
        with Replica.open(store, "vm", "src", DISKS) as replica:
            chosen = rng.choice(replica.manifest.points)
            replica.roll_back(chosen.id)
        assert [(tmp_path / "vm" / d.name).read_bytes() for d in DISKS] == model.points[
            chosen.epoch
        ]
        for point in replica.manifest.points:
            assert live(store, point.id) == model.points[point.epoch]


def test_a_point_with_undo_records_ends_with_a_promotion(tmp_path: Path) -> None:
    model, files = Model(6), CopyingFiles()
    files.clones = False
    with Store(tmp_path, files, "3") as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            model.fill(replica)
            model.step(replica)
            view = LivePoint(store, "vm", 1)
            replica.promote("token", model.epoch)
        with pytest.raises(PointGone, match="is promoted"):
            view.read(0, 0, 512)
        view.close()
        with pytest.raises(FuseDiskError, match="is promoted and belongs to its guest"):
            LivePoint(store, "vm", 1)


def test_what_a_pass_changed_is_cloned_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, end = CountingFiles(), SIZES[0]
    monkeypatch.setattr("replicator.changed._extents", lambda _: 0)

    def cloned() -> list[tuple[str, int, int]]:
        found, files.cloned = files.cloned, []
        assert (tmp_path / "vm/disk0").read_bytes() == bytes(content)
        return found

    with Store(tmp_path, files, "2") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        Model(1).fill(replica)
        content = bytearray((tmp_path / "vm/disk0").read_bytes())
        for epoch in (2, 3, 4):
            replica.begin(epoch)
            # Out of order, side by side, across a block's edge, and the end.
            for at, data in ((8192, b"a" * 10), (100, b"b" * 4096), (end - 9, b"c" * 9)):
                replica.write(0, at, data)
                content[at : at + len(data)] = data
            replica.zero(0, 65536, 4096)
            content[65536 : 65536 + 4096] = bytes(4096)
            replica.commit("gen", epoch)
            if epoch == 4:
                monkeypatch.setattr("replicator.changed._extents", lambda _: 11)
            replica.apply()
            parts = [(0, 12288), (65536, 4096), (end - 512, 512)]
            expected = [("disk0", *part) for part in parts]
            assert cloned() == (expected if epoch < 4 else [("disk0", 0, end)])
        # What this process has of a pass is not all that it changed.
        monkeypatch.setattr("replicator.changed._extents", lambda _: 0)
        replica.begin(5, "gen", based=True)
        replica.write(0, 0, b"d")
        replica.checkpoint("gen", 5, 0, 4096)
    with Store(tmp_path, files, "2") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        replica.begin(6, "gen", continues=True, based=True)
        replica.write(0, 4096, b"e")
        content[0:1], content[4096:4097] = b"d", b"e"
        replica.commit("gen", 6)
        replica.apply()
        assert cloned() == [("disk0", 0, end)]
        replica.begin(7, "gen")
        replica.write(0, 0, b"f")
        content[0:1] = b"f"
        replica.commit("gen", 7)
    with Store(tmp_path, files, "2") as store, Replica.open(store, "vm", "src", DISKS):
        assert cloned() == [("disk0", 0, end)]


def test_a_filesystem_that_clones_no_range_clones_the_whole(tmp_path: Path) -> None:
    class WholeFiles(CopyingFiles):
        def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    model = Model(2)
    files = WholeFiles()
    with Store(tmp_path, files, "3") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        for _ in range(3):
            model.step(replica)
            model.check(store, replica.manifest)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_ranges_are_cloned_for_real(
    filesystem: MakeFilesystem, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = filesystem(kind), Model(5)
    monkeypatch.setattr("replicator.changed._EXTENTS_A_RANGE", 0)
    ranges: list[int] = []

    class RangesFiles(Files):
        def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
            super().clone_range(source, fd, offset, length)
            ranges.append(length)

    files = RangesFiles()
    with Store(path, files, "4") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        for _ in range(8):
            model.step(replica)
            model.check(store, replica.manifest)
    assert ranges


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_committed_pass_that_is_damaged_is_named_and_compared(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, files = Model(7), CopyingFiles()
    with Store(tmp_path, files, "3") as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            model.fill(replica)
            replica.begin(2)
            replica.write(1, 0, b"x" * 4096)
            replica.commit("gen", 2)
        path = clone_directory(tmp_path / "vm") / "next.1"
        if damage == "missing":
            path.unlink()
        else:
            os.truncate(path, 512)
        with Replica.open(store, "vm", "src", DISKS) as replica:
            assert (replica.manifest.state, replica.manifest.epoch) == ("filling", None)
        assert "clones" in caplog.text and "cannot be promoted until" in caplog.text


def test_a_clone_that_finds_no_room_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, files = Model(8), CopyingFiles()
    with Store(tmp_path, files, "3") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        model.step(replica)
    with Store(tmp_path, files, "3") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        replica.begin(3)

        def full(*_: object) -> None:
            monkeypatch.undo()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "clone", full)
        replica.write(0, 0, b"x" * 512)
        replica.commit("gen", 3)
        replica.apply()
        assert [point.epoch for point in replica.manifest.points] == [2, 3]
    assert (tmp_path / "vm/disk0").read_bytes() == b"x" * 512 + model.points[2][0][512:]


def test_a_large_pass_needs_no_room_beside_its_own(filesystem: MakeFilesystem) -> None:
    """A journal and undo records beside it would need 280 MiB, where there are less than 260."""
    path = filesystem("xfs")
    disks = [ReplicaDisk("disk", 70 * MIB, 65536)]
    noise = [os.urandom(MIB) for _ in range(2)]
    with Store(path, keep="2") as store, Replica.open(store, "vm", "src", disks) as replica:
        for epoch in (1, 2, 3):
            replica.begin(epoch)
            for at in range(0, 70 * MIB, MIB):
                replica.write(0, at, noise[epoch % 2])
            replica.commit("gen", epoch)
            replica.apply()
    assert (path / "vm/disk").read_bytes() == noise[1] * 70
    assert exclusive_bytes(path / "vm/disk") == 70 * MIB
    os.sync()
    room = os.statvfs(path)
    assert (room.f_blocks - room.f_bfree) * room.f_frsize < 240 * MIB


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_a_full_filesystem_drops_the_oldest_points_and_goes_on(
    filesystem: MakeFilesystem, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = filesystem(kind)
    disks = [ReplicaDisk("disk", 60 * MIB, 65536)]
    full = 0
    with Store(path, keep="50") as store, Replica.open(store, "vm", "src", disks) as replica:
        for epoch in range(1, 12):
            noise = os.urandom(MIB)
            for _ in range(10):
                try:
                    replica.begin(epoch)
                    for at in range(0, 60 * MIB, MIB):
                        replica.write(0, at, noise)
                    replica.commit("gen", epoch)
                    replica.apply()
                    break
                except FuseDiskError as error:
                    full += 1
                    assert "target full" in str(error) and "was dropped" in str(error)
        assert (path / "vm/disk").read_bytes() == noise * 60
        points = replica.manifest.points
        # The sender hears nothing of it, but where the filesystem finds out only at a sync.
        assert full == 0 or kind == "btrfs"
        assert 2 <= len(points) < 6 and points[-1].epoch == 11
    assert "target full; dropped the oldest recovery point" in caplog.text


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_a_full_filesystem_is_known_for_what_it_is(
    filesystem: MakeFilesystem, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = filesystem(kind)

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (path / "file").open("w+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        assert Files().can_clone(path, file.fileno()) == (kind != "ext4")
        monkeypatch.setattr("tempfile.TemporaryFile", full)
        assert Files().can_clone(path, file.fileno()) == (kind != "ext4")
        file.seek(0)
        assert file.read() == b"x" * 8192
