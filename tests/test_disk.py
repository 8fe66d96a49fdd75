"""A disk's own operations: marks before data, holes that cost nothing, ends that are kept."""

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import wait_for
from faulty_image import FaultyImage

from fusedisk.changemap import ChangeMap, Control, Fenced, Gated
from fusedisk.disk import Disk

CHUNK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Disk, ChangeMap, Path]]:
    """Sixteen chunks and half a block, all of it a hole."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 * CHUNK + 100)
    control = Control.create(tmp_path / "control", 3)
    changes = ChangeMap.create(tmp_path / "map", 16 * CHUNK + 100, CHUNK)
    with image.open("r+b") as file:
        yield Disk(control, changes, file.fileno()), changes, image


def test_gate_and_fence_stop_writers_before_they_change_anything(tmp_path: Path):
    control = Control.create(tmp_path / "control", 1)
    changes = ChangeMap.create(tmp_path / "map", CHUNK, CHUNK)
    image = tmp_path / "image"
    image.write_bytes(bytes(CHUNK))
    with image.open("r+b") as file:
        disk = Disk(control, changes, file.fileno())
        control.set_gate(True)
        with pytest.raises(Gated):
            disk.write(b"x", 0)
        with pytest.raises(Gated):
            disk.zero(0, CHUNK)
        control.set_fence(True)
        with pytest.raises(Fenced):
            disk.write(b"x", 0)
        control.set_fence(False)
        control.set_gate(False)
        assert changes.count(0) == 0
        assert image.read_bytes() == bytes(CHUNK)
        disk.write(b"x", 5)
    assert changes.last(0) == 1
    assert image.read_bytes()[:6] == b"\0" * 5 + b"x"
    assert control.quiet(1)


def test_closing_an_epoch_sees_all_writes_of_many_threads(tmp_path: Path):
    chunks = 256
    control = Control.create(tmp_path / "control", 1)
    changes = ChangeMap.create(tmp_path / "map", chunks * CHUNK, CHUNK)
    (tmp_path / "image").write_bytes(bytes(chunks * CHUNK))
    stop = threading.Event()

    def write(worker: int) -> None:
        with (tmp_path / "image").open("r+b") as file:
            disk = Disk(control, changes, file.fileno())
            for n in itertools.count():
                if stop.is_set():
                    return
                chunk = worker + 4 * (n % (chunks // 4))
                disk.write(b"w", chunk * CHUNK)

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            closed = control.advance()
            while not control.quiet(closed):
                pass
            # A closed epoch gains no mark: what has one now has it for good, or a newer one.
            marks = [changes.last(c) for c in range(chunks)]
            later = [changes.last(c) for c in range(chunks)]
            for before, after in zip(marks, later, strict=True):
                assert after == before or after > closed
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def marked(changes: ChangeMap) -> list[int]:
    return [c for c in range(changes.chunks) if changes.last(c)]


def test_a_large_write_at_an_odd_place_arrives_whole(tmp_path: Path):
    size = 1 << 20
    image = tmp_path / "image"
    image.write_bytes(b"o" * size)
    data = os.urandom(300_001)
    control = Control.create(tmp_path / "control", 1)
    changes = ChangeMap.create(tmp_path / "map", size, CHUNK)
    with image.open("r+b") as file:
        assert Disk(control, changes, file.fileno()).write(data, 12_345) == len(data)
    end = 12_345 + len(data)
    assert image.read_bytes() == b"o" * 12_345 + data + b"o" * (size - end)


def test_zeroing_a_hole_marks_nothing(disk: tuple[Disk, ChangeMap, Path]):
    it, changes, image = disk
    it.zero(0, 1 << 60)
    assert marked(changes) == []
    assert image.stat().st_blocks == 0


def test_zeroing_marks_and_frees_what_held_data(disk: tuple[Disk, ChangeMap, Path]):
    it, changes, image = disk
    fd = os.open(image, os.O_RDWR)
    for chunk in (2, 3, 9, 16):
        os.pwrite(fd, b"d" * 100, chunk * CHUNK)
    os.close(fd)
    it.zero(CHUNK + 1, 9 * CHUNK)
    # Up to a hundred and one bytes into chunk 10: 2, 3 and 9 held data, 16 is beyond the range.
    assert marked(changes) == [2, 3, 9]
    it.zero(16 * CHUNK + 50, 1 << 40)
    assert marked(changes) == [2, 3, 9, 16]
    content = image.read_bytes()
    assert len(content) == 16 * CHUNK + 100
    assert content == bytes(16 * CHUNK) + b"d" * 50 + bytes(50)


def test_a_discard_is_announced_in_pieces(tmp_path: Path):
    """In the middle of one an epoch closes and the gate holds what is left."""
    piece, size = 64 << 20, 130 << 20
    image = FaultyImage(tmp_path, size)
    for offset in range(0, size, piece):
        with image.backing.open("r+b") as file:
            os.pwrite(file.fileno(), bytes(min(piece, size - offset)), offset)
    control = Control.create(tmp_path / "control", 1)
    changes = ChangeMap.create(tmp_path / "map", size, 1 << 20)
    with image.served(), image.path.open("r+b") as file, ThreadPoolExecutor(1) as pool:
        disk = Disk(control, changes, file.fileno())
        image.fail(("fallocate", piece, size, 0))
        zeroing = pool.submit(disk.zero, 0, size)
        try:
            wait_for(lambda: len(image.seen("fallocate")) == 2, "its second piece is in work")
            assert control.advance() == 1
            assert not control.quiet(1)
            control.set_gate(True)
        finally:
            image.fail()
        with pytest.raises(Gated):
            zeroing.result(20)
        assert control.quiet(1)
        assert image.seen("fallocate") == [(0, piece), (piece, piece)]
        control.set_gate(False)
        disk.zero(0, size)
        assert image.seen("fallocate")[2:] == [(2 * piece, size - 2 * piece)]
    assert [changes.last(chunk) for chunk in (0, 127, 128, 129)] == [1, 1, 2, 2]


def test_a_write_ends_at_the_end_of_the_disk(disk: tuple[Disk, ChangeMap, Path]):
    it, changes, image = disk
    assert it.write(b"e" * 200, 16 * CHUNK + 50) == 50
    assert image.stat().st_size == 16 * CHUNK + 100
    with pytest.raises(OSError, match="No space"):
        it.write(b"x", 16 * CHUNK + 100)
    assert marked(changes) == [16]


def test_an_error_of_the_image_is_the_writers_error_and_leaves_the_mark(
    tmp_path: Path,
) -> None:
    control = Control.create(tmp_path / "control", 1)
    changes = ChangeMap.create(tmp_path / "map", CHUNK, CHUNK)
    (tmp_path / "image").write_bytes(bytes(CHUNK))
    with (tmp_path / "image").open("rb") as unwritable:
        it = Disk(control, changes, unwritable.fileno())
        with pytest.raises(OSError, match="Bad file"):
            it.write(b"x", 0)
    # Marked although nothing was written: too many marks are harmless, one too few is not.
    assert changes.last(0) == 1
    assert control.quiet(1)
