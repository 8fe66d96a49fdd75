"""The memory of what was received and not yet written is bounded, however it is cut into frames."""

import random
from collections.abc import Iterable

import pytest
import trio

from replicator.eventqueue import QUEUED_BYTES_MAX, EventQueue
from replicator.frames import Reader, encode
from replicator.messages import DATA_BYTES_MAX, KIB, MIB, Data, Zero


def received(reader: Reader, transfer: Data) -> Data:
    """What comes out of the reader for a transfer's frame."""
    stream = memoryview(b"".join(encode(transfer)))
    while True:
        part = reader.vacant()
        part[:] = stream[: len(part)]
        stream = stream[len(part) :]
        if (event := reader.advance(len(part), lambda _: None)) is not None:
            assert isinstance(event, Data)
            return event


def held(transfers: Iterable[Data | Zero]) -> int:
    """Bytes of the buffers behind them."""
    buffers = {id(one.data.obj): one.data.obj for one in transfers if isinstance(one, Data)}
    return sum(len(buffer) for buffer in buffers.values())


@pytest.mark.trio
@pytest.mark.parametrize("size", [1, 4 * KIB, 64 * KIB, 64 * KIB + 1, 600 * KIB, DATA_BYTES_MAX])
async def test_what_waits_is_bounded_by_the_buffers_behind_it(size: int) -> None:
    reader, queue = Reader(), EventQueue()
    transfer = Data.of(0, 0, bytes(size))
    waiting: list[Data] = []
    with trio.move_on_after(0.01):
        while True:
            event = received(reader, transfer)
            await queue.put(event)
            waiting.append(event)
    assert len(waiting) * size >= QUEUED_BYTES_MAX / 2 or len(waiting) >= 500
    assert held(waiting) < QUEUED_BYTES_MAX + DATA_BYTES_MAX
    taken = await queue.take()
    # While it is written, as much again may be received.
    assert isinstance(taken, list) and taken and held(taken) <= QUEUED_BYTES_MAX / 2 + MIB


def test_buffers_are_used_again_and_those_kept_are_bounded() -> None:
    reader, rng = Reader(), random.Random(1)
    sizes = [64 * KIB, 100 * KIB, 300 * KIB, DATA_BYTES_MAX]
    for size in sizes:
        first = received(reader, Data.of(0, 0, bytes(size)))
        buffer = first.data.obj
        reader.recycle(first.data)
        assert received(reader, Data.of(0, 0, bytes(size))).data.obj is buffer
    for _ in range(20):
        sent = [Data.of(0, 0, rng.randbytes(rng.choice(sizes))) for _ in range(40)]
        came = [received(reader, one) for one in sent]
        assert [bytes(one.content()) for one in came] == [bytes(one.data) for one in sent]
        for one in came:
            reader.recycle(one.data)
        spare = sum(map(len, reader._spare))
        assert spare == reader._spare_bytes <= 16 * MIB
