"""Recovery points: every one that is kept reads as the disks were, and can be copied out."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fusedisk.errors import FuseDiskError, UsageError
from replicator.files import Buffer, Files
from replicator.manifest import Manifest, ReplicaDisk, read_manifest
from replicator.pointview import PointView
from replicator.replica import Replica, TargetFull
from replicator.restore import restore
from replicator.retention import kept, parse_policy
from replicator.store import Store, list_replicas

SIZES = [5 * 65536 + 512, 2 * 65536]
DISKS = [ReplicaDisk(f"disk{n}", size, 4096) for n, size in enumerate(SIZES)]
REPLICATOR = str(Path(sys.executable).with_name("replicator"))


class UndoFiles(Files):
    """Has no clones, whatever the filesystem of the test has."""

    def can_clone(self, directory: Path, fd: int) -> bool:
        return False


class Model:
    """A source that remembers every point."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.content = [bytearray(self.rng.randbytes(size)) for size in SIZES]
        self.points: dict[int, list[bytes]] = {}
        self.times: dict[int, float] = {}
        self.now = 1.7e9
        self.epoch = 0

    def fill(self, replica: Replica) -> None:
        replica.begin(1)
        for disk, content in enumerate(self.content):
            replica.write(disk, 0, bytes(content))
        self.commit(replica)

    def step(self, replica: Replica) -> None:
        replica.begin(self.epoch + 1)
        for _ in range(self.rng.randint(0, 6)):
            disk = self.rng.randrange(2)
            start = self.rng.randrange(SIZES[disk])
            end = min(SIZES[disk], start + self.rng.randint(1, 30000))
            if self.rng.random() < 0.3:
                self.content[disk][start:end] = bytes(end - start)
                replica.zero(disk, start, end - start)
            else:
                data = self.rng.randbytes(end - start)
                self.content[disk][start:end] = data
                replica.write(disk, start, data)
        self.commit(replica)

    def commit(self, replica: Replica) -> None:
        self.epoch += 1
        self.now += self.rng.choice((1, 7, 60, 300))
        self.points[self.epoch] = [bytes(content) for content in self.content]
        self.times[self.epoch] = self.now
        replica.commit("gen", self.epoch, self.now)
        replica.apply()

    def check(self, store: Store, manifest: Manifest) -> None:
        for point in manifest.points:
            assert point.time == self.times[point.epoch]
            view = PointView(store.path / "vm", manifest, point.id)
            try:
                assert [view.read(n, 0, SIZES[n]) for n in range(2)] == self.points[point.epoch]
            finally:
                view.close()


@pytest.mark.parametrize("keep", ["1", "5", "3,4x1m", "2x1m,3x10m,2x1h"])
def test_every_kept_point_reads_as_it_was(tmp_path: Path, keep: str) -> None:
    model = Model(len(keep))
    with Store(tmp_path, keep=keep) as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            model.fill(replica)
        expected = [1]
        for _ in range(12):
            with Replica.open(store, "vm", "src", DISKS) as replica:
                for _ in range(4):
                    model.step(replica)
                    expected.append(model.epoch)
                    keeping = kept(parse_policy(keep), [model.times[e] for e in expected])
                    expected = [e for e, stays in zip(expected, keeping, strict=True) if stays]
                    assert [p.epoch for p in replica.manifest.points] == expected
                model.check(store, replica.manifest)
        assert list_replicas(tmp_path)[0].points == len(expected)
    folder = tmp_path / "vm/.fusedisk/points"
    assert len(list(folder.iterdir()) if folder.exists() else []) < len(expected)


def test_policy_stays_and_a_narrower_one_thins(tmp_path: Path) -> None:
    model = Model(1)
    for keep, count in (("6", 6), (None, 6), ("3", 3)):
        with (
            Store(tmp_path, keep=keep) as store,
            Replica.open(store, "vm", "src", DISKS) as replica,
        ):
            if not model.epoch:
                model.fill(replica)
            for _ in range(8):
                model.step(replica)
            assert len(replica.manifest.points) == count
            model.check(store, replica.manifest)


def test_damaged_undo_records_cost_the_points_that_need_them(tmp_path: Path) -> None:
    model = Model(3)
    files = UndoFiles()
    with (
        Store(tmp_path, files, "4") as store,
        Replica.open(store, "vm", "src", DISKS) as replica,
    ):
        model.fill(replica)
        while len(list((tmp_path / "vm/.fusedisk").glob("points/*"))) < 3:
            model.step(replica)
        points = replica.manifest.points
        path = tmp_path / "vm/.fusedisk/points" / str(points[-2].id)
        good = path.read_bytes()
        path.write_bytes(good[:60] + bytes([good[60] ^ 1]) + good[61:])
        with pytest.raises(FuseDiskError, match=f"{path.name} is damaged"):
            PointView(tmp_path / "vm", replica.manifest, points[0].id)
        PointView(tmp_path / "vm", replica.manifest, points[-1].id).close()


class Full(UndoFiles):
    """Has no room for so many writes."""

    def __init__(self) -> None:
        self.refuse = 0

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self.refuse and len(buffers) > 1:
            self.refuse -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, buffers, offset)


