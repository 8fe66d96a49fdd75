"""Restoring while replication goes on: from a store, and from a receiver over the wire."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_points import DISKS, Model, UndoFiles
from test_promotion import replicator
from test_replication import CHUNK, REPLICATOR, SIZES, Pair, guest_write, pair
from transport_helpers import receive

from replicator.livepoint import LivePoint, PointGone
from replicator.pins import Pin, pinned_points
from replicator.replica import Replica
from replicator.store import Store

__all__ = ["pair"]


@pytest.mark.parametrize("keep", ["1", "4", "50"])
def test_a_point_stays_what_it_was_while_passes_are_applied(tmp_path: Path, keep: str):
    with Store(tmp_path, keep=keep) as store:
        model = Model(11)
        with Replica.open(store, "vm", "source", DISKS) as replica:
            model.fill(replica)
            views: list[LivePoint] = []
            for step in range(40):
                model.step(replica)
                if step % 5 == 0:
                    views.append(LivePoint(store, "vm"))
                    assert views[-1].point.epoch == model.epoch
                for view in views:
                    check(view, model)
                if len(views) == 4:
                    views.pop(0).close()
            for view in views:
                view.close()
            assert pinned_points(tmp_path, "vm") == frozenset()
            replica.apply()
            assert len(replica.manifest.points) <= int(keep)


def check(view: LivePoint, model: Model) -> None:
    for disk, content in enumerate(model.points[view.point.epoch]):
        found = bytearray(len(content))
        for start, end in view.data(disk):
            found[start:end] = view.read(disk, start, end - start)
        assert found == content


def test_a_point_reads_right_in_the_middle_of_applying(tmp_path: Path):
    """Another thread commits and applies all the time."""
    with Store(tmp_path, keep="3") as store:
        model = Model(12)
        with Replica.open(store, "vm", "source", DISKS) as replica:
            model.fill(replica)
            stop = threading.Event()

            def commit() -> None:
                while not stop.is_set():
                    model.step(replica)

            thread = threading.Thread(target=commit)
            thread.start()
            try:
                for _ in range(20):
                    view = LivePoint(store, "vm")
                    for _ in range(5):
                        check(view, model)
                    view.close()
            finally:
                stop.set()
                thread.join()


def test_a_point_that_is_read_for_long_holds_few_files_of_others(tmp_path: Path):
    """The undo files of later points come and go; open ones would take their room and our limit."""
    with Store(tmp_path, UndoFiles(), keep="2") as store:
        model = Model(14)
        with Replica.open(store, "vm", "source", DISKS) as replica:
            model.fill(replica)
            view = LivePoint(store, "vm")
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(60):
                model.step(replica)
                check(view, model)
            assert len(os.listdir("/proc/self/fd")) < before + 25
            view.close()


def test_a_point_that_went_is_not_read(tmp_path: Path):
    with Store(tmp_path, keep="1") as store:
        model = Model(13)
        with Replica.open(store, "vm", "source", DISKS) as replica:
            model.fill(replica)
            view = LivePoint(store, "vm")
            # As if the pin had come too late.
            view._pin.close()
            view._pin = Pin(tmp_path, "vm", 10**9)
            for _ in range(3):
                model.step(replica)
            with pytest.raises(PointGone, match="no longer kept"):
                view.read(0, 0, 4096)
            view.close()


def test_a_pin_ends_with_its_process(tmp_path: Path):
    program = f"""
