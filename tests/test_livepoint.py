"""Reading a point at the moments at which what it is read from moves."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_points import DISKS, SIZES, Model, UndoFiles

from replicator.files import Buffer
from replicator.livepoint import LivePoint
from replicator.manifest import Point, manifest_path
from replicator.replica import Replica
from replicator.store import Store


class Halting(UndoFiles):
    """Halts an apply after its first write to an image."""

    def __init__(self) -> None:
        self.halting = False
        self.halted, self.go_on = threading.Event(), threading.Event()

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        done = super().write(fd, buffers, offset)
        if self.halting and Path(os.readlink(f"/proc/self/fd/{fd}")).name == DISKS[0].name:
            self.halting = False
            self.halted.set()
            assert self.go_on.wait(60)
        return done


def test_records_that_move_to_an_older_file_meanwhile_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, files = Model(1), Halting()
    with Store(tmp_path, files, "2") as store, Replica.open(store, "vm", "src", DISKS) as replica:
        model.fill(replica)
        view = LivePoint(store, "vm", 1)
        model.step(replica)
        files.halting = True

        def overwrite() -> None:
            replica.begin(model.epoch + 1)
            for disk, size in enumerate(SIZES):
                model.content[disk][:] = model.rng.randbytes(size)
                replica.write(disk, 0, bytes(model.content[disk]))
            model.commit(replica)

        applying = threading.Thread(target=overwrite)
        applying.start()
        assert files.halted.wait(60)
        scan = LivePoint._scan

        def scan_and_move(self: LivePoint, point: Point) -> None:
            scan(self, point)
            if not files.go_on.is_set():
                # The next file's records are merged into the one just looked at.
                files.go_on.set()
                applying.join(60)
                overwrite()
                assert [p.id for p in replica.manifest.points] == [1, 3, 4]

        monkeypatch.setattr(LivePoint, "_scan", scan_and_move)
        try:
            assert [view.read(n, 0, size) for n, size in enumerate(SIZES)] == model.points[1]
        finally:
            files.go_on.set()
            applying.join(60)
            view.close()


def test_a_manifest_that_only_looks_like_the_last_one_is_read(tmp_path: Path) -> None:
    model = Model(2)
    with (
        Store(tmp_path, UndoFiles(), "3") as store,
        Replica.open(store, "vm", "src", DISKS) as replica,
    ):
        model.fill(replica)
        view = LivePoint(store, "vm", 1)
        try:
            path = manifest_path(tmp_path / "vm")
            seen, content = path.stat(), path.read_bytes()
            other = path.with_name("other")
            path.unlink()
            other.write_bytes(content)
            # An inode that is still in use is not given to another file.
            assert other.stat().st_ino != seen.st_ino
            other.rename(path)
            before = view._listed
            assert view.read(0, 0, 512) == model.points[1][0][:512]
            assert view._listed is not before and view._listed == before
        finally:
            view.close()
