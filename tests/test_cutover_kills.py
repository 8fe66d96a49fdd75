"""Real processes killed and links cut at the steps of a real cutover: one side is the disk.

A proxy that sees the frames knows how far the cutover is; the model in cutover_model.py tries the
orders that no clock would meet.
"""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for
from frame_proxy import FrameProxy
from test_cutover import Pair, run

from fusedisk.changemap import Control
from fusedisk.fencing import read_fence
from replicator import messages as m

SLOTS = 1000
RECORD = 4096


class Watched:
    """A pair whose link is looked into, with a writer that counts what was acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._step: type[m.Event] | None = None
        self._victim = ""
        self.struck = threading.Event()
        self._control: Control | None = None
        self._proxy: FrameProxy | None = None
        self.acknowledged: dict[int, int] = {}
        self._stop = threading.Event()

        def through(address: str) -> str:
            self._proxy = FrameProxy(folder / "p", address, self._at)
            return self._proxy.address

        self.pair = Pair(folder, through)
        self._control = Control(self.pair.image.with_name("disk.img.fusedisk") / "control")
        self._writer = threading.Thread(target=self._write)
        self._writer.start()

    def _at(self, kind: type[m.Event]) -> bool:
        # Begin and Commit are of earlier passes too, as long as the gate is open.
        if kind is not self._step or self.struck.is_set():
            return True
        assert self._control is not None
        if not self._control.gated:
            return True
        self.struck.set()
        return self._hit(self._victim)

    def _hit(self, victim: str) -> bool:
        """Whether the frame goes on."""
        if victim == "link":
            return False
        process = self.pair.sender if victim == "sender" else self.pair.receiver
        process.kill()
        process.wait()
        return True

    def strike(self, victim: str, step: type[m.Event]) -> None:
        """Kill or cut just before a frame of the kind would go on, once the gate is closed."""
        self._victim, self._step = victim, step

    def _write(self) -> None:
        fd = os.open(self.pair.mountpoint / "disk.img", os.O_RDWR)
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                os.pwrite(fd, number.to_bytes(8, "little"), number % SLOTS * RECORD)
                self.acknowledged[number % SLOTS] = number
                self._stop.wait(0.0005)
        except OSError:
            return
        finally:
            os.close(fd)

    def stop_writing(self) -> None:
        self._stop.set()
        self._writer.join(60)
        assert not self._writer.is_alive()

    def source_writable(self) -> bool:
        try:
            self.pair.write(b"is it still the disk?", SLOTS * RECORD)
        except OSError:
            return False
        return True

    def promoted(self) -> bool:
        found = json.loads(run("replicator", "list", "--json", self.pair.store).stdout)
        replicas = found["replicas"] if isinstance(found, dict) else found
        return bool(replicas[0]["state"] == "promoted")

    def missing(self, image: Path) -> list[int]:
        """Acknowledged records that an image lacks; a newer one may be there, unanswered."""
        content = image.read_bytes()
        return [
            number
            for slot, number in self.acknowledged.items()
            if int.from_bytes(content[slot * RECORD : slot * RECORD + 8], "little") < number
        ]

    def close(self) -> None:
        self._stop.set()
        self.pair.close()
        self._writer.join(60)
        if self._proxy is not None:
            self._proxy.close()


@pytest.fixture
def watched(tmp_path: Path, fuse: None) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("victim", ["sender", "receiver", "link"])
@pytest.mark.parametrize("step", [m.Begin, m.Commit, m.Promote, m.Promoted])
def test_one_side_is_the_disk_whatever_dies(watched: Watched, victim: str, step: type[m.Event]):
    pair = watched.pair
    watched.strike(victim, step)
    restart = threading.Thread(target=_restart, args=(watched, victim))
    restart.start()
    paused = pair.store / "paused"
    hooks = ("--before", f"touch {paused}", "--on-rollback", f"rm {paused}")
    command = ["replicator", "cutover", "--json", "--max-downtime", "10000", *hooks]
    result = run(*command, pair.mountpoint, check=False)
    restart.join(60)
    assert watched.struck.is_set(), result.stderr
    if victim == "sender" and step in (m.Promote, m.Promoted):
        assert result.returncode == 4, result.stderr
        assert json.loads(result.stdout)["outcome"] == "unknown"
        wait_for(lambda: not watched.source_writable(), "the abandoned gate became a fence")
        settled = run("replicator", "resolve", pair.mountpoint).stdout.strip()
        assert settled == ("promoted" if watched.promoted() else "rolled-back")
        assert paused.exists()
    else:
        assert paused.exists() == watched.promoted(), result.stderr
    watched.stop_writing()
    promoted = watched.promoted()
    if (victim, step) != ("sender", m.Promote):
        # What a sender said that died thereafter may be heard, or not.
        assert promoted == (step is m.Promoted)
    assert watched.source_writable() != promoted
    record = read_fence([pair.image])
    assert (record.state if record else None) == ("fenced" if promoted else None)
    assert watched.missing(pair.replica if promoted else pair.image) == []
    if promoted:
        assert pair.replica.read_bytes() == pair.image.read_bytes()


def _restart(watched: Watched, victim: str) -> None:
    if watched.struck.wait(50) and victim == "receiver":
        watched.pair.receiver.wait()
        watched.pair.receiver = watched.pair.receive()
