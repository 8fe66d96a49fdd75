"""There and back again: after a cutover the way home sends only what changed since."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, fusedisk, wait_for
from test_promotion import replicator
from test_replication import REPLICATOR, guest_write

from fusedisk.fencing import fence_path, read_fence

MIB = 1 << 20
SIZES = [24 * MIB, 8 * MIB]


class Host:
    """A store with a receiver, and a mountpoint."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.store, self.mountpoint = folder, folder / "store", folder / "mnt"
        self.store.mkdir()
        self.mountpoint.mkdir()
        self.address = f"unix://{folder}/s"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.images = [folder / f"disk{n}.img" for n in range(len(SIZES))]

    def in_store(self) -> list[Path]:
        return [self.store / "vm" / image.name for image in self.images]

    def receive(self) -> None:
        receiver = subprocess.Popen(
            [REPLICATOR, "receive", "--store", self.store, "--keep", "5", self.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(receiver)
        assert receiver.stdout is not None
        assert receiver.stdout.readline().startswith(b"listening on")

    def mount(self) -> None:
        result = fusedisk("mount", *self.images, self.mountpoint)
        assert (result.returncode, result.stderr) == (0, "")

    def start(self, other: "Host") -> subprocess.Popen[bytes]:
        with (self.folder / "sender.log").open("wb") as log:
            sender = subprocess.Popen(
                [
                    *(REPLICATOR, "start", "--name", "vm", "--rpo", "0.2"),
                    *(self.mountpoint, other.address),
                ],
                stderr=log,
            )
        self.processes.append(sender)
        wait_for(lambda: self.state() == "following" or sender.poll() is not None, "it follows")
        assert sender.poll() is None, self.said()
        return sender

    def said(self) -> str:
        return (self.folder / "sender.log").read_text()

    def entry(self) -> dict[str, object]:
        found = json.loads(replicator("status", "--json", self.mountpoint).stdout)["replicas"]
        return dict(found[0]) if found else {}

    def state(self) -> object:
        return self.entry().get("state")

    def write(self, noise: random.Random, count: int) -> None:
        for _ in range(count):
            disk = noise.randrange(len(SIZES))
            offset = noise.randrange(SIZES[disk] // 4096) * 4096
            guest_write(self.mountpoint / self.images[disk].name, noise.randbytes(4096), offset)

    def content(self) -> list[bytes]:
        return [(self.mountpoint / image.name).read_bytes() for image in self.images]

    def cut_over(self) -> None:
        result = replicator("cutover", "--name", "vm", "--max-downtime", "20000", self.mountpoint)
        assert result.returncode == 0, result.stderr

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self.mountpoint.is_mount():
            assert fusedisk("unmount", self.mountpoint).returncode == 0


@pytest.fixture
def hosts(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[list[Host]]:
    made = [Host(tmp_path / name) for name in ("home", "away")]
    try:
        for image, size in zip(made[0].images, SIZES, strict=True):
            with image.open("wb") as file:
                file.truncate(size)
                file.write(os.urandom(size // 2))
        yield made
    finally:
        for host in made:
            host.close()


def leave(here: Host, there: Host) -> list[bytes]:
    """Cut over, and mount at the other side; what the disks held then."""
    here.cut_over()
    left = here.content()
    assert [path.read_bytes() for path in there.in_store()] == left
    there.images = there.in_store()
    there.mount()
    assert there.content() == left
    with pytest.raises(OSError):
        guest_write(here.mountpoint / here.images[0].name, b"x", 0)
    assert fusedisk("unmount", here.mountpoint).returncode == 0
    return left


def test_several_ways_there_and_back_send_only_what_changed(hosts: list[Host]):
    home, away = hosts
    noise = random.Random(3)
    home.mount()
    for host in hosts:
        host.receive()
    home.start(away)
    home.write(noise, 30)
    leave(home, away)
    adopted = replicator("adopt", home.store / "vm", *home.images)
    assert adopted.returncode == 0, adopted.stderr
    assert "compared" not in adopted.stdout
    assert not any(image.exists() or fence_path(image).exists() for image in home.images)
    home.images = home.in_store()
    here, there = away, home
    for turn in range(3):
        # Neither a fenced image nor a replica's can be mounted for writing.
        assert read_fence(there.in_store()) is not None
        refused = fusedisk("mount", *there.in_store(), there.mountpoint)
        assert refused.returncode == 1 and "belongs to a replica" in refused.stderr
        here.write(noise, 10)
        here.start(there)
        assert "only changes are sent" in here.said(), here.said()
        here.write(noise, 10)
        leave(here, there)
        sent = json.loads(
            (here.images[0].with_name("disk0.img.fusedisk") / "replicas/vm.json").read_text()
        )["sent"]
        # 20 writes of 4 KiB, each of them a chunk of 64 KiB at most.
        assert sent["data_bytes"] <= 20 * 65536, f"turn {turn}"
        assert sent["bytes"] <= 20 * 65536 + 100_000, f"turn {turn}"
        adopted = replicator("adopt", here.store / "vm")
        assert adopted.returncode == 0, adopted.stderr
        here, there = there, here


def test_an_image_that_changed_since_is_compared(hosts: list[Host]):
    home, away = hosts
    noise = random.Random(4)
    home.mount()
    for host in hosts:
        host.receive()
    home.start(away)
    leave(home, away)
    with home.images[1].open("r+b") as file:
        file.write(b"somebody ran a repair here")
    adopted = replicator("adopt", home.store / "vm", *home.images)
    assert adopted.returncode == 0, adopted.stderr
    assert "an image changed since the cutover" in adopted.stdout
    home.images = home.in_store()
    away.write(noise, 5)
    away.start(home)
    assert "bytes, because" in away.said()
    sent = away.entry()["sent"]
    assert isinstance(sent, dict) and sent["data_bytes"] <= 6 * 65536
    leave(away, home)


def test_promoted_images_that_were_written_past_the_mount_are_compared(hosts: list[Host]):
    home, away = hosts
    home.mount()
    for host in hosts:
        host.receive()
    home.start(away)
    home.cut_over()
    assert fusedisk("unmount", home.mountpoint).returncode == 0
    away.images = away.in_store()
    # A guest ran on the plain images for a while.
    with away.images[0].open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"unknown to any change map")
    away.mount()
    assert replicator("adopt", home.store / "vm", *home.images).returncode == 0
    home.images = home.in_store()
    away.start(home)
    assert "bytes, because" in away.said()
    leave(away, home)


def test_only_fenced_images_are_adopted(hosts: list[Host]):
    home, away = hosts
    refused = replicator("adopt", home.store / "vm", *home.images)
    assert refused.returncode == 1 and "is not fenced" in refused.stderr
    assert all(image.exists() for image in home.images)
    home.mount()
    away.receive()
    home.start(away)
    refused = replicator("adopt", away.store / "vm")
    assert refused.returncode == 1, refused.stdout
    home.cut_over()
    refused = replicator("adopt", home.store / "vm", *home.images)
    assert refused.returncode == 1 and "in use" in refused.stderr
    assert fusedisk("unmount", home.mountpoint).returncode == 0
    # The receiver lets go of the replica a moment after its session.
    wait_for(
        lambda: (
            "in use" not in (refused := replicator("adopt", away.store / "vm")).stderr
            and refused.returncode == 1
            and "is not fenced" in refused.stderr
        ),
        "images that are not fenced are refused",
    )
    assert replicator("adopt", home.store / "vm", *home.images).returncode == 0
    # An adoption that a crash cut short is repeated.
    for image in home.images:
        os.link(home.store / "vm" / image.name, image)
    assert replicator("adopt", home.store / "vm", *home.images).returncode == 0
    assert not any(image.exists() for image in home.images)
    home.images[0].write_bytes(b"another")
    refused = replicator("adopt", home.store / "vm", *home.images)
    assert refused.returncode == 1 and "exists already" in refused.stderr
