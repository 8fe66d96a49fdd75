"""The target's host: a receiver that can be killed, on a disk that loses what was not synced."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import trio
from session_checks import REPLICA
from simulated_disk import SimulatedFiles
from simulated_network import SimulatedNetwork, SimulatedStream
from simulated_process import Process, Threads

from replicator.files import Buffer
from replicator.manifest import read_manifest
from replicator.receiver import Receiver
from replicator.store import Store


class _TargetFiles(SimulatedFiles):
    """Also full at times, and with a process that is killed before some operation."""

    full = failing = False
    left: int | None = None
    """How many bytes there are left, where that matters."""

    def room(self, directory: Path) -> int:
        found = super().room(directory)
        return found if self.left is None else self.left

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(buffers)
        grows = max(0, offset + len(data) - max(offset, os.fstat(fd).st_size))
        if self.left is not None and grows > self.left:
            # What there was room for is written.
            super().write(fd, [data[: len(data) - grows + self.left]], offset)
            self.left = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._takes(grows)
        return super().write(fd, [data], offset)

    def truncate(self, fd: int, size: int) -> None:
        before = os.fstat(fd).st_size
        super().truncate(fd, size)
        self._takes(min(0, size - before))

    def unlink(self, path: Path) -> None:
        size = path.stat().st_size if path.exists() else 0
        super().unlink(path)
        self._takes(-size)

    def rename(self, old: Path, new: Path) -> None:
        size = new.stat().st_size if new.is_file() else 0
        super().rename(old, new)
        self._takes(-size)

    def _takes(self, size: int) -> None:
        if self.left is not None:
            self.left -= size

    def _step(self, what: str) -> None:
        if self.full and what.startswith(("write", "create")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.failing and what.startswith(("write", "sync")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super()._step(what)


class SimulatedTarget:
    """The host, with its store in ``root``."""

    def __init__(self, root: Path, rng: random.Random, network: SimulatedNetwork) -> None:
        self.root, self._rng, self._network = root, rng, network
        self.files = _TargetFiles(root, {})
        self.files.clones = rng.random() < 0.3
        self.threads = Threads(rng)
        self._power_lost = self._mended = False
        self._process: Process | None = None
        self._keep = rng.choice(("1", "3", "2,2x20s"))

    @property
    def full(self) -> bool:
        return self.files.full

    @full.setter
    def full(self, value: bool) -> None:
        self.files.full = value

    @property
    def left(self) -> int | None:
        return self.files.left

    @left.setter
    def left(self, value: int | None) -> None:
        self.files.left = value

    @property
    def failing(self) -> bool:
        return self.files.failing

    @failing.setter
    def failing(self, value: bool) -> None:
        self.files.failing = value

    async def live(self) -> None:
        """Run the receiver, and run it again whenever it was killed."""
        while True:
            process = Process("receiver", self.threads)
            process.at_kill.append(self._stop_disk)
            await process.run(self._serve)
            assert process.dead
            self._process = self._network.accept = None
            if self._power_lost:
                before = self.files
                self.files = _TargetFiles(self.root, before.crash(self._rng))
                self.files.full, self.files.failing = before.full, before.failing
                self.files.left, self.files.clones = before.left, before.clones
                self._power_lost = False
            self.files.kill_at = None
            await trio.sleep(0 if self._mended else self._rng.random() * 5)

    async def _serve(self) -> None:
        process = Process.current()
        store = Store(self.root, self.files, self._keep)
        receiver = Receiver(store)
        try:
            async with trio.open_nursery() as nursery:

                def accept(stream: SimulatedStream) -> None:
                    stream.belongs_to(process)
                    process.start(nursery, receiver.serve, stream)

                self._process, self._network.accept = process, accept
                await trio.sleep_forever()
        finally:
            for fd in store._locks.values():
                os.close(fd)

    def _stop_disk(self) -> None:
        self.files.kill_at = 0

    def kill(self, *, soon: bool) -> None:
        """SIGKILL, now or before one of the next operations on the disk."""
        if self._process is None:
            return
        if soon:
            self.files.kill_at = len(self.files.trace) + self._rng.randrange(40)
        else:
            self._process.kill()

    def lose_power(self, *, soon: bool) -> None:
        """The same, and what was not synced is lost or torn."""
        self._power_lost = True
        self.kill(soon=soon)

    def mend(self) -> None:
        """Nothing more happens to it."""
        self._mended = True
        self.threads.go_on()
        if self._process is not None:
            self.files.kill_at = None
            self._power_lost = False

    def images(self) -> list[bytes] | None:
        """The images where they are at rest."""
        manifest = read_manifest(self.root / REPLICA)
        if manifest is None or manifest.applying or manifest.journal is not None:
            return None
        return [(self.root / REPLICA / disk.name).read_bytes() for disk in manifest.disks]
