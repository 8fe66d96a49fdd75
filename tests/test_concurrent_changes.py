"""Writes, discards and zeroes of many threads at once, against a model, the image and the replica.

FUSEDISK_CHANGES is the number of changes of each thread (default 300).
"""

import ctypes
import mmap
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from verifying_load import cut_over, kill_server, replicated

CHANGES = int(os.environ.get("FUSEDISK_CHANGES", "300"))
SECTOR = 512
STRIPE = 40 * 1024 + SECTOR
STRIPES = 120
SIZE = STRIPE * STRIPES
THREADS = 6
# The last ones belong to nobody: whoever holds the lock of such a stripe may change it.
SHARED = range(90, STRIPES)
LONGEST = 3 * STRIPE
KEEP, PUNCH, ZERO = 1, 2, 16
libc = ctypes.CDLL(None, use_errno=True)


class Model:
    """What the disk has to hold, and who may change which stripe now."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.locks = [threading.Lock() for _ in range(STRIPES)]


class Changer(threading.Thread):
    """Changes ranges that lie within stripes it owns or has locked, and reads them back."""

    def __init__(self, disk: Path, model: Model, number: int) -> None:
        super().__init__(daemon=True)
        self.disk, self.model, self.number = disk, model, number
        self.random = random.Random(number)
        self.done = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.cached = os.open(self.disk, os.O_RDWR)
            self.direct = os.open(self.disk, os.O_RDWR | os.O_DIRECT)
            self.buffer = mmap.mmap(-1, -(-LONGEST // 4096) * 4096)
            try:
                while self.done < CHANGES:
                    self.step()
                    self.done += 1
            finally:
                os.close(self.cached)
                os.close(self.direct)
        except BaseException as error:
            self.failure = error

    def step(self) -> None:
        """Something in one stripe of ours, or in neighbours that are shared."""
        if self.random.random() < 0.5:
            stripe = self.random.randrange(self.number, SHARED.start, THREADS)
            self.change(stripe * STRIPE, (stripe + 1) * STRIPE)
            return
        first = self.random.choice(SHARED)
        stripes = range(first, min(first + self.random.randint(1, 3), STRIPES))
        # In ascending order, so that nobody waits for each other.
        for stripe in stripes:
            self.model.locks[stripe].acquire()
        try:
            self.change(stripes.start * STRIPE, stripes.stop * STRIPE)
        finally:
            for stripe in stripes:
                self.model.locks[stripe].release()

    def change(self, begin: int, end: int) -> None:
        """One change or look within [begin, end)."""
        sectors = range(begin, end, SECTOR)
        start = self.random.choice(sectors)
        length = self.random.randint(1, (end - start) // SECTOR) * SECTOR
        match self.random.randrange(8):
            case 0 | 1:
                data = self.random.randbytes(length)
                self.buffer[:length] = data
                with memoryview(self.buffer)[:length] as aligned:
                    assert os.pwritev(self.direct, [aligned], start) == length
            case 2:
                # To the byte, and with what the kernel splits into pages.
                start, length = start + 7, length - 7
                data = self.random.randbytes(length)
                assert os.pwrite(self.cached, data, start) == length
            case 3:
                data = self.zeroed(PUNCH | KEEP, start, length)
            case 4:
                data = self.zeroed(ZERO, start, length)
            case 5:
                data = self.zeroed(ZERO | KEEP, start + 3, length - 3)
                start += 3
            case 6:
                os.fsync(self.cached)
                return
            case _:
                with memoryview(self.buffer)[:length] as into:
                    assert os.preadv(self.direct, [into], start) == length
                expected = self.model.content[start : start + length]
                assert self.buffer[:length] == expected, f"read at {start}+{length}"
                return
        self.model.content[start : start + len(data)] = data

    def zeroed(self, mode: int, start: int, length: int) -> bytes:
        failed = libc.fallocate(self.cached, mode, ctypes.c_int64(start), ctypes.c_int64(length))
        assert failed == 0, os.strerror(ctypes.get_errno())
        return bytes(length)


@pytest.mark.soak
@pytest.mark.parametrize("kills", [0, 3])
def test_disk_image_and_replica_are_the_model(
    tmp_path: Path, fuse: Callable[..., Mount], kills: int
) -> None:
    mount = fuse(tmp_path / "disk.img")
    # Chunks that end amid the stripes of two threads.
    mount.mount("--create", str(SIZE), "--chunk-size", "16KiB")
    model = Model()
    changers = [Changer(mount.disk(), model, number) for number in range(THREADS)]

    def gone_on(due: int) -> bool:
        assert [c.failure for c in changers] == [None] * THREADS
        return sum(c.done for c in changers) >= due

    with replicated(mount, tmp_path) as replica:
        for changer in changers:
            changer.start()
        for number in range(kills):
            due = CHANGES * THREADS * (number + 1) // (kills + 2)
            wait_for(lambda due=due: gone_on(due), "the changers go on", 600)
            kill_server(mount)
        for changer in changers:
            changer.join(600)
        assert gone_on(CHANGES * THREADS)
        assert mount.disk().read_bytes() == model.content
        cut_over(mount)
    assert mount.images[0].read_bytes() == model.content
    assert (replica / "disk.img").read_bytes() == model.content
    assert mount.status()["server"]["restarts"] == kills
