"""The store on the target: a directory of replicas, each for one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from fusedisk.errors import FuseDiskError
from fusedisk.extents import allocated_bytes
from replicator.files import Files
from replicator.manifest import PRIVATE_DIRECTORY, Manifest, State, read_manifest
from replicator.retention import parse_policy

_REPLICA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ReplicaInfo(NamedTuple):
    """A line of a listing. Size and allocated are bytes, summed over the disks.

    "damaged": the manifest is unusable or an image is missing; "unmanaged": no manifest.
    """

    name: str
    state: State | Literal["damaged", "unmanaged"]
    size: int
    allocated: int
    epoch: int | None
    generation: str | None
    applying: bool
    problem: str | None
    points: int = 0


def check_replica_name(name: str) -> None:
    """Check that `name` can name a replica; FuseDiskError if it cannot."""
    if _REPLICA_NAME.fullmatch(name) is None:
        raise FuseDiskError(
            f"replica name {name[:80]!r} is not usable; use 1 to 64 letters, digits, '.', '_' "
            "and '-', beginning with a letter or digit"
        )


def require_replica(directory: Path) -> Manifest:
    """The manifest of the replica in STORE/NAME, which may be in use; FuseDiskError if it is none.

    Nothing is made or locked.
    """
    check_replica_name(directory.name)
    manifest = read_manifest(directory)
    if manifest is None:
        raise FuseDiskError(
            f"{directory} is no replica; 'replicator list {directory.parent}' has them"
        )
    return manifest


class ReplicaBusy(FuseDiskError):
    """Another process works on the replica."""


class Store:
    """A store directory. Any number of processes may use it, each replica one at a time."""

    def __init__(self, path: Path, files: Files | None = None, keep: str | None = None) -> None:
        """Use the store in the existing directory `path`.

        `keep` is the retention policy of the replicas opened from now on; without it each keeps
        the one it has. Raises FuseDiskError if it is not a usable directory.
        """
        self.path = path
        self.files = files or Files()
        if keep is not None:
            parse_policy(keep)
        self.keep = keep
        self._locks: dict[str, int] = {}
        self._closed = False
        self._mutex = threading.Lock()
        _require_directory(path)
        try:
            (path / ".locks").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise FuseDiskError(f"cannot write to store {path}: {error.strerror}") from error

    def replica_path(self, name: str) -> Path:
        """Return the directory of replica `name`; FuseDiskError if that is no replica name."""
        check_replica_name(name)
        return self.path / name

    @contextmanager
    def claiming(self, name: str) -> Iterator[None]:
        """Claim replica `name` for one user, who calls `release`; undone if the block fails.

        Raises FuseDiskError if the replica is claimed already, or the store closed; ReplicaBusy if
        another process has it.
        """
        with self._mutex:
            if self._closed:
                raise FuseDiskError(f"store {self.path} is closed")
            if name in self._locks:
                raise FuseDiskError(
                    f"replica {name!r} is in use by another session; end that session first"
                )
            self._locks[name] = self._lock(name)
        try:
            yield
        except BaseException:
            self.release(name)
            raise

    def _lock(self, name: str) -> int:
        path = self.path / ".locks" / name
        try:
            # Not unlinked ever: a second process could then lock another file of that name.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise FuseDiskError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise ReplicaBusy(
                    f"replica {name!r} is in use by another process; end that one first"
                ) from None
            raise FuseDiskError(f"cannot lock {path}: {error.strerror}") from error
        return fd

    def prove(self, name: str) -> None:
        """Write and sync a few bytes beside the claimed replica `name`. Raises OSError."""
        fd = self._locks[name]
        try:
            os.pwrite(fd, b"%020d\n" % time.time_ns(), 0)
        except OSError as error:
            # A disk that says that it is full has answered.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        os.fsync(fd)

    def release(self, name: str) -> None:
        """Give up the claim on replica `name`."""
        with self._mutex:
            if (fd := self._locks.pop(name, -1)) >= 0:
                os.close(fd)

    def close(self) -> None:
        """End the use of the store. Repeating it is fine.

        Raises FuseDiskError while a replica is open: its writer must not outlive the lock.
        """
        with self._mutex:
            if self._locks:
                names = ", ".join(sorted(self._locks))
                raise FuseDiskError(f"store {self.path} has open replicas: {names}; close them")
            self._closed = True

    def __enter__(self) -> Store:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()


def list_replicas(store_path: Path) -> list[ReplicaInfo]:
    """List the replicas in a store by name, without its lock, so also while a receiver runs.

    Raises FuseDiskError if the store cannot be read; a bad replica is listed as "damaged".
    """
    _require_directory(store_path)
    try:
        directories = sorted(
            entry
            for entry in store_path.iterdir()
            if _REPLICA_NAME.fullmatch(entry.name) and entry.is_dir()
        )
    except OSError as error:
        raise FuseDiskError(f"cannot read store {store_path}: {error.strerror}") from error
    infos = (_describe(directory) for directory in directories)
    return [info for info in infos if info is not None]


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise FuseDiskError(f"store {path} is not a directory; create it or check the path")


def _describe(directory: Path) -> ReplicaInfo | None:
    name = directory.name
    try:
        manifest = read_manifest(directory)
    except FuseDiskError as error:
        size, allocated, _ = _measure_files(directory)
        return ReplicaInfo(name, "damaged", size, allocated, None, None, False, str(error))
    if manifest is None:
        size, allocated, count = _measure_files(directory)
        if not count:
            return None
        return ReplicaInfo(name, "unmanaged", size, allocated, None, None, False, None)
    size = sum(disk.size for disk in manifest.disks)
    state: State | Literal["damaged"] = manifest.state
    allocated = 0
    problem = None
    for disk in manifest.disks:
        try:
            measured, data = _measure(directory / disk.name)
        except OSError as error:
            state = "damaged"
            problem = f"image {directory / disk.name}: {error.strerror}"
            continue
        allocated += data
        # A promoted image belongs to its guest, who may well have resized it.
        if measured != disk.size and manifest.state != "promoted":
            state = "damaged"
            problem = f"image {directory / disk.name} has {measured} bytes, not {disk.size}"
    generation, epoch = manifest.committed
    return ReplicaInfo(
        name,
        state,
        size,
        allocated,
        epoch,
        generation,
        manifest.applying,
        problem,
        len(manifest.points),
    )


def _measure(path: Path) -> tuple[int, int]:
    """Return size and allocated bytes of one image."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        return status.st_size, allocated_bytes(fd, status.st_size)
    finally:
        os.close(fd)


def _measure_files(directory: Path) -> tuple[int, int, int]:
    """Return size, allocated bytes and number of the files that could be images."""
    size = allocated = count = 0
    try:
        entries = [e for e in directory.iterdir() if not e.name.startswith(PRIVATE_DIRECTORY)]
    except OSError:
        return 0, 0, 0
    for entry in entries:
        try:
            one_size, one_allocated = _measure(entry)
        except OSError:
            continue
        size, allocated, count = size + one_size, allocated + one_allocated, count + 1
    return size, allocated, count
