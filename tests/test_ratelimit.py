"""The token bucket against a clock of its own: no time passes here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.ratelimit import RATE_MIN, TokenBucket

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def send(bucket: TokenBucket, clock: Clock, seconds: float, frame: int) -> int:
    """Send frames for a while, as a sender does; return the bytes that went."""
    end, count = clock.now + seconds, 0
    while True:
        left = frame
        while left:
            while delay := bucket.delay():
                if clock.now + delay > end:
                    return count
                clock.now += delay
            piece = min(left, bucket.slice_bytes)
            bucket.spend(piece)
            count += piece
            left -= piece


@pytest.mark.parametrize("rate", [RATE_MIN, 100_000, MIB, 50 * MIB])
@pytest.mark.parametrize("frame", [4096, MIB])
def test_within_ten_percent_over_ten_seconds(rate: int, frame: int) -> None:
    clock = Clock()
    assert send(TokenBucket(rate, clock), clock, 10, frame) == pytest.approx(10 * rate, rel=0.1)


@given(
    rate=st.integers(RATE_MIN, MIB),
    pauses=st.lists(st.floats(0, 100), max_size=4),
)
def test_a_pause_saves_up_little(rate: int, pauses: list[float]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, clock)
    for pause in pauses:
        clock.now += pause
        assert send(bucket, clock, 1, 65536) <= 1.1 * rate + 2 * bucket.slice_bytes


def test_no_rate_is_no_limit() -> None:
    clock = Clock()
    bucket = TokenBucket(None, clock)
    bucket.spend(1 << 40)
    assert bucket.delay() == 0
    bucket.set_rate(MIB)
    assert bucket.delay() == 0


def test_a_change_counts_at_once() -> None:
    clock = Clock()
    bucket = TokenBucket(RATE_MIN, clock)
    bucket.spend(10 * MIB)
    slow = bucket.delay()
    bucket.set_rate(10 * MIB)
    assert slow > 2000
    assert bucket.delay() == pytest.approx(1, rel=0.01)
    bucket.set_rate(None)
    assert bucket.delay() == 0
