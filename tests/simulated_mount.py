"""A mount without FUSE: the guest's writes take the data path's own functions, in the order of the
virtual clock, and whatever the host would lose in a power loss can be lost.

Change maps, captures, gate, fence, and what a mount decides after a crash are the real ones. The
fault model of a power loss: each sector of an image is as at the last flush or as after any write
since; a change map is as at the mount, as it is, or anything between, page by page; the control
file is lost; what was written by rename and sync is there.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest import mock

from simulated_disk import SimulatedContent

from fusedisk.activityfile import first_regions
from fusedisk.capture import end_abandoned, open_spills
from fusedisk.changemap import ChangeMap, Control, Fenced, Gated
from fusedisk.checkpoint import open_log
from fusedisk.disk import Disk
from fusedisk.fencing import read_fence
from fusedisk.gate import release_if_abandoned
from fusedisk.image import Image
from fusedisk.preparing import prepare
from fusedisk.state import lock_state, read_mount_record, record_clean

CHUNK = 4096
_PAGE = 4096


class History:
    """What the disks held at the end of every epoch of one generation."""

    def __init__(self, content: list[bytes]) -> None:
        self._base = content
        self._changes: list[tuple[int, int, int, bytes]] = []
        self._begin_again()

    def _begin_again(self) -> None:
        self._content, self._done = [bytearray(one) for one in self._base], 0

    def write(self, epoch: int, disk: int, offset: int, data: bytes) -> None:
        assert not self._changes or self._changes[-1][0] <= epoch
        self._changes.append((epoch, disk, offset, data))

    def at(self, epoch: int) -> list[bytes]:
        """The disks at the end of an epoch."""
        # Mostly a later one is asked for than before.
        if self._done and self._changes[self._done - 1][0] > epoch:
            self._begin_again()
        while self._done < len(self._changes) and self._changes[self._done][0] <= epoch:
            _, disk, offset, data = self._changes[self._done]
            self._content[disk][offset : offset + len(data)] = data
            self._done += 1
        return [bytes(one) for one in self._content]


class SimulatedMount:
    """Two disks of a guest. The content that it sees is ``content``."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder, self._rng = folder, rng
        self.state = folder / "state"
        self.mountpoint = folder / "mnt"
        self._boots = 0
        self.paths = [folder / f"disk{n}" for n in range(2)]
        sizes = [CHUNK * rng.choice((5, 9, 16)) + 512, CHUNK * rng.choice((1, 2, 24))]
        self.content = [bytearray(size) for size in sizes]
        for disk, content in enumerate(self.content):
            if rng.random() < 0.8:
                start = rng.randrange(len(content))
                end = rng.randint(start, len(content))
                content[start:end] = rng.randbytes(end - start)
            self.paths[disk].write_bytes(content)
        self._unflushed = [SimulatedContent(bytes(content)) for content in self.content]
        self.histories: dict[str, History] = {}
        self.mounted = False

    def mount(self, *, distrust: bool = False) -> str | None:
        """Mount, as `fusedisk mount` does; what it says of the change map."""
        self._boots += 1
        fds = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in self.paths]
        images = [
            Image(path.name, path, fd, len(content))
            for path, fd, content in zip(self.paths, fds, self.content, strict=True)
        ]
        self._lock = lock_state(self.state)
        (self.state / "replicas").mkdir(exist_ok=True)
        with (
            mock.patch("fusedisk.preparing._boot_id", lambda: f"boot {self._boots}"),
            # Nobody else writes to the images, and their times are those of another clock.
            mock.patch("fusedisk.preparing._boot_time", lambda: 1 << 40),
        ):
            said = prepare(
                *(self.state, self.mountpoint, images, CHUNK), read_only=False, distrust=distrust
            )
        self.fds = fds
        self.record = read_mount_record(self.state)
        self.control = Control(self.state / "control", True)
        self.control.set_fence(read_fence(self.paths) is not None)
        self.maps = [ChangeMap(self.state / f"{n}.map", True) for n in range(len(fds))]
        self._spills = open_spills(str(self.state))
        activity = open_log(self.state, self.record)
        firsts = first_regions([len(content) for content in self.content])
        self._disks = [
            Disk(
                *(self.control, self.maps[n], fds[n]),
                index=n,
                spills=self._spills,
                activity=activity,
                first_region=firsts[n],
            )
            for n in range(len(fds))
        ]
        self._maps_at_mount = [self._map(n).read_bytes() for n in range(len(fds))]
        history = self.histories.get(self.record.generation)
        now = [bytes(content) for content in self.content]
        if history is None:
            self.histories[self.record.generation] = History(now)
        else:
            # What a power loss took back counts as written by the mount that follows.
            for disk, content in enumerate(now):
                history.write(self.control.epoch, disk, 0, content)
        self.mounted = True
        return said

    @property
    def writable(self) -> bool:
        """Whether a write that comes now would be let through."""
        return self.mounted and not self.control.gated and not self.control.fenced

    def write(self, disk: int, offset: int, data: bytes) -> bool:
        """A guest's write or, of zeros, discard; False while the gate is closed. Raises Fenced."""
        epoch = self.control.epoch
        try:
            if any(data):
                self._disks[disk].write(data, offset)
            else:
                self._disks[disk].zero(offset, len(data))
        except Gated:
            release_if_abandoned(self.state, self.control, self.paths)
            return False
        self.content[disk][offset : offset + len(data)] = data
        self._unflushed[disk].change(offset, data)
        self.histories[self.record.generation].write(epoch, disk, offset, data)
        return True

    def flush(self, disk: int) -> None:
        """A guest's flush."""
        self._unflushed[disk].sync()

    def tend(self) -> None:
        """What the server does now and then."""
        end_abandoned(str(self.state), self.control)

    def unmount(self) -> None:
        """End cleanly."""
        for content in self._unflushed:
            content.sync()
        record_clean(self.state, self.fds, self.control, self.maps)
        self._end()

    def meddle(self) -> None:
        """Somebody else writes to the images while they are not mounted."""
        for disk, content in enumerate(self.content):
            start = self._rng.randrange(len(content))
            end = self._rng.randint(start, len(content))
            content[start:end] = self._rng.randbytes(end - start)
            self.paths[disk].write_bytes(content)
            self._unflushed[disk] = SimulatedContent(bytes(content))

    def lose_power(self) -> None:
        """End in a power loss of the host. Call with every process on it dead."""
        for disk, path in enumerate(self.paths):
            left = self._unflushed[disk].crash(self._rng)
            self.content[disk][:] = left
            os.pwrite(self.fds[disk], left, 0)
            assert path.stat().st_size == len(left)
            self._unflushed[disk] = SimulatedContent(left)
        now = [self._map(n).read_bytes() for n in range(len(self.fds))]
        self._end()
        for disk, (old, new) in enumerate(zip(self._maps_at_mount, now, strict=True)):
            self._map(disk).write_bytes(self._torn(old, new))
        (self.state / "control").unlink()

    def _torn(self, old: bytes, new: bytes) -> bytes:
        style = self._rng.choice(("old", "new", "any"))
        if style != "any":
            return old if style == "old" else new
        pages = range(0, len(new), _PAGE)
        return b"".join(self._rng.choice((old, new))[at : at + _PAGE] for at in pages)

    def _map(self, disk: int) -> Path:
        return self.state / f"{disk}.map"

    def _end(self) -> None:
        self.mounted = False
        self._disks.clear()
        for fd in (*self.fds, *self._spills, self._lock):
            os.close(fd)


__all__ = ["CHUNK", "Fenced", "History", "SimulatedMount"]
