"""Keeping a recovery point while somebody reads it, in this process or another.

`STORE/.pins/NAME/NONCE` holds the point's id, and its reader holds a flock on it: when the reader
is gone, however it ended, the pin is worth nothing and the next one who looks removes it. Who
commits or thins looks before each step. A pin that comes a moment too late is noticed by its
reader, who finds that the manifest does not list the point any more.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path


class Pin:
    """A point that is not let go while this is open."""

    def __init__(self, store: Path, name: str, point: int) -> None:
        """Pin a point. Raises OSError."""
        folder = store / ".pins" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / secrets.token_hex(8)
        scratch = folder / f".{self._path.name}"
        self._fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.write(self._fd, str(point).encode())
        # Invariant: under its name a pin is locked and whole.
        scratch.rename(self._path)

    def close(self) -> None:
        """Let the point go."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)


def pinned_points(store: Path, name: str) -> frozenset[int]:
    """Ids of the points that are being read. Raises OSError."""
    found: set[int] = set()
    try:
        entries = list(os.scandir(store / ".pins" / name))
    except FileNotFoundError:
        return frozenset()
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
        except BlockingIOError:
            with suppress(ValueError):
                found.add(int(os.read(fd, 32)))
        finally:
            os.close(fd)
    return frozenset(found)