import os, pathlib
from replicator.pins import Pin
Pin(pathlib.Path({str(tmp_path)!r}), "vm", 7)
print("pinned", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"pinned\n"
        assert pinned_points(tmp_path, "vm") == {7}
        holder.kill()
    assert pinned_points(tmp_path, "vm") == frozenset()
    assert list((tmp_path / ".pins" / "vm").iterdir()) == []


class Writer:
    """A guest that writes the same number everywhere, again and again, in one pass each time."""

    def __init__(self, pair: Pair) -> None:
        self._pair, self._stop = pair, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        noise = random.Random(1)
        while not self._stop.is_set():
            disk = noise.randrange(2)
            offset = noise.randrange(SIZES[disk] // 4096) * 4096
            guest_write(self._pair.mount.disk(disk), noise.randbytes(4096), offset)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def following(pair: Pair) -> Iterator[Pair]:
    receive(pair, f"unix://{pair.tmp_path}/s", "--keep", "3")
    sender = pair.start()
    pair.wait_following(sender)
    yield pair
    assert sender.popen.poll() is None, sender.said


@pytest.mark.parametrize("how", ["store", "unix", "exec"])
def test_restore_while_the_sender_runs(following: Pair, how: str):
    pair, out = following, following.tmp_path / "out"
    run = f"{REPLICATOR} receive --store {pair.store} fd:0"
    where = {
        "store": f"{pair.store}/r",
        "unix": f"{pair.address}/r",
        "exec": f"exec:{run}/r",
    }[how]
    with Writer(pair):
        result = replicator("restore", where, out)
        assert result.returncode == 0, result.stderr
        assert "verified" in result.stdout
    # It is a point that is listed, or was; now nothing is written, and another run brings it here.
    pair.wait_identical()
    again = replicator("restore", where, out)
    assert again.returncode == 0, again.stderr
    for image in pair.images:
        assert (out / image.name).read_bytes() == image.read_bytes()
    status = os.stat(out / pair.images[0].name)
    assert status.st_blocks * 512 < status.st_size or how == "store"
    third = replicator("restore", where, out)
    assert "0 bytes written" in third.stdout or ": 0" in third.stdout, third.stdout


def test_a_restore_that_was_cut_off_goes_on(following: Pair):
    pair, out = following, following.tmp_path / "out"
    pair.wait_identical()
    whole = replicator("restore", f"{pair.address}/r", out)
    assert whole.returncode == 0, whole.stderr
    # As if it had been cut off: one part is not there yet.
    with (out / pair.images[0].name).open("r+b") as file:
        file.seek(8 * CHUNK)
        file.write(bytes(CHUNK))
    rest = replicator("restore", f"{pair.address}/r", out)
    assert f": {CHUNK // 1024}.0 KiB written" in rest.stdout, rest.stdout
    assert (out / pair.images[0].name).read_bytes() == pair.images[0].read_bytes()


def test_a_restore_of_a_point_and_what_is_refused(following: Pair):
    pair, out = following, following.tmp_path / "out"
    pair.wait_identical()
    points = json.loads(replicator("points", "--json", pair.store / "r").stdout)["points"]
    before = [image.read_bytes() for image in pair.images]
    guest_write(pair.mount.disk(), b"newer", 0)
    pair.wait_identical()
    result = replicator("restore", "--point", points[-1]["id"], f"{pair.address}/r", out)
    assert result.returncode == 0, result.stderr
    assert [(out / image.name).read_bytes() for image in pair.images] == before
    for words, reason in (
        (("--point", "99999", f"{pair.address}/r"), "no recovery point 99999"),
        ((f"{pair.address}/nobody",), "no replica 'nobody'"),
        ((f"unix://{pair.tmp_path}/nowhere/r",), "cannot restore from"),
    ):
        refused = replicator("restore", *words, out)
        assert refused.returncode == 1 and reason in refused.stderr, refused.stderr
        assert len([x for x in refused.stderr.splitlines() if x.startswith("replicator:")]) == 1
    for where in (f"{pair.address}/no name", f"{pair.store}/.r"):
        refused = replicator("restore", where, out)
        assert refused.returncode == 2 and "is not usable" in refused.stderr, refused.stderr
    (out / pair.images[0].name).write_bytes(b"another size")
    refused = replicator("restore", f"{pair.address}/r", out)
    assert refused.returncode == 1 and "move it away" in refused.stderr
