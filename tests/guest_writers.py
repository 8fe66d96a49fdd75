"""Guests that write at random and remember what was acknowledged: the truth to compare with."""

import contextlib
import errno
import mmap
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
# Nine pages: writers take turns, so that most chunks are shared by two of them.
STRIPE_BYTES = 9 * PAGE
KINDS = ("fsync", "direct", "cached", "unaligned", "zero")


@dataclass(frozen=True)
class Write:
    disk: int
    offset: int
    data: bytes


class Writer(threading.Thread):
    """Writes to its own stripes of every disk until it is told to stop or is refused."""

    def __init__(self, disks: list[Path], contents: list[bytearray], who: range, seed: int) -> None:
        """``who``: the writer is number ``who.start`` of ``who.stop``."""
        super().__init__(daemon=True)
        self._contents, self._number, self._writers = contents, who.start, who.stop
        self._random = random.Random(seed)
        self._disks = disks
        self._fds: list[int] = []
        self._direct: list[int] = []
        self._buffer = mmap.mmap(-1, STRIPE_BYTES)
        self._stopping = threading.Event()
        self.pause_seconds = 0.002
        self.acknowledged = 0
        self.refused: int | None = None
        self.failure: BaseException | None = None
        self.uncertain: Write | None = None

    def stop(self) -> None:
        self._stopping.set()

    def said(self) -> str:
        """What became of it, for a message."""
        code = errno.errorcode.get(self.refused or 0, "no errno")
        where = self.uncertain and (self.uncertain.disk, self.uncertain.offset)
        return f"writer {self._number}: {code}, {self.failure!r}, writing at {where}"

    def run(self) -> None:
        """A write that fails may or may not have taken place: it is kept apart."""
        try:
            for disk in self._disks:
                self._fds.append(os.open(disk, os.O_RDWR))
                self._direct.append(os.open(disk, os.O_WRONLY | os.O_DIRECT))
            while not self._stopping.wait(self.pause_seconds):
                write, kind = self._choose()
                while write.data:
                    self.uncertain = write
                    done = self._do(write, kind)
                    # The kernel asks the server page by page, so part of it may be refused.
                    content, end = self._contents[write.disk], write.offset + done
                    content[write.offset : end] = write.data[:done]
                    write = Write(write.disk, end, write.data[done:])
                self.uncertain = None
                self.acknowledged += 1
        except OSError as error:
            self.refused = error.errno or errno.EIO
        except BaseException as error:
            self.failure = error
            raise
        finally:
            for fd in self._fds + self._direct:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._buffer.close()

    def _choose(self) -> tuple[Write, str]:
        """Somewhere within one of our stripes, the last one (which may be short) included."""
        pick = self._random
        disk = pick.randrange(len(self._disks))
        size = len(self._contents[disk])
        stripe = pick.randrange(self._number, -(-size // STRIPE_BYTES), self._writers)
        first = stripe * STRIPE_BYTES
        end = min(first + STRIPE_BYTES, size)
        kind = pick.choice(KINDS)
        start = pick.randrange(first, end)
        length = pick.randint(1, end - start)
        if kind in ("direct", "zero"):
            start -= start % PAGE
            length = max(length // PAGE * PAGE, PAGE)
            if start + length > end:
                # A direct write of part of a page is the server's to refuse, not ours to ask for.
                start, length, kind = first, end - first, "cached" if kind == "direct" else kind
        data = bytes(length) if kind == "zero" else pick.randbytes(length)
        return Write(disk, start, data), kind

    def _do(self, write: Write, kind: str) -> int:
        if kind == "direct":
            self._buffer[: len(write.data)] = write.data
            with memoryview(self._buffer)[: len(write.data)] as aligned:
                done = os.pwritev(self._direct[write.disk], [aligned], write.offset)
        else:
            done = os.pwrite(self._fds[write.disk], write.data, write.offset)
        if kind in ("fsync", "zero"):
            os.fsync(self._fds[write.disk])
        return done


def unexplained(found: bytes, disk: int, content: bytearray, writers: list[Writer]) -> list[int]:
    """Offsets of pages that hold what nobody was told they hold."""
    expected = bytearray(content)
    for writer in writers:
        write = writer.uncertain
        if write is not None and write.disk == disk:
            # Refused or cut off: each byte may be the old or the new one.
            for at, new in enumerate(write.data, write.offset):
                if found[at] == new:
                    expected[at] = new
    if found == expected:
        return []
    pages = range(0, max(len(found), len(expected)), PAGE)
    return [at for at in pages if found[at : at + PAGE] != expected[at : at + PAGE]]
