"""A sender that lives but stands still, or waits for a disk: writes are held for a bounded time."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import Mount, wait_for
from test_cutover import BIN, run
from test_cutover_kills import Watched

from fusedisk.changemap import Control
from fusedisk.fencing import FenceRecord, read_fence, record_fence
from fusedisk.gate import open_gate, release_if_abandoned, take_lease
from fusedisk.gateword import begin_promotion, close_gate, let_go_if_due
from replicator import messages as m
from replicator.source import Source

PAST = 1e-9


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control.create(tmp_path / "control", 7)


def test_a_gate_is_let_go_when_its_time_is_over_and_not_before(control: Control) -> None:
    close_gate(control, 3600)
    assert not let_go_if_due(control)
    assert control.gated
    close_gate(control, PAST)
    assert let_go_if_due(control)
    assert not control.gated and not control.fenced and control.epoch == 7
    # Whoever wakes up later may promote nothing.
    assert not begin_promotion(control)
    assert not let_go_if_due(control)


def test_a_gate_with_a_promotion_begun_gives_way_to_the_fence(control: Control) -> None:
    close_gate(control, PAST)
    assert begin_promotion(control)
    assert let_go_if_due(control)
    assert control.fenced and not control.gated
    # The next one begins with nothing of this.
    control.set_fence(False)
    close_gate(control, PAST)
    assert let_go_if_due(control)
    assert not control.fenced


def test_a_promotion_taken_back_leaves_no_fence_behind(control: Control) -> None:
    close_gate(control, PAST)
    assert begin_promotion(control)
    control.set_fence(False)
    assert let_go_if_due(control)
    assert not control.fenced


def test_a_gate_without_a_time_stays_closed(control: Control, tmp_path: Path) -> None:
    """A sender of an older version sets none, and asks for nothing before it promotes."""
    close_gate(control, PAST)
    open_gate(control, [])
    control.set_gate(True)
    assert not let_go_if_due(control)
    assert control.gated


def test_a_record_without_a_promotion_begun_does_not_refuse_writes(
    control: Control, tmp_path: Path
) -> None:
    """A record that takes its time to be written: PROMOTE was not sent, and will not be."""
    image = tmp_path / "image"
    lease = take_lease(tmp_path)
    close_gate(control, PAST)
    record_fence([image], FenceRecord("t", "committing", "r", "unix:///s", 1))
    release_if_abandoned(tmp_path, control, [image])
    assert not control.gated and not control.fenced
    assert not begin_promotion(control)
    os.close(lease)


@pytest.mark.trio
async def test_an_image_that_does_not_sync_is_not_waited_for(
    tmp_path: Path, fuse: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = fuse(tmp_path / "disk.img")
    mount.mount("--create", "1MiB")
    source = Source(mount.mountpoint)
    hanging, answer, done = threading.Event(), threading.Event(), threading.Event()
    synced: list[int] = []

    def hang(file: Any) -> None:
        hanging.set()
        answer.wait(30)
        # Closed long ago at the sender, and perhaps another file by now.
        synced.append(os.fstat(file.fileno()).st_ino)
        done.set()

    monkeypatch.setattr("replicator.source.os.fsync", hang)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.sync)
            await trio.to_thread.run_sync(hanging.wait, 20)
            nursery.cancel_scope.cancel()
        assert not done.is_set()
        source.close()
    finally:
        answer.set()
    assert await trio.to_thread.run_sync(done.wait, 20)
    assert synced == [mount.images[0].stat().st_ino]


class Late(Watched):
    """What strikes is no death: the sender is stopped, or a frame is held."""

    def __init__(self, folder: Path) -> None:
        self.released = threading.Event()
        super().__init__(folder)

    def _hit(self, victim: str) -> bool:
        if victim == "frame":
            self.released.wait(60)
        else:
            self.pair.sender.send_signal(signal.SIGSTOP)
            status = Path(f"/proc/{self.pair.sender.pid}/stat")
            wait_for(lambda: status.read_text().split()[2] == "T", "the sender is stopped")
        return True

    def go_on(self) -> None:
        self.released.set()
        self.pair.sender.send_signal(signal.SIGCONT)

    def cut_over(self, *options: str | Path) -> subprocess.Popen[str]:
        words = [BIN / "replicator", "cutover", "--json", *options, self.pair.mountpoint]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_until_writes_go_on(self) -> None:
        assert self.struck.wait(30)
        before = max(self.acknowledged.values())
        # One may have been let through before the gate was closed.
        wait_for(lambda: max(self.acknowledged.values()) > before + 2, "writes go on", 30)

    def close(self) -> None:
        self.go_on()
        super().close()


@pytest.fixture
def late(tmp_path: Path, fuse: None) -> Iterator[Late]:
    made = Late(tmp_path)
    yield made
    made.close()


class Monitor:
    """Answers like QEMU's monitor; ``running`` is the guest."""

    def __init__(self, path: Path) -> None:
        self.running = True
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(60)

    def _serve(self) -> None:
        version = {"qemu": {"major": 8, "minor": 0, "micro": 0}, "package": ""}
        greeting = {"QMP": {"version": version, "capabilities": []}}
        while True:
            try:
                connection = self._sock.accept()[0]
            except OSError:
                return
            with connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(json.dumps(greeting).encode() + b"\r\n")
                said = ""
                while more := connection.recv(4096):
                    said += more.decode()
                    # The client ends its requests with nothing, and waits for each answer.
                    with contextlib.suppress(ValueError):
                        request, said = json.loads(said), ""
                        answer = {"return": self._do(request["execute"])}
                        # The first one, that for capabilities, has no id.
                        answer |= {key: request[key] for key in ("id",) if key in request}
                        connection.sendall(json.dumps(answer).encode() + b"\r\n")

    def _do(self, command: str) -> dict[str, Any]:
        if command in ("stop", "cont"):
            self.running = command == "cont"
        if command == "query-status":
            return {"status": "running" if self.running else "paused"}
        return {}


