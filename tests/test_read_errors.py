"""A source that cannot be read everywhere: the rest goes on, but nothing is committed yet."""

import errno
import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from conftest import Mount
from test_replication import Pair

from replicator import batches
from replicator.address import parse_address
from replicator.compression import Compressor
from replicator.following import Follower
from replicator.reporting import report
from replicator.settings import SenderSettings
from replicator.source import Source
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings

BAD = 9 << 16


class BadSource(Source):
    """A source one of whose blocks of 64 KiB cannot be read until it is mended."""

    bad = True

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        if self.bad and disk == 0 and offset < BAD + 4096 and offset + len(buffer) > BAD:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().read(disk, buffer, offset)


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    try:
        yield made
    finally:
        made.clean_up()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def follow_a_bad_source(pair: Pair, source: BadSource) -> None:
    address = parse_address(pair.address)
    connect = functools.partial(connected, address, Settings())
    follower = Follower(source, "r", address, connect, SenderSettings(once=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        await until(lambda: follower.state == "waiting")
        entry = await report(follower)
        assert "cannot read 65536 bytes" in entry["error"] and f"byte {BAD}" in entry["error"]
        assert str(pair.images[0]) in entry["error"]
        assert entry["epoch"]["committed"] is None
        # What can be read is at the target, up to the end of the last disk.
        await until(lambda: pair.replica(1).read_bytes() == pair.images[1].read_bytes())
        want, found = pair.images[0].read_bytes(), pair.replica(0).read_bytes()
        assert found[:BAD] == want[:BAD] and found[BAD + 65536 :] == want[BAD + 65536 :]
        assert found[BAD : BAD + 65536] == bytes(65536)
        await trio.sleep(1)
        assert follower.committed is None and follower.state == "waiting"
        source.bad = False
    assert follower.committed is not None and follower.error is None


def test_an_epoch_is_committed_only_with_all_of_it(pair: Pair) -> None:
    pair.receive()
    source = BadSource(pair.mount.mountpoint)
    try:
        trio.run(follow_a_bad_source, pair, source)
        assert pair.identical()
    finally:
        source.close()


class Bytes:
    """A disk in memory, without holes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def data_extents(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        yield start, end - start

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


async def read_in_batches(source: Bytes, ranges: list[tuple[int, int]]) -> bytes:
    found = bytearray(len(source.content))
    reader = batches.BatchReader(source, Compressor("none"))
    position = 0
    async with reader.reading(0, ranges) as received:
        async for batch in received:
            for transfer in batch.transfers:
                assert transfer.offset == position
                data = getattr(transfer, "data", None)
                length = len(data) if data is not None else transfer.length
                found[position : position + length] = data if data is not None else bytes(length)
                position += length
            reader.give_back(batch)
    return bytes(found)


def test_batches_cover_a_range_in_order_and_once() -> None:
    noise = random.Random(3)
    content = bytearray(noise.randbytes(11 * (1 << 20) + 777))
    content[5000 : 3 << 20] = bytes((3 << 20) - 5000)
    source = Bytes(bytes(content))
    assert trio.run(read_in_batches, source, [(0, len(content))]) == content
