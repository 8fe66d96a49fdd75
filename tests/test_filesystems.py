"""File systems on a loop device over a mounted disk: their own checks find nothing, a TRIM frees.

FUSEDISK_FILESYSTEM_ROUNDS is how often the server is killed while they work (default 2).
"""

import hashlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, unavailable, wait_for
from verifying_load import kill_server, replicated

ROUNDS = int(os.environ.get("FUSEDISK_FILESYSTEM_ROUNDS", "2"))
MIB = 1 << 20
# Enough for XFS, which wants 300 MiB.
SIZE = 400 * MIB
WORKERS = 3

MakeMount = Callable[..., Mount]


def run(*command: str | Path) -> str:
    """Run to success, in a file system's own words."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, (command, result.stdout, result.stderr)
    return result.stdout


class Loop:
    """A loop device over a disk of a mount, and the file system on it."""

    def __init__(self, disk: Path, folder: Path) -> None:
        # Direct: else the same pages would be cached twice, and writeback would wait for itself.
        command = ["losetup", "--direct-io=on", "--find", "--show", str(disk)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            unavailable(f"no loop device: {result.stderr.strip()}")
        self.device, self.folder = Path(result.stdout.strip()), folder
        self.folder.mkdir()
        self.mounted = False

    def mount(self) -> None:
        run("mount", self.device, self.folder)
        self.mounted = True

    def unmount(self) -> None:
        run("umount", self.folder)
        self.mounted = False

    def close(self) -> None:
        if self.mounted:
            self.unmount()
        run("losetup", "--detach", self.device)


@pytest.fixture
def loop(tmp_path: Path, fuse: MakeMount) -> Iterator[tuple[Mount, Loop]]:
    mount = fuse(tmp_path / "disk.img")
    mount.mount("--create", str(SIZE))
    over = Loop(mount.disk(), tmp_path / "fs")
    yield mount, over
    over.close()


def make_filesystem(kind: str, device: Path) -> None:
    try:
        run(f"mkfs.{kind}", "-q", "-f" if kind != "ext4" else "-F", device)
    except FileNotFoundError:
        unavailable(f"mkfs.{kind} is missing")


class Worker(threading.Thread):
    """Makes, changes, syncs, renames and removes files of its own, and knows what is in them."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.random = random.Random(seed)
        self.contents: dict[str, bytes] = {}
        self.stopping = threading.Event()
        self.steps = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.folder.mkdir()
            while not self.stopping.is_set():
                self.step()
                self.steps += 1
        except BaseException as error:
            self.failure = error

    def step(self) -> None:
        """One thing that a program does to a file."""
        name = f"file{self.random.randrange(60)}"
        path, old = self.folder / name, self.contents.get(name)
        kind = self.random.randrange(8)
        if old is None or kind < 3:
            data = self.random.randbytes(self.random.choice([100, 5000, 70000, 600000]))
            path.write_bytes(data)
            self.contents[name] = data
        elif kind == 3:
            path.unlink()
            del self.contents[name]
        elif kind == 4:
            assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(old).digest()
        elif kind == 5:
            other = f"file{self.random.randrange(60)}"
            path.rename(self.folder / other)
            del self.contents[name]
            self.contents[other] = old
        else:
            at, data = self.random.randrange(len(old)), self.random.randbytes(3000)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.contents[name] = old[:at] + data + old[at + len(data) :]

    def verify(self) -> None:
        """What is there is what was written, and nothing else."""
        assert self.failure is None, self.failure
        assert {path.name for path in self.folder.iterdir()} == set(self.contents)
        for name, content in self.contents.items():
            assert (self.folder / name).read_bytes() == content, name


def work(mount: Mount, folder: Path, between: Callable[[], object]) -> list[Worker]:
    """Workers all at once while the server is killed; ``between`` two kills something else."""
    workers = [Worker(folder / f"worker{n}", n) for n in range(WORKERS)]
    for worker in workers:
        worker.start()

    def progress() -> None:
        before = [worker.steps for worker in workers]

        def moved() -> bool:
            assert [worker.failure for worker in workers] == [None] * WORKERS
            return all(w.steps > n + 20 for w, n in zip(workers, before, strict=True))

        wait_for(moved, "all workers go on", 60)

    try:
        for number in range(ROUNDS):
            progress()
            time.sleep(random.Random(number).uniform(0, 0.3))
            kill_server(mount)
            between()
        progress()
    finally:
        for worker in workers:
            worker.stopping.set()
        for worker in workers:
            worker.join(60)
    return workers


@pytest.mark.soak
def test_btrfs_is_scrubbed_clean(loop: tuple[Mount, Loop]) -> None:
    mount, over = loop
    make_filesystem("btrfs", over.device)
    over.mount()

    def rearrange() -> None:
        (over.folder / "snapshots").mkdir(exist_ok=True)
        snapshot = over.folder / f"snapshots/{time.monotonic_ns()}"
        run("btrfs", "-q", "subvolume", "snapshot", over.folder, snapshot)
        run("btrfs", "balance", "start", "-dusage=80", over.folder)
        run("btrfs", "-q", "subvolume", "delete", snapshot)

    workers = work(mount, over.folder, rearrange)
    said = run("btrfs", "scrub", "start", "-B", over.folder)
    assert "no errors found" in said, said
    # Every error of the device that it met since it was made; not one was repaired silently.
    run("btrfs", "device", "stats", "--check", over.folder)
    over.unmount()
    run("btrfs", "check", over.device)
    over.mount()
    for worker in workers:
        worker.verify()
    over.unmount()
    assert mount.status()["server"]["restarts"] == ROUNDS


@pytest.mark.soak
def test_xfs_is_found_clean(loop: tuple[Mount, Loop]) -> None:
    mount, over = loop
    make_filesystem("xfs", over.device)
    over.mount()
    workers = work(mount, over.folder, lambda: run("fstrim", over.folder))
    over.unmount()
    run("xfs_repair", "-n", over.device)
    over.mount()
    for worker in workers:
        worker.verify()
    over.unmount()
    assert mount.status()["server"]["restarts"] == ROUNDS


def blocks(path: Path) -> int:
    """Allocated bytes."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("kind", ["ext4", "btrfs", "xfs"])
def test_fstrim_frees_space_on_both_sides(
    loop: tuple[Mount, Loop], tmp_path: Path, kind: str
) -> None:
    mount, over = loop
    make_filesystem(kind, over.device)
    image = mount.images[0]
    with replicated(mount, tmp_path) as folder:
        replica = folder / "disk.img"
        over.mount()
        (over.folder / "large").write_bytes(os.urandom(64 * MIB))
        run("sync", "-f", over.folder)
        wait_for(lambda: replica.exists() and blocks(replica) > 64 * MIB, "it is replicated")
        full = blocks(image), blocks(replica)
        (over.folder / "large").unlink()
        run("sync", "-f", over.folder)
        run("fstrim", over.folder)
        assert blocks(image) < full[0] - 60 * MIB
        wait_for(lambda: blocks(replica) < full[1] - 60 * MIB, "the replica shrinks")
        print(f"{kind}: {full} bytes, then {blocks(image), blocks(replica)}")
        over.unmount()
        wait_for(lambda: replica.read_bytes() == image.read_bytes(), "both sides are equal")
