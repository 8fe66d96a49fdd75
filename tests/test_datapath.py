"""The data path fed by a test in the kernel's place: nothing that is asked may do harm."""

import errno
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import unavailable, wait_for
from faulty_image import FaultyImage

from fusedisk import activityfile
from fusedisk.activity import REGION, ActivityLog
from fusedisk.changemap import ChangeMap, Control
from fusedisk.datapath import DataPath
from fusedisk.disk import Disk
from fusedisk.relay import Relay

SIZE = (1 << 20) + 512
BEYOND = 1 << 20
CHUNK = 4096
READ, WRITE, FSYNC, INIT, INTERRUPT, IOCTL, FALLOCATE, LSEEK = 15, 16, 20, 26, 36, 39, 43, 46
HEADER = struct.Struct("<IIQQIIII")
GENERATION = "0d4c7a52-52d8-4b39-9f0e-3f5f3a3c1b7e"
REQUESTS = int(os.environ.get("FUSEDISK_REQUESTS", "4000"))
ODD = (
    0,
    1,
    511,
    512,
    4096,
    BEYOND - 1,
    SIZE - 1,
    SIZE,
    SIZE + 1,
    1 << 31,
    1 << 32,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
)


class Kernel:
    """The other end of the device: sends requests, and knows the replies."""

    def __init__(
        self,
        folder: Path,
        *,
        size: int = SIZE,
        direct: bool = False,
        activity: ActivityLog | None = None,
    ) -> None:
        self.image, self.size = folder / "image", size
        # The file goes on behind the disk, where nothing may ever be written.
        with self.image.open("wb") as file:
            file.truncate(size)
            file.seek(size)
            file.write(b"\xaa" * BEYOND)
        self.control = Control.create(folder / "control", 1)
        self.changes = ChangeMap.create(folder / "map", size, CHUNK)
        try:
            self.file = os.open(self.image, os.O_RDWR | (os.O_DIRECT if direct else 0))
        except OSError as error:
            unavailable(f"no direct I/O here: {error}")
        self.end, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device = device
        self.end.setblocking(False)
        self.replies: dict[int, tuple[int, bytes]] = {}
        self.sent = 0
        self.inits: list[bytes] = []
        self.check_lease: Callable[[], bool] = lambda: False
        disk = Disk(self.control, self.changes, self.file, activity=activity)
        self.relay = Relay(device.fileno(), self.inits.append)
        self.path = DataPath(
            self.relay,
            [disk],
            writeback=os.eventfd(0),
            check_lease=lambda: self.check_lease(),
            may_rest=0,
        )
        # In the place of pyfuse3: reads what is passed on, and never answers.
        path = self.path
        loops = [path.serve, path.serve, path.release_parked, path.work_off, path.work_off]
        self.threads = [threading.Thread(target=it, args=(n,)) for n, it in enumerate(loops)]
        self.threads.append(threading.Thread(target=self._discard))
        for thread in self.threads:
            thread.start()

    def _discard(self) -> None:
        while self.relay.session.recv(1 << 21):
            pass

    def send(self, opcode: int, inode: int, body: bytes, length: int | None = None) -> int:
        """Send a request; its number."""
        self.sent += 1
        # Another thread may send the next one before this returns.
        number = self.sent
        if length is None:
            length = HEADER.size + len(body)
        packet = HEADER.pack(length, opcode, number, inode, 0, 0, 0, 0) + body
        while True:
            self.receive()
            try:
                self.end.send(packet)
                return number
            except BlockingIOError:
                time.sleep(0.001)

    def receive(self) -> None:
        while True:
            try:
                reply = self.end.recv(1 << 21)
            except BlockingIOError:
                return
            length, error, unique = struct.unpack_from("<IiQ", reply)
            assert length == len(reply) and -512 < error <= 0
            assert 1 <= unique <= self.sent and unique not in self.replies
            assert error == 0 or length == 16
            self.replies[unique] = error, reply[16:]

    def ask(self, opcode: int, inode: int, body: bytes) -> tuple[int, bytes]:
        """The error and the payload of the reply."""
        number = self.send(opcode, inode, body)

        def answered() -> bool:
            self.receive()
            return number in self.replies

        wait_for(answered, "the request is answered")
        return self.replies[number]

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        return self.ask(READ, 2, struct.pack("<QQIIQII", 0, offset, length, 0, 0, 0, 0))

    def close(self) -> None:
        self.control.set_gate(False)
        while any(t.is_alive() for t in self.threads[:-1]):
            self.path.stop()
            time.sleep(0.005)
        self.relay.close()
        self.threads[-1].join()
        self.relay.session.close()
        self.end.close()
        self.device.close()
        os.close(self.file)


