"""A target that has no room for the rest of a pass keeps what it has of it, while that helps."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from proxy import Proxy
from test_clones import MakeFilesystem, filesystem
from test_cut_fill import UNDER_WAY
from test_cut_fill import reached as filled_up_to
from test_cut_pass import RATE, SIZE, left, reached
from test_replication import Pair, guest_write

from replicator.remainder import Room

__all__ = ["filesystem"]
MIB = 1 << 20


@pytest.fixture
def pair(filesystem: MakeFilesystem, tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    made.store = filesystem("ext4") / "store"
    made.store.mkdir()
    made.mount.unmount()
    made.images[0].write_bytes(random.Random(3).randbytes(SIZE))
    made.mount.mount()
    try:
        yield made
    finally:
        made.clean_up()


def take_room(pair: Pair, left: int) -> None:
    """Leave so many bytes on the target's filesystem."""
    with (pair.store.parent / "ballast").open("wb") as file:
        found = os.statvfs(pair.store)
        taken = found.f_bavail * found.f_frsize - left
        os.posix_fallocate(file.fileno(), 0, taken)


def scribble(pair: Pair, seed: int) -> None:
    noise = random.Random(seed)
    for offset in range(0, SIZE, 8 * MIB):
        guest_write(pair.mount.disk(), noise.randbytes(8 * MIB), offset)


def test_a_pass_goes_on_where_the_target_was_full(pair: Pair) -> None:
    pair.receive()
    pair.once()
    scribble(pair, 9)
    with Proxy(pair.address, rate=RATE) as proxy:
        pair.address = proxy.address
        sender = pair.start()
        wait_for(lambda: reached(pair) >= SIZE // 2, "a checkpoint is noted")
        take_room(pair, 0)
        wait_for(lambda: "no room for the rest of a pass" in (pair.status()["error"] or ""), "full")
        before = reached(pair)
        assert before >= SIZE // 2
        proxy.rate = None
        # Refused again, as often as it is tried, and it stays.
        wait_for(lambda: sender.said.count("target full") > 2, "it is tried again")
        assert reached(pair) >= before
        (pair.store.parent / "ballast").unlink()
        pair.wait_identical()
        assert left(sender)[-1] <= SIZE - before
        assert pair.status()["sent"]["data_bytes"] <= SIZE + 2 * UNDER_WAY
    assert "begun anew" not in sender.said
    pair.stop(sender)


def test_what_is_kept_is_given_up_where_only_that_makes_room(pair: Pair) -> None:
    pair.receive()
    pair.once()
    scribble(pair, 9)
    with Proxy(pair.address, rate=RATE) as proxy:
        pair.address = proxy.address
        sender = pair.start()
        wait_for(lambda: reached(pair) >= SIZE // 2, "a checkpoint is noted")
        proxy.down()
        # All of what is kept is overwritten: going on takes as much again as beginning anew.
        scribble(pair, 10)
        take_room(pair, SIZE - 8 * MIB)
        proxy.rate = None
        proxy.heal()
        pair.wait_identical()
    assert "are given up, and the pass is begun anew" in sender.said
    pair.stop(sender)


def test_a_fill_goes_on_where_the_target_was_full(pair: Pair) -> None:
    pair.receive()
    with Proxy(pair.address, rate=RATE) as proxy:
        pair.address = proxy.address
        sender = pair.start()
        wait_for(lambda: filled_up_to(pair) >= SIZE // 2, "a checkpoint is noted")
        take_room(pair, 0)
        wait_for(lambda: "target full" in (pair.status()["error"] or ""), "it is full")
        before = filled_up_to(pair)
        assert before >= SIZE // 2
        proxy.rate = None
        (pair.store.parent / "ballast").unlink()
        pair.wait_identical()
    assert "the first copy was cut off at byte" in sender.said
    pair.stop(sender)


@pytest.mark.parametrize(
    ("free", "kept", "rest", "whole", "anew"),
    [
        (10, 40, 20, 40, True),
        # There is room for the rest.
        (30, 40, 20, 40, False),
        # There would be none for the whole, or hardly.
        (10, 20, 20, 40, False),
        (4, 40, 20, 40, False),
        # Nothing is left, and what is kept is of a pass that shrank.
        (0, 40, 0, 1, True),
    ],
)
def test_what_is_kept_goes_only_where_a_pass_begun_anew_fits(
    free: int, kept: int, rest: int, whole: int, anew: bool
) -> None:
    room = Room(free * MIB, kept * MIB)
    assert room.is_only_anew(rest * MIB, whole * MIB) is anew
