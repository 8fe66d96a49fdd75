"""A guest that appends numbered, synced records to all its disks and says so on its console.

``record N BOOT UPTIME`` is printed only when the record is durable on every disk, so whoever has
read that line may rely on it. BOOT differs from boot to boot; numbers go on where the file ends.
"""

import json
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import wait_for
from guest import Guest, virtio_disk

WAIT_SECONDS = 120.0

_SCRIPT = """
disks=
for device in /dev/vd?; do
    disk=/mnt/${device#/dev/}
    mkdir -p $disk
    mount -t ext4 $device $disk || echo "cannot mount $device"
    disks="$disks $disk"
done
boot=$(cut -c1-8 /proc/sys/kernel/random/boot_id)
last=$(tail -n 1 /mnt/vda/records 2>/dev/null | cut -d' ' -f1)
number=${last:-0}
echo "booted $boot after record $number"
# What is typed must not appear in the midst of a record.
stty -echo </dev/ttyS0
while read -r word; do [ "$word" = stop ] && touch /stop; done </dev/ttyS0 &
while [ ! -e /stop ]; do
    number=$((number + 1))
    failed=
    for disk in $disks; do
        echo "$number $boot" |
            dd of=$disk/records oflag=append conv=notrunc,fsync 2>/dev/null || failed=1
    done
    if [ $failed ]; then echo "failed to write $number"; sleep 1; continue; fi
    read -r up rest </proc/uptime
    echo "record $number $boot $up"
done
umount $disks && echo unmounted
"""


@dataclass(frozen=True)
class Record:
    """A line of the console."""

    number: int
    boot: str
    uptime: float


class RecordingGuest(Guest):
    """One QEMU with a monitor at ``qmp``; with ``incoming`` it waits for a guest's memory."""

    def __init__(self, folder: Path, disks: Sequence[Path], incoming: str | None = None) -> None:
        folder.mkdir()
        self.qmp = folder / "qmp"
        options = ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
        for number, disk in enumerate(disks):
            options += virtio_disk(disk, number)
        if incoming is not None:
            options += ["-incoming", incoming]
        self._sockets = [self.qmp]
        if incoming is not None and incoming.startswith("unix:"):
            self._sockets.append(Path(incoming.removeprefix("unix:")))
        super().__init__(folder, _SCRIPT, *options, programs=[])
        wait_for(self._listens, "QEMU listens")

    def _listens(self) -> bool:
        assert self.popen.poll() is None, self.said
        return all(path.exists() for path in self._sockets)

    @property
    def records(self) -> list[Record]:
        """What was printed so far, without a line that is still being printed."""
        return self.parse(self.said)

    @staticmethod
    def parse(said: str) -> list[Record]:
        """The records in what consoles said."""
        found = re.findall(r"^record (\d+) (\S+) ([\d.]+)\r?\n", said, re.MULTILINE)
        return [Record(int(number), boot, float(up)) for number, boot, up in found]

    @property
    def numbers(self) -> list[int]:
        """The numbers of `records`."""
        return [record.number for record in self.records]

    def wait_for_records(self, count: int) -> None:
        """Until that many more are printed."""
        before = len(self.records)

        def enough() -> bool:
            assert self.popen.poll() is None, self.said
            return len(self.records) >= before + count

        wait_for(enough, f"there are {count} more records", WAIT_SECONDS)

    def query(self, command: str, **arguments: Any) -> Any:
        """One command over a connection of its own; QEMU serves one at a time."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WAIT_SECONDS)
            sock.connect(str(self.qmp))
            lines = sock.makefile("rb")
            lines.readline()
            for word, values in (("qmp_capabilities", {}), (command, arguments)):
                request = {"execute": word, "arguments": values}
                sock.sendall(json.dumps(request).encode() + b"\n")
                while "event" in (reply := json.loads(lines.readline())):
                    pass
                assert "return" in reply, reply
        return reply["return"]

    @property
    def status(self) -> str:
        """QEMU's run state, e.g. ``running`` or ``paused``."""
        return str(self.query("query-status")["status"])

    def end(self) -> None:
        """Let it unmount its disks and power off."""
        self.say("stop")
        self.wait_ended()
        assert "unmounted" in self.said, self.said


def make_disk(path: Path, mib: int = 32) -> None:
    """A sparse image with an empty file system."""
    with path.open("wb") as file:
        file.truncate(mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)


def check_disk(path: Path) -> list[int]:
    """The numbers recorded on an unmounted disk, whose file system must be whole."""
    result = subprocess.run(["e2fsck", "-f", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = subprocess.run(
        ["debugfs", "-R", "cat /records", path], check=True, capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in shown.stdout.splitlines()]
