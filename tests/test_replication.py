"""Replication as a user meets it: real mounts, real senders and receivers, real kills."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Mount, wait_for

CHUNK = 65536
SIZES = [40 * CHUNK + 4608, 17 * CHUNK + 512]
REPLICATOR = str(Path(sys.executable).with_name("replicator"))


class Process:
    """A replicator process whose output is kept in files."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.log = log
        self.out = log.with_suffix(".out")
        with log.open("wb") as stderr, self.out.open("wb") as stdout:
            self.popen = subprocess.Popen(
                [REPLICATOR, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.popen.wait(timeout=60)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


def sparse(path: Path, size: int, seed: int) -> Path:
    """Data at the begin, in the middle and at the very end; holes between."""
    noise = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in ((0, CHUNK), (8 * CHUNK, 3 * CHUNK), (size - 512, 512)):
            file.seek(offset)
            file.write(noise.randbytes(length))
    return path


def guest_write(path: Path, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


class Pair:
    """A mount with two disks, a store, and the processes between them."""

    def __init__(self, tmp_path: Path, fuse: Callable[..., Mount]) -> None:
        self.tmp_path, self.fuse = tmp_path, fuse
        self.images = [
            sparse(tmp_path / f"disk{i}.img", size, i + 1) for i, size in enumerate(SIZES)
        ]
        self.mount = fuse(*self.images)
        self.mount.mount()
        self.store = tmp_path / "store"
        self.store.mkdir()
        self.address = "tcp://127.0.0.1:0"
        self.processes: list[Process] = []

    def run(self, *arguments: str | Path) -> Process:
        log = self.tmp_path / f"process{len(self.processes)}.log"
        self.processes.append(Process(log, *arguments))
        return self.processes[-1]

    def receive(self) -> Process:
        """Start the receiver; a second time on the address of the first."""
        receiver = self.run("receive", "--store", self.store, self.address)

        def listening() -> bool:
            assert receiver.popen.poll() is None, receiver.said
            return receiver.out.read_text().endswith("\n")

        wait_for(listening, "the receiver listens")
        self.address = receiver.out.read_text().removeprefix("listening on ").strip()
        return receiver

    def start(self, *options: str, mount: Mount | None = None) -> Process:
        where = (mount or self.mount).mountpoint
        return self.run("start", "--name", "r", "--rpo", "0.1", *options, where, self.address)

    def once(self) -> Process:
        sender = self.start("--once")
        assert sender.wait() == 0, sender.said
        return sender

    def refused(self, sender: Process, reason: str) -> None:
        assert sender.wait() == 1, sender.said
        lines = [s for s in sender.said.splitlines() if s.startswith("replicator: ")]
        assert len(lines) == 1 and reason in lines[0], sender.said
        assert "Traceback" not in sender.said

    def status(self) -> dict[str, Any]:
        result = subprocess.run(
            [REPLICATOR, "status", "--json", str(self.mount.mountpoint)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        (found,) = json.loads(result.stdout)["replicas"]
        assert isinstance(found, dict)
        return found

    def replica(self, index: int) -> Path:
        return self.store / "r" / self.images[index].name

    def identical(self) -> bool:
        """Whether the replica holds what the guest reads, which is what the images hold."""
        return all(
            self.replica(i).is_file()
            and self.replica(i).read_bytes()
            == image.read_bytes()
            == self.mount.disk(i).read_bytes()
            for i, image in enumerate(self.images)
        )

    def wait_identical(self) -> None:
        wait_for(self.identical, "the replica is identical")

    def wait_following(self, sender: Process) -> None:
        def following() -> bool:
            assert sender.popen.poll() is None, sender.said
            return "INFO following" in sender.said

        wait_for(following, "the sender follows")

    def stop(self, sender: Process) -> None:
        assert self.run("stop", "--name", "r", self.mount.mountpoint).wait() == 0
        assert sender.wait() == 0, sender.said

    def assert_holes_kept(self) -> None:
        for i, image in enumerate(self.images):
            assert self.replica(i).stat().st_blocks <= image.stat().st_blocks

    def clean_up(self) -> None:
        for process in reversed(self.processes):
            process.kill()


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    try:
        yield made
    finally:
        made.clean_up()


def test_fill_is_identical_and_keeps_holes(pair: Pair) -> None:
    receiver = pair.receive()
    pair.once()
    assert pair.identical()
    pair.assert_holes_kept()
    receiver.popen.terminate()
    assert receiver.wait() == 0, receiver.said


def test_second_sender_is_refused(pair: Pair) -> None:
    pair.receive()
    pair.wait_following(pair.start())
    second = pair.start()
    pair.refused(second, "has a running sender")
    assert len(second.said.splitlines()) == 1


def test_follow_stop_and_restart_with_only_the_changes(pair: Pair) -> None:
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    guest_write(pair.mount.disk(), b"a" * 5000, 20 * CHUNK - 100)
    guest_write(pair.mount.disk(1), b"b" * 512, SIZES[1] - 512)
    pair.wait_identical()
    wait_for(lambda: pair.status()["lag"]["chunks"] == 0, "nothing is left to send")
    pair.stop(sender)
    assert pair.status()["state"] == "stopped"

    guest_write(pair.mount.disk(), b"c" * 100, 30 * CHUNK)
    sender = pair.start()
    pair.wait_following(sender)
    pair.wait_identical()
    wait_for(lambda: pair.status()["lag"]["chunks"] == 0, "nothing is left to send")
    assert 0 < pair.status()["sent"]["data_bytes"] <= CHUNK
    assert "bytes, because" not in sender.said
    pair.stop(sender)


def test_sender_survives_a_killed_receiver(pair: Pair) -> None:
    receiver = pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    receiver.kill()
    guest_write(pair.mount.disk(), b"d" * CHUNK, 25 * CHUNK)
    wait_for(lambda: "trying again" in sender.said, "the sender noticed")
    pair.receive()
    pair.wait_identical()
    assert sender.popen.poll() is None
    pair.stop(sender)


def test_killed_sender_goes_on_when_started_again(pair: Pair) -> None:
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    sender.kill()
    guest_write(pair.mount.disk(), b"e" * CHUNK, 26 * CHUNK)
    again = pair.once()
    assert pair.identical()
    assert "bytes, because" not in again.said


def test_existing_images_become_identical(pair: Pair) -> None:
    (pair.store / "r").mkdir()
    for i, size in enumerate(SIZES):
        pair.replica(i).write_bytes(random.Random(99 + i).randbytes(size))
    pair.receive()
    assert "bytes, because" in pair.once().said
    assert pair.identical()
    pair.assert_holes_kept()


def test_replica_goes_on_after_a_crash_and_is_compared_if_nothing_is_believed(pair: Pair) -> None:
    pair.receive()
    pair.once()
    guest_write(pair.mount.disk(), b"f" * CHUNK, 27 * CHUNK)
    pair.mount.crash()
    assert "will be sent again" in pair.mount.mount()
    assert "bytes, because" not in pair.once().said
    assert pair.identical()
    guest_write(pair.mount.disk(), b"g" * CHUNK, 28 * CHUNK)
    pair.mount.crash()
    (pair.mount.state / "activity").unlink()
    assert "not trusted" in pair.mount.mount()
    assert "bytes, because" in pair.once().said
    assert pair.identical()


def test_another_source_is_refused(pair: Pair) -> None:
    pair.receive()
    pair.once()
    before = [pair.replica(i).read_bytes() for i in range(2)]
    folder = pair.tmp_path / "other"
    folder.mkdir()
    others = [sparse(folder / f"disk{i}.img", s, 7) for i, s in enumerate(SIZES)]
    other = pair.fuse(*others, name="other_mnt")
    other.mount()
    pair.refused(pair.start("--once", mount=other), "belongs to source")
    assert [pair.replica(i).read_bytes() for i in range(2)] == before


def test_source_of_another_size_is_refused(pair: Pair) -> None:
    pair.receive()
    pair.once()
    before = pair.replica(1).read_bytes()
    pair.mount.unmount()
    os.truncate(pair.images[1], SIZES[1] + CHUNK)
    pair.mount.mount()
    pair.refused(pair.start("--once"), "disk1.img")
    assert pair.replica(1).read_bytes() == before


def test_existing_image_of_another_size_is_refused(pair: Pair) -> None:
    (pair.store / "r").mkdir()
    pair.replica(0).write_bytes(b"x" * 1024)
    pair.replica(1).write_bytes(b"y" * SIZES[1])
    pair.receive()
    pair.refused(pair.start("--once"), "disk0.img")
    assert pair.replica(0).read_bytes() == b"x" * 1024


def test_peer_that_is_no_receiver_is_named(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.settimeout(5)
                peer.recv(1 << 16)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" * 4)
                with contextlib.suppress(ConnectionResetError):
                    while peer.recv(1 << 16):
                        pass

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        pair.address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        pair.refused(pair.start("--once"), pair.address)
        thread.join(timeout=60)
        assert not thread.is_alive()
