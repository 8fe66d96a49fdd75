"""A disk that loses, tears and reorders what was not synced, in place of `replicator.files.Files`.

The operations run on real files in a scratch directory, so that reading needs no stand-in, and are
noted here. `crash` then says what a power loss at this moment may leave. The fault model:

- a file's content: each sector of 512 bytes is as it was at the last sync of the file or after
  any write to it since then, each sector by itself; the size is any it had since then. A clone is
  a write of everything that it covers
- a directory: the creations, renames and removals since its last sync persist up to a random
  one, in order; each is atomic
- what was synced stays; syncing a file does not sync its name, nor the other way round

Blind spots: nothing is misdirected or goes bad by itself, and a sync does not fail.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from replicator.files import Buffer, Files

SECTOR = 512
Tree: TypeAlias = Mapping[str, "bytes | Tree"]


class Killed(BaseException):
    """The process ended here; nothing after this happens."""


class SimulatedContent:
    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.sizes = [len(content)]
        self.sectors: dict[int, list[bytes]] = {}

    def change(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        touched = range(offset // SECTOR, -(-end // SECTOR))
        for sector in touched:
            self.sectors.setdefault(sector, [self._sector(sector)])
        if end > len(self.content):
            self.resize(end)
        self.content[offset:end] = data
        for sector in touched:
            self.sectors[sector].append(self._sector(sector))

    def resize(self, size: int) -> None:
        del self.content[size:]
        self.content += bytes(size - len(self.content))
        self.sizes.append(size)

    def sync(self) -> None:
        self.sizes = [len(self.content)]
        self.sectors.clear()

    def crash(self, rng: random.Random) -> bytes:
        size = rng.choice(self.sizes)
        left = bytearray(self.content) + bytes(max(self.sizes))
        style = rng.choice(("any", "any", "old", "new"))
        for sector, versions in self.sectors.items():
            version = {"any": rng.choice(versions), "old": versions[0], "new": versions[-1]}[style]
            left[sector * SECTOR : (sector + 1) * SECTOR] = version
        return bytes(left[:size])

    def _sector(self, number: int) -> bytes:
        return bytes(self.content[number * SECTOR : (number + 1) * SECTOR]).ljust(SECTOR, b"\0")


class _Directory:
    def __init__(self, entries: dict[str, SimulatedContent | _Directory]) -> None:
        self.entries = entries
        self.durable = dict(entries)
        # Each is the names it sets, to nothing for a removal.
        self.pending: list[dict[str, SimulatedContent | _Directory | None]] = []

    def change(self, names: dict[str, SimulatedContent | _Directory | None]) -> None:
        _set(self.entries, names)
        self.pending.append(names)

    def sync(self) -> None:
        self.durable = dict(self.entries)
        self.pending.clear()

    def crash(self, rng: random.Random) -> Tree:
        left = dict(self.durable)
        for names in self.pending[: rng.randint(0, len(self.pending))]:
            _set(left, names)
        return {name: node.crash(rng) for name, node in sorted(left.items())}


def _set(
    entries: dict[str, SimulatedContent | _Directory],
    names: dict[str, SimulatedContent | _Directory | None],
) -> None:
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class SimulatedFiles(Files):
    """Operations below one directory. `before_each` runs before every operation."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.root = root
        self.trace: list[str] = []
        self.kill_at: int | None = None
        self.clones = False
        self.before_each: Callable[[], None] = lambda: None
        self._inodes: dict[int, SimulatedContent] = {}
        self._top = self._lay_out(root, tree)

    def crash(self, rng: random.Random) -> Tree:
        """Return what a power loss now leaves."""
        return self._top.crash(rng)

    def _lay_out(self, path: Path, tree: Tree) -> _Directory:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        entries: dict[str, SimulatedContent | _Directory] = {}
        for name, node in tree.items():
            if isinstance(node, bytes):
                (path / name).write_bytes(node)
                file = entries[name] = SimulatedContent(node)
                self._inodes[(path / name).stat().st_ino] = file
            else:
                entries[name] = self._lay_out(path / name, node)
        return _Directory(entries)

    def _step(self, what: str) -> None:
        if self.kill_at is not None and len(self.trace) >= self.kill_at:
            raise Killed
        self.before_each()
        self.trace.append(what)

    def _at(self, path: Path) -> _Directory:
        node = self._top
        for part in path.relative_to(self.root).parts:
            child = node.entries[part]
            assert isinstance(child, _Directory)
            node = child
        return node

    def _say(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _file(self, fd: int) -> SimulatedContent:
        return self._inodes[os.fstat(fd).st_ino]

    def create(self, path: Path) -> int:
        self._step(f"create {self._say(path)}")
        fd = super().create(path)
        file = self._inodes[os.fstat(fd).st_ino] = SimulatedContent(b"")
        self._at(path.parent).change({path.name: file})
        return fd

    def mkdir(self, path: Path) -> None:
        self._step(f"mkdir {self._say(path)}")
        super().mkdir(path)
        self._at(path.parent).change({path.name: _Directory({})})

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(buffers)
        self._step(f"write {os.fstat(fd).st_ino} {offset}+{len(data)}")
        self._file(fd).change(offset, data)
        return super().write(fd, buffers, offset)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._step(f"punch {os.fstat(fd).st_ino} {offset}+{length}")
        self._file(fd).change(offset, bytes(length))
        super().punch(fd, offset, length)

    def clone(self, source: int, fd: int) -> None:
        self._step(f"clone {os.fstat(source).st_ino} {os.fstat(fd).st_ino}")
        content = os.pread(source, os.fstat(source).st_size, 0)
        self._file(fd).change(0, content)
        super().write(fd, [content], 0)

    def clone_range(self, source: int, fd: int, offset: int, length: int) -> None:
        self._step(f"clone {os.fstat(source).st_ino} {os.fstat(fd).st_ino} {offset}+{length}")
        content = os.pread(source, length, offset)
        self._file(fd).change(offset, content)
        super().write(fd, [content], offset)

    def can_clone(self, directory: Path, fd: int) -> bool:
        return self.clones

    def reserve(self, fd: int, offset: int, length: int) -> None:
        pass

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """What was written and not synced may be left by a crash anyway."""

    def truncate(self, fd: int, size: int) -> None:
        self._step(f"truncate {os.fstat(fd).st_ino} {size}")
        self._file(fd).resize(size)
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self._step(f"sync {os.fstat(fd).st_ino}")
        self._file(fd).sync()

    def sync_directory(self, path: Path) -> None:
        self._step(f"sync_directory {self._say(path)}")
        self._at(path).sync()

    def rename(self, old: Path, new: Path) -> None:
        assert old.parent == new.parent
        self._step(f"rename {self._say(old)} {new.name}")
        super().rename(old, new)
        directory = self._at(old.parent)
        directory.change({old.name: None, new.name: directory.entries[old.name]})

    def unlink(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        self._step(f"unlink {self._say(path)}")
        super().unlink(path)
        self._at(path.parent).change({path.name: None})
