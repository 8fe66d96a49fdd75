"""A database as a witness: what a recovery point must hold, by what the client had been told.

The client reads the number of the open epoch before each commit and after its acknowledgement. A
point at the end of epoch E holds every commit that was acknowledged in E or before, and none that
was asked for later. There is one client, so between the two lies one commit at most.
"""

import contextlib
import hashlib
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import Mount, wait_for
from test_filesystems import Loop, run
from test_replication import REPLICATOR, Process

from fusedisk.changemap import Control
from replicator.manifest import Point, read_manifest

POINTS = int(os.environ.get("FUSEDISK_DATABASE_POINTS", "8"))
WINDOW = 300
# Of each row, so that some share a page of the database and some take several.
PAYLOAD_BYTES_MAX = 12_000


class Row(NamedTuple):
    """A commit adds the row, removes the one that left the window, and writes the summary anew."""

    number: int
    payload: bytes
    checksum: str
    chain: str


def checksum(number: int, payload: bytes) -> str:
    return hashlib.sha256(b"%d:%b" % (number, payload)).hexdigest()


class Ledger:
    """The commits of one client, and between which two looks at the epoch each was made."""

    def __init__(self, mount: Mount, seed: int) -> None:
        self._control = Control(mount.state / "control")
        self._random = random.Random(seed)
        self._looks: list[tuple[int, int]] = []
        self._chains = [""]

    def commit(self, do: Callable[[Row], None]) -> None:
        """Have ``do`` commit the next row; it returns once that is acknowledged."""
        number = len(self._chains)
        payload = self._random.randbytes(self._random.randrange(PAYLOAD_BYTES_MAX))
        own = checksum(number, payload)
        chain = hashlib.sha256(f"{self._chains[-1]}{own}".encode()).hexdigest()
        self._chains.append(chain)
        before = self._control.epoch
        do(Row(number, payload, own, chain))
        self._looks.append((before, self._control.epoch))

    def check(
        self, epoch: int, rows: list[tuple[int, bytes, str]], summary: tuple[int, str]
    ) -> int:
        """That this is the database at the end of ``epoch``; returns how many commits it has."""
        acknowledged = sum(after <= epoch for _, after in self._looks)
        asked = sum(before <= epoch for before, _ in self._looks)
        newest, chain = summary
        assert acknowledged <= newest <= asked, f"epoch {epoch}: {acknowledged}, {newest}, {asked}"
        assert asked <= acknowledged + 1
        # No gap: neither in the rows that are there, nor in what they followed.
        want = list(range(max(1, newest - WINDOW + 1), newest + 1))
        assert [number for number, _, _ in rows] == want
        assert all(checksum(number, payload) == own for number, payload, own in rows)
        assert chain == self._chains[newest]
        return newest

    def __len__(self) -> int:
        return len(self._looks)


class Client(threading.Thread):
    """Commits one row after the other until it is stopped."""

    def __init__(self, ledger: Ledger, do: Callable[[Row], None]) -> None:
        super().__init__(daemon=True)
        self._ledger, self._do = ledger, do
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._ledger.commit(self._do)
        except BaseException as error:
            self._failure = error

    def check(self) -> None:
        assert self._failure is None, self._failure

    def end(self) -> None:
        self._stopping.set()
        self.join(60)
        assert not self.is_alive()


@contextlib.contextmanager
def filesystems(disks: list[Path], *, make: bool = False) -> Iterator[tuple[Path, list[Loop]]]:
    """The ext4 of each disk, mounted as 0, 1, ... side by side where other users get to."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusedisk")))
        base.chmod(0o755)
        loops = []
        for number, disk in enumerate(disks):
            loops.append(Loop(disk, base / str(number)))
            stack.callback(loops[-1].close)
            if make:
                run("mkfs.ext4", "-q", "-F", loops[-1].device)
            loops[-1].mount()
        yield base, loops


@contextlib.contextmanager
def recovered(disks: list[Path]) -> Iterator[Path]:
    """The file systems of a point: the kernel replays their journals, then e2fsck finds nothing."""
    with filesystems(disks) as (base, loops):
        for number in range(2):
            for loop in loops:
                loop.unmount()
                # Before and after the database recovered in its turn.
                run("e2fsck", "-f", "-n", loop.device)
                loop.mount()
            if number == 0:
                yield base


@contextlib.contextmanager
def opened_point(replica: Path, point: int, folder: Path, *, copy: bool) -> Iterator[list[Path]]:
    """The disks as they were at a point, for writing: copied out, or as a view."""
    folder.mkdir()
    if copy:
        run(REPLICATOR, "restore", "--point", str(point), replica, folder)
        yield sorted(folder.iterdir())
        for path in folder.iterdir():
            path.unlink()
    else:
        run(REPLICATOR, "mount", "--point", str(point), "--writable", replica, folder)
        try:
            yield sorted(folder.iterdir())
        finally:
            # A loop device lets go of its file a moment after it was detached.
            unmount = [REPLICATOR, "unmount", folder]
            wait_for(lambda: _succeeds(unmount), "the view is unmounted")
    folder.rmdir()


def _succeeds(command: list[str | Path]) -> bool:
    with contextlib.suppress(AssertionError):
        run(*command)
        return True
    return False


def replicate_under_load(mount: Mount, client: Client, folder: Path, count: int) -> Path:
    """Replicate while the client commits until there are ``count`` points; returns the replica."""
    store = folder / "store"
    store.mkdir()
    keep = str(count + 50)
    receiver = Process(
        folder / "receive.log", "receive", "--store", store, "--keep", keep, f"unix://{folder}/s"
    )
    processes = [receiver]
    try:
        wait_for(lambda: receiver.out.read_text().endswith("\n"), "the receiver listens")
        client.start()
        address = receiver.out.read_text().removeprefix("listening on ").strip()
        options = ("--name", "r", "--rpo", "0.3")
        sender = Process(folder / "start.log", "start", *options, mount.mountpoint, address)
        processes.append(sender)

        def enough() -> bool:
            client.check()
            assert sender.popen.poll() is None, sender.said
            return len(points(store / "r")) >= count

        wait_for(enough, "there are points", 30 + 3 * count)
    finally:
        # Nothing of this may depend on the sender or the receiver ending in order.
        for process in reversed(processes):
            process.kill()
    return store / "r"


def points(replica: Path) -> list[Point]:
    manifest = read_manifest(replica)
    return [] if manifest is None else list(manifest.points)


def check_points(
    replica: Path, folder: Path, check: Callable[[list[Path], Point], int], say: str
) -> None:
    """Check each point, copied out and as a view in turn: the disks go on from one to the next."""
    found = []
    for number, point in enumerate(points(replica)):
        view = folder / f"point{point.id}"
        with opened_point(replica, point.id, view, copy=number % 2 == 0) as disks:
            found.append(check(disks, point))
    print(f"{say}: {len(found)} points, with {found[0]} to {found[-1]} commits")
    assert found == sorted(found)
    # Under load: it is no proof if the database stood still.
    assert found[-1] > found[0] and len(set(found)) > len(found) // 2