def test_a_sender_stopped_before_the_record_lets_the_guest_go_on(
    late: Late, tmp_path: Path
) -> None:
    monitor = Monitor(tmp_path / "q")
    try:
        late.strike("sender", m.Begin)
        cutover = late.cut_over("--max-downtime", "1500", "--qmp", tmp_path / "q")
        late.wait_until_writes_go_on()
        wait_for(lambda: monitor.running, "the guest is let go on", 30)
        late.go_on()
        said, errors = cutover.communicate(timeout=60)
    finally:
        monitor.close()
    assert cutover.returncode == 3, errors
    assert json.loads(said)["outcome"] == "rolled-back"
    assert read_fence([late.pair.image]) is None
    assert late.source_writable() and not late.promoted()
    # It follows again, with what was written meanwhile.
    late.stop_writing()
    late.pair.wait_for_state("following")
    late.pair.wait_until_committed()
    assert late.missing(late.pair.image) == []


def test_a_sender_stopped_with_promote_sent_lets_writes_fail(late: Late) -> None:
    late.strike("sender", m.Promote)
    cutover = late.cut_over("--max-downtime", "10000")
    assert late.struck.wait(30)
    # The writer that is held ends with what it is told.
    late.stop_writing()
    assert not late.source_writable()
    record = read_fence([late.pair.image])
    assert record is not None and record.state == "committing"
    late.go_on()
    said, errors = cutover.communicate(timeout=60)
    assert json.loads(said)["outcome"] == "promoted", errors
    assert late.pair.sender.wait(60) == 0
    assert "nothing to resolve" in run("replicator", "resolve", late.pair.mountpoint).stdout
    assert late.promoted() and not late.source_writable()
    assert late.missing(late.pair.replica) == []


def test_a_last_pass_beyond_the_bound_is_given_up(late: Late) -> None:
    late.strike("frame", m.Commit)
    cutover = late.cut_over("--max-downtime", "1500")
    late.wait_until_writes_go_on()
    said, errors = cutover.communicate(timeout=60)
    assert cutover.returncode == 3, errors
    assert "took longer than 1500 ms" in errors
    assert json.loads(said)["outcome"] == "rolled-back"
    assert read_fence([late.pair.image]) is None
    assert late.source_writable() and not late.promoted()


DUTY = """
import asyncio
from replicator.attending import attend

class Duty:
    silence_seconds_max = 2.0
    async def handle(self, request, note):
        note("begun")
        await asyncio.sleep(1.0)
        return {}
    async def abandoned(self):
        print("abandoned", flush=True)

attend(Duty())
"""


def test_a_child_takes_silence_for_death_and_a_beat_for_no_request() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", DUTY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        child.stdin.write('{"id": 1, "do": "work"}\n')
        child.stdin.flush()
        assert json.loads(child.stdout.readline()) == {"id": 1, "note": "begun"}
        child.stdin.write('{"id": 0, "do": "beat"}\n')
        child.stdin.flush()
        assert json.loads(child.stdout.readline()) == {"id": 1, "done": {}}
        # The pipe stays open, as of a sender that is stopped.
        assert child.stdout.readline() == "abandoned\n"
        assert child.wait(60) == 0
