"""Captures: one instant of all disks, while many threads go on writing in a known order."""

import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.capture import Capture, NoCapture, end_abandoned, open_spills
from fusedisk.changemap import ChangeMap, Control
from fusedisk.disk import Disk

CHUNK = 4096
CHUNKS = 24
# Sectors that are written in order; the last one of each chunk is left to others.
PLACES = [(disk, slot) for disk in range(2) for slot in range(CHUNKS * 8) if slot % 8 != 7]


class Disks:
    """Two disks under one control file, as the disk server has them."""

    def __init__(self, folder: Path, tail: int = 100) -> None:
        self.folder = folder
        self.size = CHUNKS * CHUNK + tail
        self.control = Control.create(folder / "control", 1)
        self.spills = open_spills(str(folder))
        self.maps, self.disks, self.fds = [], [], []
        for index in range(2):
            path = folder / f"image{index}"
            path.write_bytes(bytes(self.size))
            self.fds.append(os.open(path, os.O_RDWR))
            self.maps.append(ChangeMap.create(folder / f"{index}.map", self.size, CHUNK))
            self.disks.append(
                Disk(self.control, self.maps[-1], self.fds[-1], index=index, spills=self.spills)
            )

    def capture(self, since: int, limit: int = 1 << 20) -> Capture:
        capture = Capture(str(self.folder), self.control, limit, CHUNK)
        capture.open(since)
        while not capture.closed():
            pass
        return capture

    def read(self, capture: Capture) -> list[dict[int, bytes]]:
        """The captured chunks of each disk, in the order a sender reads them."""
        found: list[dict[int, bytes]] = []
        for index, (changes, fd) in enumerate(zip(self.maps, self.fds, strict=True)):
            chunks: dict[int, bytes] = {}
            for first, count in self.runs(capture, index):
                end = min((first + count) * CHUNK, self.size)
                data = bytearray(end - first * CHUNK)
                # In pieces that are no multiples of chunks, as transfers may be.
                for at in range(0, len(data), 3000):
                    piece = memoryview(data)[at : at + 3000]
                    capture.fill(changes, index, fd, piece, first * CHUNK + at)
                for start in range(0, len(data), CHUNK):
                    chunks[first + start // CHUNK] = bytes(data[start : start + CHUNK])
            found.append(chunks)
        return found

    def runs(self, capture: Capture, index: int) -> Iterator[tuple[int, int]]:
        """A few at a time, while those before are read and all are overwritten."""
        chunk = 0
        while chunk <= CHUNKS:
            found, chunk = capture.runs(self.maps[index], index, chunk, CHUNKS + 1, most=3)
            yield from found

    def close(self) -> None:
        for fd in self.fds + self.spills:
            os.close(fd)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    made = Disks(tmp_path)
    yield made
    made.close()


def test_what_was_overwritten_is_read_as_it_was(disks: Disks) -> None:
    disk = disks.disks[0]
    disk.write(b"a" * CHUNK, 0)
    disk.write(b"b" * 100, CHUNKS * CHUNK)
    disk.write(b"c" * 10, 5 * CHUNK + 3)
    capture = disks.capture(0)
    disk.write(b"X" * 2 * CHUNK, 0)  # chunk 1 was never written before
    disk.write(b"Y" * 100, CHUNKS * CHUNK)
    disk.zero(5 * CHUNK, CHUNK)
    disk.write(b"Z", 7 * CHUNK)
    (first, second) = disks.read(capture)
    assert first == {
        0: b"a" * CHUNK,
        5: b"\0" * 3 + b"c" * 10 + bytes(CHUNK - 13),
        CHUNKS: b"b" * 100,
    }
    assert second == {}
    assert capture.intact
    assert capture.spilled_bytes == 3 * (4096 + CHUNK)
    capture.close()
    assert (disks.folder / "spill.0").stat().st_size == 0
    # The next one has what came in between, and nothing else.
    later = disks.capture(capture.epoch)
    assert sorted(disks.read(later)[0]) == [0, 1, 5, 7, CHUNKS]


def test_a_chunk_of_zeros_takes_no_data(disks: Disks) -> None:
    disks.disks[1].write(bytes(CHUNK), 3 * CHUNK)
    capture = disks.capture(0)
    disks.disks[1].write(b"x", 3 * CHUNK)
    assert disks.read(capture) == [{}, {3: bytes(CHUNK)}]
    assert (disks.folder / "spill.0").stat().st_blocks * 512 <= 4096


def test_no_copy_is_made_of_what_was_read(disks: Disks) -> None:
    for chunk in range(4):
        disks.disks[0].write(b"d", chunk * CHUNK)
    capture = disks.capture(0)
    assert capture.runs(disks.maps[0], 0, 0, 3) == ([(0, 3)], 3)
    assert capture.runs(disks.maps[0], 0, 0, CHUNKS + 1) == ([(0, 4)], CHUNKS + 1)
    capture.fill(disks.maps[0], 0, disks.fds[0], bytearray(3 * CHUNK + 1), 0)
    for chunk in range(4):
        disks.disks[0].write(b"e", chunk * CHUNK)
    assert capture.spilled_bytes == 4096 + CHUNK


def test_a_full_spill_gives_the_capture_up_and_the_guest_goes_on(disks: Disks) -> None:
    for chunk in range(4):
        disks.disks[0].write(b"d", chunk * CHUNK)
    capture = disks.capture(0, limit=2 * (4096 + CHUNK))
    for chunk in range(2):
        disks.disks[0].write(b"e", chunk * CHUNK)
    assert capture.intact
    disks.disks[0].write(b"e", 2 * CHUNK)
    assert not capture.intact
    assert capture.spilled_bytes == capture.spill_bytes_max


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system")
def test_a_spill_leaves_the_guest_as_much_room_as_it_takes(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", tmp_path], check=True)
    try:
        disks = Disks(tmp_path)
        for chunk in range(8):
            disks.disks[0].write(b"d", chunk * CHUNK)
        capture = disks.capture(0, limit=1 << 30)
        found = os.statvfs(tmp_path)
        room = found.f_bavail * found.f_frsize
        # So that of a record of 8 KiB there is room for two, with 64 MiB and as much to spare.
        with (tmp_path / "other").open("wb") as other:
            other.write(bytes(room - (64 << 20) - 2 * (4096 + CHUNK) * 2))
        copied = 0
        for chunk in range(8):
            disks.disks[0].write(b"e", chunk * CHUNK)
            copied += capture.intact
        assert copied == 2
        capture.close()
        disks.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_captures_of_several_replicas_keep_to_themselves(disks: Disks) -> None:
    disk = disks.disks[0]
    disk.write(b"1", 0)
    one = disks.capture(0)
    disk.write(b"2", 0)
    two = disks.capture(0)
    three = disks.capture(one.epoch)
    disk.write(b"3", 0)
    for capture, content in ((one, b"1"), (two, b"2"), (three, b"2")):
        assert disks.read(capture)[0][0][:1] == content
        assert capture.intact
    one.close()
    four = disks.capture(0)
    disk.write(b"4", 0)
    assert disks.read(four)[0][0][:1] == b"3"
    assert disks.read(two)[0][0][:1] == b"2"


def test_there_is_an_end_to_captures(disks: Disks) -> None:
    opened = [disks.capture(0) for _ in range(8)]
    with pytest.raises(NoCapture):
        disks.capture(0)
    opened[3].close()
    disks.capture(0)


def test_a_dead_readers_capture_is_ended(disks: Disks) -> None:
    disks.disks[0].write(b"d", 0)
    capture = disks.capture(0)
    end_abandoned(str(disks.folder), disks.control)
    assert capture.intact
    pid = os.fork()
    if pid == 0:
        kept = Capture(str(disks.folder), disks.control, 1 << 20, CHUNK)
        kept.open(0)
        os.kill(os.getpid(), 9 if kept.intact else 15)
    os.waitpid(pid, 0)
    disks.disks[0].write(b"e", 0)
    assert (disks.folder / "spill.1").stat().st_size > 0
    end_abandoned(str(disks.folder), disks.control)
    assert (disks.folder / "spill.1").stat().st_size == 0
    assert capture.intact
    disks.disks[0].write(b"f", 0)
    assert (disks.folder / "spill.1").stat().st_size == 0


def test_a_copy_that_was_cut_short_does_not_hide_the_next_one(disks: Disks) -> None:
    """A server killed within a copy has not marked the chunk, so the next one copies it again."""
    disks.disks[0].write(b"captured" * 512, 0)
    capture = disks.capture(0)
    disks.disks[0].write(b"later", 0)
    room = 4096 + CHUNK
    with (disks.folder / "spill.0").open("r+b") as spill:
        whole = spill.read(room)
        spill.seek(room)
        spill.write(whole)
        # What the kernel may have let through of the first: its head, and none of its data.
        spill.seek(4096)
        spill.write(bytes(CHUNK))
    records = 1024 + 4 * 8
    with (disks.folder / "control").open("r+b") as control:
        control.seek(records)
        control.write(struct.pack("<Q", 2))
    assert disks.read(capture)[0][0] == b"captured" * 512
    assert capture.intact


def test_no_spill_file_no_capture(disks: Disks) -> None:
    disks.disks[0].write(b"d", 0)
    capture = disks.capture(0)
    lost = Disk(disks.control, disks.maps[0], disks.fds[0])
    lost.write(b"e", 0)
    assert not capture.intact


@pytest.mark.parametrize("seed", range(4))
def test_every_capture_is_a_prefix_of_the_order_of_writes(disks: Disks, seed: int) -> None:
    """Each write begins after the one before it was acknowledged, on whichever disk and thread.

    A capture therefore has to be the state after some number of them: for every slot the newest
    write of its own that is not beyond that number.
    """
    order = random.Random(seed)
    turn = threading.Lock()
    history: list[tuple[int, int]] = []
    stop = threading.Event()

    def write_in_order() -> None:
        while not stop.is_set():
            with turn:
                disk, slot = order.choice(PLACES)
                number = len(history) + 1
                history.append((disk, slot))
                disks.disks[disk].write(struct.pack("<Q", number), slot * 512)

    def write_beside() -> None:
        # Concurrent writers of the same chunks: the last sector of each is theirs, in no order.
        beside = random.Random(seed + 1)
        while not stop.is_set():
            chunk = beside.randrange(1, CHUNKS + 1)
            disks.disks[beside.randrange(2)].write(b"b" * 512, chunk * CHUNK - 512)

    threads = [threading.Thread(target=write_in_order) for _ in range(3)]
    threads += [threading.Thread(target=write_beside) for _ in range(2)]
    for thread in threads:
        thread.start()
    replica = [bytearray(disks.size), bytearray(disks.size)]
    since, held = 0, 0
    expected = dict.fromkeys(PLACES, 0)
    try:
        for _ in range(60):
            capture = disks.capture(since)
            # Some writes come after the instant: they must not show.
            later = len(history) + 10
            while len(history) < later:
                time.sleep(0)
            for index, chunks in enumerate(disks.read(capture)):
                for chunk, data in chunks.items():
                    replica[index][chunk * CHUNK : chunk * CHUNK + len(data)] = data
            assert capture.intact
            held += capture.spilled_bytes
            since = capture.epoch
            capture.close()
            check_prefix(replica, history, expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert held > 0, "nothing was overwritten during a capture: the test tests nothing"


def check_prefix(
    replica: list[bytearray], history: list[tuple[int, int]], expected: dict[tuple[int, int], int]
) -> None:
    """Bring ``expected`` on to the newest number in the replica, and compare."""
    seen = {
        (disk, slot): struct.unpack_from("<Q", replica[disk], slot * 512)[0]
        for disk, slot in PLACES
    }
    for number in range(max(expected.values()) + 1, max(seen.values()) + 1):
        expected[history[number - 1]] = number
    assert seen == expected