@pytest.fixture
def interruptible() -> Iterator[None]:
    # What takes a thread out of its wait for the device; the server has the same handler.
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def kernel(tmp_path: Path, interruptible: None) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def either_kernel(
    tmp_path: Path, interruptible: None, request: pytest.FixtureRequest
) -> Iterator[Kernel]:
    """With an image whose size whole blocks make up, if it is opened with O_DIRECT."""
    made = Kernel(tmp_path, size=BEYOND if request.param else SIZE, direct=request.param)
    yield made
    made.close()


def write_request(offset: int, data: bytes, size: int | None = None) -> bytes:
    length = len(data) if size is None else size
    return struct.pack("<QQIIQII", 0, offset, length, 0, 0, 0, 0) + data


def test_a_request_and_its_answer(kernel: Kernel) -> None:
    assert kernel.ask(WRITE, 2, write_request(5, b"hello")) == (0, struct.pack("<II", 5, 0))
    assert kernel.read(4, 7) == (0, b"\0hello\0")
    assert kernel.read(SIZE - 2, 100) == (0, bytes(2))
    assert kernel.read(SIZE, 100) == (0, b"")
    assert kernel.changes.last(0) == 1


@pytest.mark.parametrize("inode", [0, 1, 3, 66, 1 << 63, (1 << 64) - 1])
def test_an_inode_that_is_no_disk(kernel: Kernel, inode: int) -> None:
    for opcode, body in (
        (READ, write_request(0, b"", 10)),
        (WRITE, write_request(0, b"x")),
        (FSYNC, bytes(16)),
        (LSEEK, struct.pack("<QQII", 0, 0, 3, 0)),
        (FALLOCATE, struct.pack("<QQQII", 0, 0, 512, 3, 0)),
    ):
        assert kernel.ask(opcode, inode, body)[0] == -errno.EBADF


def test_sizes_that_are_not_what_came(kernel: Kernel) -> None:
    assert kernel.ask(WRITE, 2, write_request(0, b"xyz", 4))[0] == -errno.EINVAL
    assert kernel.ask(WRITE, 2, write_request(0, b"xyz", 2))[0] == -errno.EINVAL
    assert kernel.ask(WRITE, 2, write_request(0, b"")[:20])[0] == -errno.EINVAL
    assert kernel.read(0, (1 << 20) + 1)[0] == -errno.EINVAL
    assert kernel.read(0, (1 << 32) - 1)[0] == -errno.EINVAL
    assert kernel.ask(FSYNC, 2, b"")[0] == -errno.EINVAL
    assert kernel.ask(LSEEK, 2, b"")[0] == -errno.EINVAL
    assert kernel.ask(FALLOCATE, 2, b"")[0] == -errno.EINVAL
    assert kernel.image.read_bytes() == bytes(SIZE) + b"\xaa" * BEYOND


def test_any_request_is_answered_or_ignored(either_kernel: Kernel) -> None:
    kernel = either_kernel
    chance = random.Random(REQUESTS)
    natives = (READ, WRITE, FSYNC, LSEEK, FALLOCATE, IOCTL, INTERRUPT)
    for _ in range(REQUESTS):
        opcode = chance.choice(natives) if chance.random() < 0.9 else chance.getrandbits(32)
        number = lambda: chance.choice(ODD) if chance.random() < 0.8 else chance.getrandbits(64)  # noqa: E731
        small = chance.choice((number() & 0xFFFFFFFF, 3, 0x10, 0x11, 0x8010581E))
        body = struct.pack("<QQIIQII", number(), number(), small, small, number(), small, small)
        if opcode == FALLOCATE:
            mode = chance.choice((0, 1, 3, 8, 16, 17, 32, small))
            body = struct.pack("<QQQII", 0, number(), number(), mode, 0)
        elif opcode == WRITE and chance.random() < 0.7:
            data = chance.randbytes(chance.choice((0, 1, 512, 5000, 60000)))
            body = write_request(number(), data)
        if chance.random() < 0.2:
            body = body[: chance.randrange(len(body) + 1)]
        length = number() & 0xFFFFFFFF if chance.random() < 0.1 else None
        inode = 2 if chance.random() < 0.8 else number()
        if opcode != INIT:
            kernel.send(opcode, inode, body, length)
    # A barrier for each of the threads: both still serve.
    for _ in range(20):
        assert kernel.read(0, 512)[0] == 0
    content = kernel.image.read_bytes()
    assert len(content) == kernel.size + BEYOND
    assert content[kernel.size :] == b"\xaa" * BEYOND
    for chunk in range(0, kernel.size, CHUNK):
        assert not any(content[chunk : min(chunk + CHUNK, kernel.size)]) or kernel.changes.last(
            chunk // CHUNK
        )
    assert kernel.control.quiet(1)


