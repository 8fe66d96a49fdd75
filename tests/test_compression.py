"""Compression of what is sent: bounded when it is undone, and given up where it does not pay."""

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
import zstandard
from conftest import Mount
from test_replication import CHUNK, Pair, guest_write

from replicator.compression import Compressor
from replicator.messages import DATA_BYTES_MAX, Data, RemoteProtocolError, Zero

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


class Pipeline:
    """A reader that packs ahead of a link, by a clock of its own and without any I/O."""

    def __init__(self, ratio: int, pack: float, link: float, buffer: int = 0) -> None:
        """Rates are in MiB a second; the buffer takes so many at once."""
        self.compressor = Compressor("zstd")
        self.compressor._zstd = self  # type: ignore[assignment]
        self.small, self.pack_rate, self.link_rate = bytes(MIB // ratio), pack, link
        self.buffer, self.buffered, self.at = buffer, 0.0, 0.0

    def compress(self, data: memoryview) -> bytes:
        self.prepared += 1 / self.pack_rate
        return self.small

    def run(self, count: int) -> tuple[int, float]:
        """Send so many MiB in one go: (how many were packed, seconds)."""
        one, begun, packed = Data.of(0, 0, bytes(MIB)), self.at, 0
        self.compressor.begin()
        self.prepared = self.at
        ahead: deque[tuple[float, list[Data | Zero]]] = deque()
        for number in range(count // 4 + 2):
            if number < count // 4:
                batch: list[Data | Zero] = [self.compressor.pack(one) for _ in range(4)]
                ahead.append((self.prepared, batch))
            if number >= 2:
                ready, transfers = ahead.popleft()
                for_data = max(0.0, ready - self.at)
                self.pass_time(for_data)
                # The reader is two batches ahead of what is sent.
                self.prepared = max(self.prepared, self.at)
                wire = sum(len(t.data) for t in transfers if isinstance(t, Data)) / MIB
                self.buffered += wire
                for_link = max(0.0, self.buffered - self.buffer) / self.link_rate
                self.pass_time(for_link)
                packed += 4 * (wire < 4)
                self.compressor.waited(transfers, for_data, for_link)
        return packed, self.at - begun

    def pass_time(self, seconds: float) -> None:
        self.at += seconds
        self.buffered = max(0.0, self.buffered - seconds * self.link_rate)


def test_it_steps_back_where_the_processor_is_the_bottleneck() -> None:
    packed, seconds = Pipeline(ratio=3, pack=400, link=2048).run(4000)
    assert packed <= 800 and 4000 / seconds > 1200
    # The longer it goes on, the less is tried.
    packed, _ = Pipeline(ratio=3, pack=400, link=2048).run(50_000)
    assert packed <= 2500


@pytest.mark.parametrize("buffer", [0, 4])
@pytest.mark.parametrize(("ratio", "link"), [(3, 50), (10, 50), (2, 190), (4, 110)])
def test_nearly_all_is_packed_for_a_link_that_is_slower_than_packing(
    ratio: int, link: int, buffer: int
) -> None:
    packed, seconds = Pipeline(ratio, 400, link, buffer).run(20_000)
    assert packed >= 19_000
    assert 20_000 / seconds > 0.9 * min(400, ratio * link)


def test_it_follows_a_link_that_changes() -> None:
    pipeline = Pipeline(ratio=3, pack=400, link=2048)
    pipeline.run(50_000)
    pipeline.link_rate = 20
    assert pipeline.run(1000)[0] >= 950
    pipeline.link_rate = 2048
    pipeline.run(40_000)
    assert pipeline.run(40_000)[0] <= 8000


def test_what_is_sent_in_small_parts_is_packed() -> None:
    """Buffers take it at once, so that any link would look fast; but a slow one has to carry it."""
    pipeline = Pipeline(ratio=3, pack=400, link=10, buffer=8)
    for _ in range(500):
        assert pipeline.run(8)[0] == 8
        pipeline.pass_time(1)


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
