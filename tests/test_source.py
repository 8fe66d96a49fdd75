"""What a sender learns of a mount: epochs that are closed for good, and ranges to the last byte."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from conftest import Mount

from fusedisk.changemap import Control
from fusedisk.errors import FuseDiskError
from replicator.source import Source

CHUNK = 65536
# Three chunks and a part that is no multiple of anything.
SIZE = 3 * CHUNK + 777


@pytest.fixture
def mount(tmp_path: Path, fuse: Callable[..., Mount]) -> Mount:
    image = tmp_path / "disk.img"
    image.write_bytes(b"d" * SIZE)
    made = fuse(image)
    made.mount()
    return made


@pytest.mark.trio
async def test_an_epoch_is_not_closed_while_a_writer_is_in_it(mount: Mount) -> None:
    source = Source(mount.mountpoint)
    # A slow write, as the data path announces it.
    writers = Control(mount.state / "control", True)
    slot, epoch = writers.announce()
    closed: list[int] = []

    async def close() -> None:
        closed.append(await source.close_epoch())

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with trio.fail_after(20):
                while source.control.epoch == epoch:
                    await trio.sleep(0.001)
                # Many looks at the announcements later it still waits.
                for _ in range(50):
                    await trio.sleep(0.001)
                    assert closed == []
                # A writer that came later does not hold it up.
                later, _ = writers.announce()
                writers.withdraw(slot)
                while not closed:
                    await trio.sleep(0.001)
            writers.withdraw(later)
        assert closed == [epoch]
    finally:
        source.close()
        writers.close()


@pytest.mark.trio
async def test_closing_an_epoch_ends_with_the_mount(mount: Mount) -> None:
    source = Source(mount.mountpoint)
    mount.unmount()
    try:
        with pytest.raises(FuseDiskError, match="mount is gone"):
            await source.close_epoch()
    finally:
        source.close()


def test_changed_ranges_end_with_the_disk(mount: Mount) -> None:
    source = Source(mount.mountpoint)
    try:
        assert list(source.changed_ranges(0, 0)) == []
        with mount.disk().open("r+b", buffering=0) as file:
            file.write(b"x")
            file.seek(SIZE - 1)
            file.write(b"x")
        assert list(source.changed_ranges(0, 0)) == [(0, CHUNK), (3 * CHUNK, SIZE)]
        assert source.changed_bytes(0) == [2 * CHUNK]
        with mount.disk().open("r+b", buffering=0) as file:
            file.seek(CHUNK + 1)
            file.write(b"x" * CHUNK)
        assert list(source.changed_ranges(0, 0)) == [(0, SIZE)]
        assert list(source.changed_ranges(0, 0, CHUNK, 2 * CHUNK)) == [(CHUNK, 2 * CHUNK)]
        assert source.changed_bytes(0) == [SIZE]
    finally:
        source.close()
