"""A restore over a receiver asks ahead: a link's delay is waited for once, not for each window."""

from collections import deque
from pathlib import Path

import pytest
import trio

from replicator import messages as m
from replicator.link import Link
from replicator.restoring import restore_from

WINDOW = 64 * m.MIB
SIZE = 3 * WINDOW


class Peer:
    """A receiver whose point is empty, and which answers one request when the next one is there."""

    def __init__(self, link: Link, ends: set[int]) -> None:
        """``ends``: after so many requests none comes until all are answered."""
        self._link, self._ends = link, ends
        self.asked: list[str] = []

    async def live(self) -> None:
        await self._link.expect(m.Hello)
        await self._link.send(m.Welcome(1))
        await self._link.expect(m.Restore)
        disks = [m.DiskInfo("d", SIZE, 65536)]
        await self._link.send(m.Restorable(1, "generation", 1, disks))
        waiting: deque[m.Event] = deque()
        while True:
            while len(waiting) < 2 and not (waiting and len(self.asked) in self._ends):
                event = await self._link.receive()
                if isinstance(event, m.Bye):
                    return
                waiting.append(event)
                self.asked.append(type(event).__name__)
            match waiting.popleft():
                case m.ReadRequest(disk, offset, length):
                    # In two parts, as a range with data in it would come.
                    await self._link.send(m.Zero(disk, offset, 512))
                    await self._link.send(m.Zero(disk, offset + 512, length - 512))
                case m.HashRequest(disk, offset, length):
                    segments = [m.Segment(offset, length, True, b"")]
                    await self._link.send(m.Hashes(disk, offset, length, segments))


async def restored(directory: Path, ends: set[int]) -> Peer:
    ours, theirs = (trio.SocketStream(one) for one in trio.socket.socketpair())
    peer, done = Peer(Link(theirs, "receiver"), ends), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.live)
            link = Link(ours, "sender")
            await restore_from(link, "r", None, directory, lambda _: None, advance)
    assert done == 2 * SIZE
    await ours.aclose()
    await theirs.aclose()
    return peer


@pytest.mark.trio
async def test_a_new_image_is_asked_for_ahead(tmp_path: Path) -> None:
    peer = await restored(tmp_path, {3, 6})
    assert peer.asked == 3 * ["ReadRequest"] + 3 * ["HashRequest"]
    assert (tmp_path / "d").stat().st_size == SIZE and not (tmp_path / "d").stat().st_blocks


@pytest.mark.trio
async def test_hashes_and_what_differs_are_asked_for_ahead(tmp_path: Path) -> None:
    with (tmp_path / "d").open("wb") as image:
        for start in range(0, SIZE, WINDOW):
            # Two blocks that differ, and one of zeros that does not.
            for at, content in ((0, b"x"), (3 << 20, b"\0"), (9 << 20, b"x")):
                image.seek(start + at)
                image.write(4096 * content)
        image.truncate(SIZE)
    peer = await restored(tmp_path, {9, 12})
    assert peer.asked[:3] == peer.asked[-3:] == 3 * ["HashRequest"]
    assert peer.asked[3:-3] == 6 * ["ReadRequest"]
    assert (tmp_path / "d").read_bytes() == bytes(SIZE)