def test_full_target_drops_the_oldest_points_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, files = Model(5), Full()
    with Store(tmp_path, files, "9") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        for _ in range(6):
            model.step(replica)
        before = [p.epoch for p in replica.manifest.points]
        replica.begin(model.epoch + 1)
        files.refuse = 1
        # In place: nothing of the pass is sent again.
        replica.write(0, 0, b"y" * 70000)
        assert [p.epoch for p in replica.manifest.points] == before[1:]
        model.content[0][:70000] = b"y" * 70000
        replica.write(1, 0, b"z" * 5000)
        model.content[1][:5000] = b"z" * 5000
        model.epoch += 1
        model.points[model.epoch] = [bytes(content) for content in model.content]
        model.times[model.epoch] = model.now
        replica.commit("gen", model.epoch, model.now)
        files.refuse = 2
        replica.apply()
        assert [p.epoch for p in replica.manifest.points] == [*before[3:], model.epoch]
        model.check(store, replica.manifest)
        replica.begin(model.epoch + 1)
        files.refuse = 99
        with pytest.raises(TargetFull, match="free some at the target"):
            replica.write(0, 0, b"x")
        assert [p.epoch for p in replica.manifest.points] == [model.epoch]
        files.refuse = 0
        model.step(replica)
        model.check(store, replica.manifest)
    assert "target full" in caplog.text


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPLICATOR, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_points_and_restore_as_a_user_runs_them(tmp_path: Path) -> None:
    model = Model(7)
    path = tmp_path / "store"
    path.mkdir()
    with Store(path, keep="5") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        for _ in range(7):
            model.step(replica)
    result = run("points", "--json", path / "vm")
    points = json.loads(result.stdout)["points"]
    assert [p["epoch"] for p in points] == [4, 5, 6, 7, 8]
    assert all(p["time"].endswith("+00:00") and p["age"] > 0 for p in points)
    assert len(run("points", path / "vm").stdout.splitlines()) == 5

    out = tmp_path / "out"
    for point in (points[0], points[-1], points[1]):
        result = run("restore", path / "vm", out, "--point", str(point["id"]))
        assert result.returncode == 0, result.stderr
        assert [(out / d.name).read_bytes() for d in DISKS] == model.points[point["epoch"]]
    assert ": 0 bytes written" in run("restore", path / "vm", out, "--point", "5").stdout
    assert run("restore", path / "vm", out).returncode == 0
    assert [(out / d.name).read_bytes() for d in DISKS] == model.points[8]

    for arguments, reason in (
        (("restore", path / "vm", out, "--point", "99"), "no recovery point 99"),
        (("restore", path / "none", out), "no replica"),
        (("restore", path / "vm", path / "vm"), "inside the store"),
        (("points", path / "none"), "is no replica"),
        (("receive", "--store", path, "--keep", "7x", "unix:///tmp/x"), "--keep"),
    ):
        result = run(*arguments)
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1, result.stderr
        assert reason in result.stderr
    os.truncate(out / "disk0", 100)
    before = (out / "disk1").read_bytes()
    assert "move it away" in run("restore", path / "vm", out, "--point", "4").stderr
    assert (out / "disk1").read_bytes() == before


def test_interrupted_restore_goes_on_and_keeps_holes(tmp_path: Path) -> None:
    model = Model(9)
    model.content[0][65536 : 3 * 65536] = bytes(2 * 65536)
    path = tmp_path / "store"
    path.mkdir()
    with Store(path, keep="2") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        replica.begin(1)
        replica.write(0, 0, bytes(model.content[0][:65536]))
        replica.write(0, 3 * 65536, bytes(model.content[0][3 * 65536 :]))
        replica.write(1, 0, bytes(model.content[1]))
        model.commit(replica)

        class Interrupted(Exception):
            pass

        def stop(_: int) -> None:
            raise Interrupted

        for _ in range(2):
            view = PointView(path / "vm", replica.manifest, 1)
            try:
                with pytest.raises(Interrupted):
                    restore(view, tmp_path / "out", stop)
            finally:
                view.close()
        view = PointView(path / "vm", replica.manifest, 1)
        try:
            assert 0 < restore(view, tmp_path / "out", lambda _: None) < sum(SIZES) - 2 * 65536
        finally:
            view.close()
    assert [(tmp_path / "out" / d.name).read_bytes() for d in DISKS] == model.points[1]
    assert (tmp_path / "out/disk0").stat().st_blocks * 512 <= SIZES[0] - 2 * 65536 + 4096


def test_points_end_with_a_promotion(tmp_path: Path) -> None:
    model = Model(2)
    files = UndoFiles()
    with Store(tmp_path, files, "3") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        model.step(replica)
        replica.promote("token", model.epoch)
    assert "is promoted" in run("restore", tmp_path / "vm", tmp_path.with_name("out")).stderr
    assert read_manifest(tmp_path / "vm") is not None


def test_retention() -> None:
    minutes = [60.0 * n for n in range(100)]
    for text, left in (
        ("1", [99]),
        ("3", [97, 98, 99]),
        ("2x10m", [89, 99]),
        ("3,2x10m,9x1h", [59, 89, 97, 98, 99]),
    ):
        found = [n for n, stays in enumerate(kept(parse_policy(text), minutes)) if stays]
        assert found == left, text
    assert kept(parse_policy("1"), []) == []
    for bad in ("", "0", "x", "5x", "5x1", "5x1w", "1,", "5x0m", "+5", " 5", "9999", "٣", "1," * 9):
        with pytest.raises(UsageError, match="--keep"):
            parse_policy(bad)
