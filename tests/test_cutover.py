"""Cutover through real processes: promoted and fenced, or the guest goes on at the source."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusedisk.changemap import Control
from fusedisk.fencing import FenceRecord, clear_fence, fence_path, read_fence, record_fence
from fusedisk.gate import release_if_abandoned, take_lease

BIN = Path(sys.executable).parent
IMAGE_BYTES = 8 << 20
# A busy machine keeps it too.
BOUND = ("--max-downtime", "10000")


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / words[0], *words[1:]], check=check, capture_output=True, text=True, timeout=180
    )


class Pair:
    """A mounted disk, a receiver and a sender; ended in any case by `close`."""

    def __init__(self, folder: Path, through: Callable[[str], str] = str) -> None:
        """The sender connects to what ``through`` makes of the receiver's address."""
        self.image, self.mountpoint = folder / "disk.img", folder / "mnt"
        self.replica = folder / "store" / "r" / "disk.img"
        self.address = f"unix://{folder / 's'}"
        self.mountpoint.mkdir()
        (folder / "store").mkdir()
        self.image.write_bytes(os.urandom(IMAGE_BYTES))
        run("fusedisk", "mount", self.image, self.mountpoint)
        self.store = folder / "store"
        self.receiver = self.receive()
        self.sender = subprocess.Popen(
            [
                *(BIN / "replicator", "start", "--name", "r", "--rpo", "0.2"),
                *(self.mountpoint, through(self.address)),
            ],
            stderr=subprocess.DEVNULL,
        )
        self.wait_for_state("following")

    def receive(self) -> subprocess.Popen[bytes]:
        receiver = subprocess.Popen(
            [BIN / "replicator", "receive", "--store", self.store, self.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert receiver.stdout is not None
        assert receiver.stdout.readline().startswith(b"listening on unix://")
        return receiver

    def wait_for_state(self, state: str) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = json.loads(run("replicator", "status", "--json", self.mountpoint).stdout)
            if found["replicas"] and found["replicas"][0]["state"] == state:
                return
            time.sleep(0.05)
        raise AssertionError(f"never {state}: {found}")

    def wait_until_committed(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = json.loads(run("replicator", "status", "--json", self.mountpoint).stdout)
            if found["replicas"][0]["lag"]["chunks"] == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"never committed: {found}")

    def write(self, data: bytes, offset: int = 0) -> None:
        fd = os.open(self.mountpoint / "disk.img", os.O_RDWR)
        try:
            os.pwrite(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        for process in (self.sender, self.receiver):
            process.kill()
            process.wait()
        if self.mountpoint.is_mount():
            run("fusedisk", "unmount", self.mountpoint)


@pytest.fixture
def pair(tmp_path: Path, fuse: None) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def test_the_target_has_every_acknowledged_write_and_the_source_is_fenced(pair: Pair):
    acknowledged: list[int] = []
    refused: list[int | None] = []

    def write() -> None:
        number = 0
        try:
            while True:
                pair.write(number.to_bytes(8, "little"), number % 2000 * 4096)
                acknowledged.append(number)
                number += 1
        except OSError as error:
            refused.append(error.errno)

    writer = threading.Thread(target=write)
    writer.start()
    result = run("replicator", "cutover", "--json", "--max-downtime", "10000", pair.mountpoint)
    writer.join()
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["outcome"] == "promoted"
    assert outcome["downtime_ms"] < 10_000
    assert outcome["root"] == "equal"
    assert pair.sender.wait(60) == 0
    assert refused == [30]  # EROFS
    assert pair.replica.read_bytes() == pair.image.read_bytes()
    last = acknowledged[-1]
    offset = last % 2000 * 4096
    assert pair.replica.read_bytes()[offset : offset + 8] == last.to_bytes(8, "little")

    # The fence outlives the mount and the state directory.
    run("fusedisk", "unmount", pair.mountpoint)
    elsewhere = pair.image.parent / "elsewhere"
    run("fusedisk", "mount", "--state-dir", elsewhere, pair.image, pair.mountpoint)
    with pytest.raises(OSError) as error:
        pair.write(b"x")
    assert error.value.errno == 30
    assert json.loads(run("fusedisk", "status", "--json", pair.mountpoint).stdout)["fenced"]


def test_a_failing_before_hook_rolls_back(pair: Pair):
    result = run("replicator", "cutover", *BOUND, "--before", "false", pair.mountpoint, check=False)
    assert result.returncode == 1
    assert "--before false ended with status 1" in result.stderr
    pair.write(b"the guest goes on")
    assert read_fence([pair.image]) is None


def test_hooks_know_the_facts_and_run_in_order(pair: Pair):
    said = pair.image.parent / "said"
    say = "echo {} $FUSEDISK_OUTCOME $FUSEDISK_REPLICA $FUSEDISK_MOUNTPOINT >> " + str(said)
    # What a hook leaves running keeps its output open, and must not keep the cutover.
    hooks = ["--before", say.format("before"), "--after", say.format("after") + "; sleep 30 &"]
    result = run("replicator", "cutover", "--json", *BOUND, *hooks, pair.mountpoint)
    assert json.loads(result.stdout)["outcome"] == "promoted"
    assert said.read_text().splitlines() == [
        f"before pending r {pair.mountpoint}",
        f"after promoted r {pair.mountpoint}",
    ]


def test_a_rollback_after_the_guest_was_paused_lets_it_go_on(pair: Pair):
    said = pair.image.parent / "said"
    resume = ["--on-rollback", f"echo resumed $FUSEDISK_OUTCOME >> {said}"]
    pause = ["--before", "sleep 60", "--hook-timeout", "0.3"]
    result = run(
        "replicator", "cutover", "--json", *BOUND, *pause, *resume, pair.mountpoint, check=False
    )
    assert result.returncode == 1
    assert "did not end within 0.3 s" in result.stderr
    assert json.loads(result.stdout)["outcome"] == "rolled-back"
    assert said.read_text() == "resumed rolled-back\n"
    pair.write(b"the guest goes on")


def test_a_dry_run_says_what_it_would_take_and_replication_goes_on(pair: Pair):
    result = run(
        "replicator", "cutover", "--json", *BOUND, "--dry-run", "--before", "false", pair.mountpoint
    )
    outcome = json.loads(result.stdout)
    assert outcome["outcome"] == "dry-run"
    assert 0 < outcome["downtime_ms"] < 10_000
    assert {"dirty_rate", "send_rate"} <= outcome.keys()
    pair.write(b"goes on")
    pair.wait_for_state("following")
    assert pair.sender.poll() is None


def test_a_bound_that_cannot_be_kept_is_refused_before_the_gate(pair: Pair):
    options = ["--max-downtime", "1", "--timeout", "1"]
    result = run("replicator", "cutover", "--json", *options, pair.mountpoint, check=False)
    assert result.returncode == 3
    assert json.loads(result.stdout)["outcome"] == "rolled-back"
    assert "stays above --max-downtime (1 ms" in result.stderr
    pair.write(b"the guest goes on")


def test_a_replica_that_differs_is_not_promoted(pair: Pair):
    pair.write(b"settled", 0)
    pair.wait_until_committed()
    with pair.replica.open("r+b") as replica:
        replica.seek(5 << 20)
        replica.write(b"damaged behind everybody's back")
    result = run("replicator", "cutover", "--verify", "full", pair.mountpoint, check=False)
    assert result.returncode == 5
    assert f"disk.img {5 << 20}+65536" in result.stderr
    pair.write(b"the guest goes on")
    assert read_fence([pair.image]) is None


def test_a_killed_sender_opens_its_gate(pair: Pair):
    """The gate is a lease: a holder that dies costs the guest a pause, not the disk."""
    state = pair.image.with_name("disk.img.fusedisk")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(state)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "closed\n"
    writer = threading.Thread(target=pair.write, args=(b"held",))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    holder.kill()
    holder.wait()
    writer.join(60)
    assert not writer.is_alive()
    assert pair.image.read_bytes()[:4] == b"held"


HOLDER = """
import pathlib, sys, time
from fusedisk.changemap import Control
from fusedisk.gate import take_lease
state = pathlib.Path(sys.argv[1])
lease = take_lease(state)
control = Control(state / "control", True)
control.set_gate(True)
print("closed", flush=True)
time.sleep(60)
"""


def test_an_unknown_outcome_is_resolved_with_the_target(pair: Pair):
    record = FenceRecord("a-token", "committing", "r", pair.address, 1)
    record_fence([pair.image], record)
    pair.sender.terminate()
    pair.sender.wait()
    run("fusedisk", "unmount", pair.mountpoint)
    advice = f"run 'replicator resolve {pair.mountpoint}'"
    assert advice in run("fusedisk", "mount", pair.image, pair.mountpoint).stderr
    with pytest.raises(OSError):
        pair.write(b"x")
    unknown = {"state": "unknown", "mountpoint": str(pair.mountpoint), "token": "a-token"}
    unknown |= {"replica": "r", "address": pair.address}
    assert (
        json.loads(run("fusedisk", "status", "--json", pair.mountpoint).stdout)["cutover"]
        == unknown
    )
    found = json.loads(run("replicator", "status", "--json", pair.mountpoint).stdout)
    assert found["replicas"][0]["cutover"] == unknown
    for tool in ("fusedisk", "replicator"):
        lines = run(tool, "status", pair.mountpoint).stdout.splitlines()
        assert len([line for line in lines if advice in line]) == 1
    assert run("replicator", "resolve", pair.mountpoint).stdout == "rolled-back\n"
    for tool in ("fusedisk", "replicator"):
        assert advice not in run(tool, "status", pair.mountpoint).stdout
    pair.write(b"goes on")
    assert not fence_path(pair.image).exists()


def test_an_abandoned_gate_with_a_begun_promotion_becomes_a_fence(tmp_path: Path):
    control = Control.create(tmp_path / "control", 1)
    image = tmp_path / "image"
    record_fence([image], FenceRecord("t", "committing", "r", "unix:///s", 1))
    lease = take_lease(tmp_path)
    control.set_gate(True)
    release_if_abandoned(tmp_path, control, [image])
    assert control.gated and not control.fenced
    os.close(lease)
    release_if_abandoned(tmp_path, control, [image])
    assert control.fenced and not control.gated
    clear_fence([image])
    assert read_fence([image]) is None


def test_the_fence_follows_a_device_and_not_its_node(
    tmp_path: Path, loop_device: Callable[[Path], Path]
):
    for name in ("fenced", "other"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    device = loop_device(tmp_path / "fenced")
    record_fence([device], FenceRecord("t", "fenced", "r", "unix:///s", 1))
    assert read_fence([device]) is not None
    # The node goes to another disk, and the disk to another node.
    subprocess.run(["losetup", "--detach", device], check=True)
    subprocess.run(["losetup", device, tmp_path / "other"], check=True)
    assert read_fence([device]) is None
    again = loop_device(tmp_path / "fenced")
    assert again != device
    assert read_fence([again]) is not None


def test_a_fence_of_another_replica_is_no_promotion(pair: Pair, tmp_path: Path):
    record_fence([pair.image], FenceRecord("t", "fenced", "other", "unix:///there", 1))
    pair.sender.kill()
    pair.sender.wait()
    after = ["--after", f"touch {tmp_path / 'after'}"]
    result = run("replicator", "cutover", "--json", *after, pair.mountpoint, check=False)
    assert result.returncode == 1
    assert json.loads(result.stdout)["outcome"] == "unknown"
    assert "r was not promoted, other at unix:///there is the disk already" in result.stderr
    assert not (tmp_path / "after").exists()


def test_a_promotion_whose_sender_died_before_the_hook_says_so(pair: Pair):
    record_fence([pair.image], FenceRecord("t", "fenced", "r", "unix:///there", 1))
    pair.sender.kill()
    pair.sender.wait()
    result = run(
        "replicator", "cutover", "--json", "--after", "start-it", pair.mountpoint, check=False
    )
    assert result.returncode == 1
    assert json.loads(result.stdout)["outcome"] == "promoted"
    (line,) = result.stderr.splitlines()
    assert "the replica is promoted" in line and "run it by hand: start-it" in line
    # Without the hook there is nothing left to do.
    result = run("replicator", "cutover", "--json", pair.mountpoint)
    assert json.loads(result.stdout)["outcome"] == "promoted"


def test_the_guest_that_a_killed_sender_left_paused_goes_on(pair: Pair, tmp_path: Path):
    """Its hook is still at work: only once it is done the guest is let go."""
    begun, paused, resumed = tmp_path / "begun", tmp_path / "paused", tmp_path / "resumed"
    hooks = [
        *("--before", f"touch {begun}; sleep 1; echo $FUSEDISK_TOKEN > {paused}"),
        *("--on-rollback", f"test $FUSEDISK_OUTCOME = rolled-back && mv {paused} {resumed}"),
    ]
    killer = threading.Thread(target=_kill_when, args=(pair.sender, begun))
    killer.start()
    result = run("replicator", "cutover", "--json", *BOUND, *hooks, pair.mountpoint, check=False)
    killer.join()
    assert result.returncode == 1 and "nothing was promoted" in result.stderr
    assert "by hand" not in result.stderr, result.stderr
    assert json.loads(result.stdout)["outcome"] == "rolled-back"
    assert len(resumed.read_text()) == 37 and not paused.exists()
    # There is nothing left to undo, whatever ends next without an answer.
    again = run("replicator", "cutover", *hooks, pair.mountpoint, check=False)
    assert "has no running sender" in again.stderr and "--on-rollback" not in again.stderr
    pair.write(b"the guest goes on")


def _kill_when(process: subprocess.Popen[bytes], there: Path) -> None:
    deadline = time.monotonic() + 50
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
