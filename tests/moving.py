"""A recording guest on a mount, its replica, and the QEMU that waits for it there."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conftest import Mount, wait_for
from proxy import Proxy
from recording_guest import Record, RecordingGuest, check_disk, make_disk

from fusedisk.fencing import read_fence

REPLICATOR = str(Path(sys.executable).with_name("replicator"))


class Move:
    """Everything for one cutover; `close` ends it all. The mount is the caller's."""

    def __init__(
        self, folder: Path, mount: Mount, away: Callable[..., Mount] | None = None
    ) -> None:
        """With ``away``, which makes one, the waiting QEMU has its disks in a mount there."""
        self.folder, self.mount = folder, mount
        self._stack = ExitStack()
        self.store = folder / "store"
        self.store.mkdir()
        for image in mount.images:
            make_disk(image)
        try:
            self._begin(away)
        except BaseException:
            # Also where there is no QEMU and the test is skipped.
            self._stack.close()
            raise

    def _begin(self, away: Callable[..., Mount] | None) -> None:
        folder, mount = self.folder, self.mount
        mount.mount()
        self.receiver = self.receive()
        self.proxy = self._stack.enter_context(Proxy(f"unix://{folder / 's'}"))
        self.sender = self._send()
        self.wait_for_state("following")
        self.replicas = [self.store / "r" / image.name for image in mount.images]
        self.uri = f"unix:{folder / 'ram'}"
        disks = [mount.disk(number) for number in range(len(mount.images))]
        self.source = self.boot("source", disks)
        self.source.wait_for_records(3)
        self.target_disks = self.replicas
        if away is None:
            self.target = self.boot("target", self.replicas, self.uri)
        else:
            self.away = away(*self.replicas, name="mnt-away")
            self.target = self.boot_standing_by("target", self.away, self.uri)
            self.target_disks = [self.away.disk(number) for number in range(len(self.replicas))]

    def boot(self, name: str, disks: list[Path], incoming: str | None = None) -> RecordingGuest:
        """Start a QEMU that ends with us."""
        guest = RecordingGuest(self.folder / name, disks, incoming)
        self._stack.callback(guest.close)
        return guest

    def boot_standing_by(self, name: str, mount: Mount, uri: str) -> RecordingGuest:
        """Mount a replica's images that stand by, for a QEMU that waits on them."""
        mount.mount("--standby")
        disks = [mount.disk(number) for number in range(len(mount.images))]
        return self.boot(name, disks, uri)

    def prepare_home(self, home: Callable[..., Mount]) -> "Home":
        """After the move: let the old images follow, with a QEMU that waits on them."""
        assert self.sender.wait(60) == 0
        self.source.close()
        self.mount.unmount()
        return Home(self, home)

    def _run(self, log: str, *words: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen([REPLICATOR, *words], stdout=file, stderr=file)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def receive(self) -> subprocess.Popen[bytes]:
        """Start the receiver, also again."""
        (self.folder / "s").unlink(missing_ok=True)
        address = f"unix://{self.folder / 's'}"
        process = self._run("receive.log", "receive", "--store", self.store, address)
        wait_for((self.folder / "s").exists, "the receiver listens")
        return process

    def _send(self) -> subprocess.Popen[bytes]:
        words = ("start", "--name", "r", "--rpo", "0.5", self.mount.mountpoint, self.proxy.address)
        return self._run("start.log", *words)

    def entry(self, mount: Mount | None = None) -> dict[str, Any]:
        """The replica in the status of a mount, of the first one if not said otherwise."""
        words = [REPLICATOR, "status", "--json", (mount or self.mount).mountpoint]
        found = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
        entries: list[dict[str, Any]] = found["replicas"]
        return entries[0] if entries else {"state": "none"}

    def wait_for_state(self, state: str, mount: Mount | None = None) -> None:
        wait_for(lambda: self.entry(mount)["state"] == state, f"the replica is {state}", 60)

    def cut_over(self, *, moves: bool = True) -> subprocess.Popen[bytes]:
        """The command, not waited for; what it says is in cutover.log."""
        words = ("--max-downtime", "20000", "--timeout", "40", "--qmp", self.source.qmp, "--json")
        move = ("--migrate-to", self.uri) if moves else ()
        return self._run("cutover.log", "cutover", *words, *move, self.mount.mountpoint)

    def log(self, name: str) -> str:
        return (self.folder / name).read_text()

    @property
    def answer(self) -> dict[str, Any]:
        """The object that ``cutover --json`` printed."""
        lines = [line for line in self.log("cutover.log").splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def settle(self) -> bool:
        """After whatever happened, start again what died, and resolve; whether it was promoted."""
        self.proxy.heal()
        if self.receiver.poll() is not None:
            self.receiver = self.receive()
        record = read_fence(self.mount.images)
        if record is not None and record.state == "committing":
            self.sender.kill()
            self.sender.wait()
            words = [REPLICATOR, "resolve", "--qmp", self.source.qmp, self.mount.mountpoint]
            resolved = subprocess.run(words, capture_output=True, text=True, timeout=120)
            assert resolved.returncode == 0, resolved.stderr
            record = read_fence(self.mount.images)
        assert record is None or record.state == "fenced"
        return record is not None

    def records(self, *guests: RecordingGuest) -> list[Record]:
        """All records, in the order of their guests; a line may begin on one console and end on
        the next.
        """
        return RecordingGuest.parse("".join(guest.said for guest in guests))

    def check(self, images: list[Path], *guests: RecordingGuest) -> None:
        """End the last of the guests; no record is missing or was written twice, on any disk.

        A guest that started anew may have had a record durable that it did not come to print.
        """
        guests[-1].wait_for_records(3)
        guests[-1].end()
        records = self.records(*guests)
        printed = [record.number for record in records]
        moved = len({record.boot for record in records}) == 1
        if moved:
            assert printed == list(range(1, printed[-1] + 1))
        for image in images:
            written = check_disk(image)
            assert written == sorted(set(written))
            assert set(printed) <= set(written)
            assert written == printed or not moved

    def close(self) -> None:
        self._stack.close()


class Home(Move):
    """The way back, once a guest has moved to disks in a mount: all is what it is on the way out,
    and ends with that.
    """

    def __init__(self, out: Move, home: Callable[..., Mount]) -> None:
        self.folder, self.mount, self._stack = out.folder / "home", out.away, out._stack
        self.folder.mkdir()
        self.store = self.folder / "store"
        self.store.mkdir()
        adopted = self._run("adopt.log", "adopt", self.store / "r", *out.mount.images)
        assert adopted.wait(60) == 0, self.log("adopt.log")
        self.receiver = self.receive()
        self.proxy = self._stack.enter_context(Proxy(f"unix://{self.folder / 's'}"))
        self.replicas = [self.store / "r" / image.name for image in out.mount.images]
        self.uri = f"unix:{self.folder / 'ram'}"
        self.source, self.away = out.target, home(*self.replicas, name="mnt-home")
        self.target = self.boot_standing_by("target", self.away, self.uri)
        self.target_disks = [self.away.disk(number) for number in range(len(self.replicas))]
        self.sender = self._send()
        self.wait_for_state("following")
