"""Compression of what is sent: bounded when it is undone, and given up where it does not pay."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
import zstandard
from conftest import Mount
from test_replication import CHUNK, Pair, guest_write

from replicator.compression import Compressor
from replicator.messages import DATA_BYTES_MAX, Data, RemoteProtocolError

MIB = 1 << 20


def text(length: int) -> bytes:
    return (b"the same words again and again, " * (length // 32 + 1))[:length]


def test_what_is_packed_comes_out_as_it_was() -> None:
    for length in (512, 70_001, DATA_BYTES_MAX):
        packed = Compressor("zstd").pack(Data.of(3, 4096, text(length)))
        assert (packed.disk, packed.offset, packed.length) == (3, 4096, length)
        assert len(packed.data) < length // 4
        assert bytes(packed.content()) == text(length)


def test_none_packs_nothing() -> None:
    data = Data.of(0, 0, text(MIB))
    assert Compressor("none").pack(data) is data


@pytest.mark.parametrize(
    "frame",
    [
        b"garbage",
        b"",
        zstandard.compress(text(5000))[:-3],
        zstandard.compress(text(5000)) + b"more",
        zstandard.compress(text(4999)),
        zstandard.compress(bytes(1 << 30)),
        zstandard.ZstdCompressor(write_content_size=False).compress(text(5000)),
    ],
    ids=["garbage", "nothing", "cut", "more", "shorter", "bomb", "unsaid"],
)
def test_a_frame_that_is_not_what_it_says_is_refused(frame: bytes) -> None:
    digest = xxhash.xxh3_128_digest(text(5000))
    with pytest.raises(RemoteProtocolError) as caught:
        Data(0, 0, digest, memoryview(frame), 5000).content()
    assert "\n" not in str(caught.value)


def test_another_content_is_refused() -> None:
    packed = zstandard.compress(text(5000).upper())
    digest = xxhash.xxh3_128_digest(text(5000))
    with pytest.raises(RemoteProtocolError, match="digest"):
        Data(0, 0, digest, memoryview(packed), 5000).content()


def tried(compressor: Compressor, content: bytes, count: int) -> int:
    """How many of so many megabytes were packed."""
    return sum(compressor.pack(Data.of(0, 0, content)).packed_from > 0 for _ in range(count))


def test_data_that_does_not_shrink_is_tried_less_and_less_and_not_never() -> None:
    compressor = Compressor("zstd")
    noise = random.Random(1).randbytes(MIB)
    assert tried(compressor, noise, 200) == 0
    # At most 64 MiB later it is tried again, and goes on for as long as it pays.
    assert tried(compressor, text(MIB), 100) >= 36


def test_it_steps_back_where_the_processor_is_the_bottleneck() -> None:
    compressor = Compressor("zstd")
    assert tried(compressor, text(MIB), 5) == 5
    compressor.waited(for_data=0.9, for_link=0.1)
    assert tried(compressor, text(MIB), 1) == 0
    assert tried(compressor, text(MIB), 5) == 5
    compressor.waited(for_data=0.1, for_link=0.9)
    assert tried(compressor, text(MIB), 5) == 5


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    yield made
    for process in made.processes:
        process.kill()


def test_a_compressed_replica_is_the_same_and_costs_less(pair: Pair) -> None:
    pair.receive()
    guest_write(pair.mount.disk(), text(20 * CHUNK), 12 * CHUNK)
    guest_write(pair.mount.disk(1), os.urandom(4 * CHUNK), 3 * CHUNK)
    sender = pair.start("--compress", "zstd", "--once")
    assert sender.wait() == 0, sender.said
    assert pair.identical()
    sent = pair.status()["sent"]
    assert sent["data_bytes"] - sent["bytes"] > 15 * CHUNK


def test_an_unknown_method_is_a_usage_error(pair: Pair) -> None:
    sender = pair.start("--compress", "lzma")
    assert sender.wait() == 2
    assert len(sender.said.splitlines()) == 1
