"""An image whose backing fails when a test says so: a FUSE mount of one file, another process's.

The faults stand in a file that the process looks at for every request, so a test switches them on
and off by writing it. A request that meets one fails with its errno, or, where that is 0, is held
until the fault is gone. FALLOCATE is served too, which pyfuse3 cannot: hence the bare protocol.
"""

import ctypes
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import unavailable, wait_for

from fusedisk import keeper

HEADER, REPLY = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
GETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 3, 14, 15, 16, 17, 18, 20
FLUSH, INIT, ACCESS, INTERRUPT, FALLOCATE, LSEEK = 25, 26, 34, 36, 43, 46
NAMES = {READ: "read", WRITE: "write", FSYNC: "fsync", FALLOCATE: "fallocate"}
MAX_WRITE = 1 << 20
THREADS = 6
# ASYNC_READ, BIG_WRITES, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES (kernel: include/uapi/linux/fuse.h).
FLAGS = 1 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22
libc = ctypes.CDLL(None, use_errno=True)


class FaultyImage:
    """The image as fusedisk is to mount it, and its faults."""

    def __init__(self, folder: Path, size: int, name: str = "disk.img") -> None:
        self.backing, self.path = folder / "backing", folder / name
        self._faults, self._seen = folder / "faults", folder / "seen"
        self.backing.touch()
        os.truncate(self.backing, size)
        self.path.touch()
        self._seen.touch()
        self.fail()

    def fail(self, *faults: tuple[str, int, int, int]) -> None:
        """From now on: (operation, first byte, end, errno), where errno 0 holds it."""
        scratch = self._faults.with_suffix(".new")
        scratch.write_text(json.dumps(faults))
        scratch.rename(self._faults)

    def seen(self, operation: str) -> list[tuple[int, int]]:
        """(offset, length) of the requests that have come so far."""
        lines = [line.split() for line in self._seen.read_text().splitlines()]
        return [(int(at), int(length)) for name, at, length in lines if name == operation]

    @contextmanager
    def served(self) -> Iterator["FaultyImage"]:
        """Mount it, and leave neither mount nor process behind."""
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            unavailable("/dev/fuse is missing or not ours to use")
        device = keeper.mount(str(self.path), ["fsname=faulty", "rw"])
        words = [__file__, str(device), str(self.backing), str(self._faults), str(self._seen)]
        process = subprocess.Popen([sys.executable, *words], pass_fds=[device])
        os.close(device)
        try:
            wait_for(lambda: self.path.stat().st_size, "the image is there")
            yield self
        finally:
            self.fail()
            failure = keeper.unmount(str(self.path)) and keeper.unmount(str(self.path), lazy=True)
            if failure:
                # Its end ends the connection, and then nothing is busy any more.
                process.kill()
                keeper.unmount(str(self.path), lazy=True)
            process.wait(60)


class _Server:
    """The other process: answers for the file, as far as no fault stands against it."""

    def __init__(self, device: int, backing: str, faults: str, seen: str) -> None:
        self._device, self._faults = device, Path(faults)
        self._file = os.open(backing, os.O_RDWR)
        self._seen = os.open(seen, os.O_WRONLY | os.O_APPEND)

    def run(self) -> None:
        threads = [threading.Thread(target=self._serve) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            try:
                packet = os.read(self._device, MAX_WRITE + 4096)
            except (InterruptedError, FileNotFoundError):
                continue
            except OSError:
                return
            _, opcode, unique, _, _, _, _, _ = HEADER.unpack_from(packet)
            if opcode == INTERRUPT:
                continue
            error, payload = 0, b""
            try:
                payload = self._answer(opcode, packet[HEADER.size :])
            except OSError as failed:
                error = failed.errno or 5
            with suppress(OSError):
                os.write(self._device, REPLY.pack(16 + len(payload), -error, unique) + payload)

    def _answer(self, opcode: int, body: bytes) -> bytes:
        if opcode == INIT:
            return struct.pack(
                "<IIIIHHIIHHI28x", 7, 31, MAX_WRITE, FLAGS, 64, 48, MAX_WRITE, 1, 256, 0, 0
            )
        if opcode == GETATTR:
            return struct.pack("<QII", 3600, 0, 0) + self._attributes()
        if opcode == OPEN:
            return struct.pack("<QII", 1, 0, 0)
        if opcode == STATFS:
            return struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if opcode in (RELEASE, FLUSH, ACCESS):
            return b""
        if opcode in NAMES:
            return self._data(opcode, body)
        if opcode == LSEEK:
            _, offset, whence = struct.unpack_from("<QQI", body)
            return struct.pack("<Q", os.lseek(self._file, offset, whence))
        raise OSError(38, "ENOSYS")

    def _attributes(self) -> bytes:
        found = os.fstat(self._file)
        times = int(found.st_atime), int(found.st_mtime), int(found.st_ctime), 0, 0, 0
        owner = os.getuid(), os.getgid()
        return struct.pack(
            "<QQQQQQIIIIIIIIII",
            1,
            found.st_size,
            found.st_blocks,
            *times[:3],
            *times[3:],
            found.st_mode,
            1,
            *owner,
            0,
            4096,
            0,
        )

    def _data(self, opcode: int, body: bytes) -> bytes:
        offset = length = 0
        if opcode in (READ, WRITE):
            _, offset, length = struct.unpack_from("<QQI", body)
        elif opcode == FALLOCATE:
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
        # Before a hold, so that a test can wait for what it holds.
        found = os.pread(self._file, length, offset) if opcode == READ else b""
        os.write(self._seen, f"{NAMES[opcode]} {offset} {length}\n".encode())
        self._meet_faults(NAMES[opcode], offset, length)
        if opcode == WRITE:
            return struct.pack("<II", os.pwrite(self._file, body[40 : 40 + length], offset), 0)
        if opcode == FSYNC:
            os.fsync(self._file)
        if opcode == FALLOCATE and libc.fallocate(
            self._file, mode, ctypes.c_int64(offset), ctypes.c_int64(length)
        ):
            raise OSError(ctypes.get_errno(), "fallocate")
        return found

    def _meet_faults(self, name: str, offset: int, length: int) -> None:
        while True:
            for operation, start, end, error in json.loads(self._faults.read_text()):
                if operation == name and offset < end and offset + max(length, 1) > start:
                    if error:
                        raise OSError(error, name)
                    break
            else:
                return
            time.sleep(0.005)


if __name__ == "__main__":
    _Server(int(sys.argv[1]), *sys.argv[2:]).run()