def test_reads_go_on_behind_very_many_held_writes(kernel: Kernel) -> None:
    kernel.control.set_gate(True)
    held = [kernel.send(WRITE, 2, write_request(n % 256 * 4096, b"w" * 4096)) for n in range(1500)]
    for _ in range(50):
        assert kernel.read(0, 4096) == (0, bytes(4096))
    assert not kernel.replies.keys() & set(held)
    wait_for(lambda: kernel.path.parked_bytes >= 1500 * 4096, "all are parked")
    kernel.control.set_gate(False)

    def all_answered() -> bool:
        kernel.receive()
        return kernel.replies.keys() >= set(held)

    wait_for(all_answered, "the held writes are answered")
    assert all(kernel.replies[n][0] == 0 for n in held)
    assert kernel.path.parked_bytes == 0
    assert kernel.image.read_bytes()[: 1 << 20] == b"w" * (1 << 20)


def test_nobody_is_asked_while_nothing_is_held(kernel: Kernel) -> None:
    """A mount may stand by for days; each question reads a file."""
    asked: list[int] = []

    def standing_by() -> bool:
        asked.append(kernel.sent)
        return True

    kernel.check_lease = standing_by
    kernel.control.set_gate(True)
    for number in range(3):
        assert kernel.ask(WRITE, 2, write_request(0, b"early"))[0] == -errno.EROFS
        time.sleep(0.1)
        assert len(asked) == number + 1


def test_discards_are_held_as_writes_are(kernel: Kernel) -> None:
    """Short ones and such that another thread takes, in the order in which they came."""
    assert kernel.ask(WRITE, 2, write_request(0, b"d" * 60000))[0] == 0
    kernel.control.advance()
    kernel.control.set_gate(True)
    holes = [(0, 4096), (3 * CHUNK, 1 << 40)]
    held = [
        kernel.send(FALLOCATE, 2, struct.pack("<QQQII", 0, at, length, 3, 0))
        for at, length in holes
    ]
    wait_for(lambda: kernel.path.parked_bytes >= 2 * 72, "both are parked")
    for _ in range(20):
        assert kernel.read(0, 60000) == (0, b"d" * 60000)
    assert not kernel.replies.keys() & set(held)
    kernel.control.set_gate(False)

    def answered() -> bool:
        kernel.receive()
        return set(held) <= kernel.replies.keys()

    wait_for(answered, "the held discards are answered")
    assert [kernel.replies[number][0] for number in held] == [0, 0]
    assert kernel.read(0, 60000) == (0, bytes(4096) + b"d" * 2 * CHUNK + bytes(60000 - 3 * CHUNK))
    assert [kernel.changes.last(chunk) for chunk in range(4)] == [2, 1, 1, 2]


def test_reads_go_on_beside_first_writes_to_regions(tmp_path: Path, interruptible: None) -> None:
    """Each waits until its region is on record, on a disk that takes its time."""
    regions = 4
    record = FaultyImage(tmp_path, 8192)
    activityfile.create(record.backing, GENERATION, regions)
    with record.served():
        activity = ActivityLog(record.path, GENERATION)
        kernel = Kernel(tmp_path, size=regions * REGION, activity=activity)
        try:
            record.fail(("write", 0, 8192, 0))
            writes = [
                kernel.send(WRITE, 2, write_request(n * REGION, b"w")) for n in range(regions)
            ]
            for _ in range(20):
                assert kernel.read(0, 4096) == (0, bytes(4096))
            assert not kernel.replies.keys() & set(writes)
        finally:
            record.fail()

            def answered() -> bool:
                kernel.receive()
                return set(writes) <= kernel.replies.keys()

            wait_for(answered, "the writes are answered")
            kernel.close()
            activity.close()
    assert [kernel.replies[number][0] for number in writes] == [0] * regions


def test_a_refusal_is_for_what_came_before_the_question(kernel: Kernel) -> None:
    """A mount that stands by is promoted, and its guest writes, right after it was asked."""
    late: list[int] = []
    promoted = threading.Event()

    def standing_by() -> bool:
        if not late:
            held = kernel.path.parked_bytes
            late.append(kernel.send(WRITE, 2, write_request(CHUNK, b"promoted")))
            wait_for(lambda: kernel.path.parked_bytes > held, "the late write is held")
            return True
        promoted.set()
        kernel.control.set_gate(False)
        return False

    kernel.check_lease = standing_by
    kernel.control.set_gate(True)
    early = kernel.send(WRITE, 2, write_request(0, b"early"))
    assert promoted.wait(60)

    def answered() -> bool:
        kernel.receive()
        return {early, *late} <= kernel.replies.keys()

    wait_for(answered, "both are answered")
    assert kernel.replies[early][0] == -errno.EROFS
    assert kernel.replies[late[0]][0] == 0
    assert kernel.image.read_bytes()[CHUNK : CHUNK + 8] == b"promoted"
