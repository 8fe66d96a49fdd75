"""Where something is about to be done to the world of a simulated cutover, or was heard from it.

source     each file operation on the records beside the images, the syncs of the images, and each
           operation on gate, fence and lease
target     each file operation of the store
link       each message before it is sent, and after it was received
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from simulated_disk import SimulatedFiles
from simulated_mount import SimulatedMount

from fusedisk.changemap import Control
from replicator.link import Link

_GATING = ("take_lease", "close_gate", "keep_closed", "begin_promotion", "open_gate")
_PATCHED = {"replicator.gating": _GATING, "replicator.handover": ("take_lease", "open_gate")}


class Records:
    """What is durable of the records beside the images, as their folder's file system has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._durable: dict[str, int] = {}
        self._contents: dict[int, bytes] = {}

    def has(self, path: Path) -> bool:
        return path.parent == self.folder and ".fusedisk-fence" in path.name

    def _names(self) -> dict[str, int]:
        found = [path for path in self.folder.iterdir() if self.has(path)]
        return {path.name: path.stat().st_ino for path in found}

    def sync(self, fd: int) -> None:
        self._contents[os.fstat(fd).st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def sync_names(self) -> None:
        self._durable = self._names()

    def crash(self, *, names: bool) -> None:
        left = self._names() if names else self._durable
        contents = {name: self._contents.get(inode, b"") for name, inode in left.items()}
        for name in self._names():
            # Not by way of a Path, whose operations are a process's.
            os.unlink(self.folder / name)
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)
        self._durable = self._names()
        self._contents = {self._durable[name]: content for name, content in contents.items()}


@contextlib.contextmanager
def seamed(seam: Callable[[str], None], records: Records, mount: SimulatedMount) -> Iterator[None]:
    """Call ``seam`` with a description before every operation; what it raises ends that."""

    def before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            seam(name)
            return real(*arguments)

        return operation

    class SeamedControl(Control):
        def set_gate(self, closed: bool) -> None:
            seam(f"set_gate {closed}")
            super().set_gate(closed)

        def set_fence(self, up: bool) -> None:
            seam(f"set_fence {up}")
            super().set_fence(up)

    def on_records(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Path, *arguments: Any, **options: Any) -> Any:
            if records.has(path) and (name != "open" or "wb" in arguments):
                seam(f"{name} {path.name}")
            return real(path, *arguments, **options)

        return operation

    real_fsync, real_step = os.fsync, SimulatedFiles._step
    send, receive = Link.send, Link.receive

    def fsync(file: Any) -> None:
        fd = file if isinstance(file, int) else file.fileno()
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path == records.folder:
            seam("sync the folder")
            records.sync_names()
        elif records.has(path):
            seam(f"sync {path.name}")
            records.sync(fd)
        elif path in mount.paths:
            seam(f"sync {path.name}")
            mount.flush(mount.paths.index(path))
        else:
            real_fsync(fd)

    def step(files: SimulatedFiles, what: str) -> None:
        if files.kill_at is None:
            # Inodes are numbered otherwise in each run.
            seam(" ".join(word for word in what.split() if not word.isdigit()))
        real_step(files, what)

    async def sending(link: Link, *events: Any) -> None:
        if events:
            seam(f"send {type(events[0]).__name__}")
        await send(link, *events)

    async def receiving(link: Link) -> Any:
        event = await receive(link)
        seam(f"received {type(event).__name__}")
        return event

    with contextlib.ExitStack() as stack:
        for module, names in _PATCHED.items():
            for name in names:
                real = getattr(__import__(module, fromlist=[name]), name)
                stack.enter_context(mock.patch(f"{module}.{name}", before(name, real)))
        for name in ("open", "rename", "unlink"):
            wrapped = on_records(name, getattr(Path, name))
            stack.enter_context(mock.patch.object(Path, name, wrapped))
        stack.enter_context(mock.patch("replicator.source.Control", SeamedControl))
        stack.enter_context(mock.patch("os.fsync", fsync))
        stack.enter_context(mock.patch.object(SimulatedFiles, "_step", step))
        stack.enter_context(mock.patch.object(Link, "send", sending))
        stack.enter_context(mock.patch.object(Link, "receive", receiving))
        yield
