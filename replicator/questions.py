"""What a sender asks a receiver in a session, and the answers."""

import secrets
from collections import deque

import trio

from replicator import messages as m
from replicator.link import Link, say_last


class Questions:
    """A session's questions over one link; answers that come meanwhile wait for who asked."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._answers: deque[m.Hashes] = deque()

    async def ping(self) -> None:
        """Prove the round trip through the target's worker and disk. Raises LinkLost."""
        nonce = 1 + secrets.randbits(32)
        await self._link.send(m.Ping(nonce))
        while True:
            # No time limit of its own: much may be on its way before it over a slow link.
            event = await self._link.receive_soon()
            if isinstance(event, m.Hashes):
                self._answers.append(event)
            if isinstance(event, m.Pong) and event.nonce == nonce:
                return
            if isinstance(event, m.Failed | m.Bye):
                raise trio.TooSlowError("the receiver ended the session")

    async def hashes(self, disk: int, offset: int, length: int) -> list[m.Segment]:
        """What the target holds in a range, after all that was sent before.

        Raises Refused, LinkLost, TooSlowError or RemoteProtocolError.
        """
        await self.ask_hashes(disk, offset, length)
        return await self.take_hashes(disk, offset, length)

    async def ask_hashes(self, disk: int, offset: int, length: int) -> None:
        """The first half of `hashes`; a few may be under way, answered in the order asked."""
        await self._link.send(m.HashRequest(disk, offset, length))

    async def take_hashes(self, disk: int, offset: int, length: int) -> list[m.Segment]:
        """The second half of `hashes`, for the range asked for first."""
        if self._answers:
            answer = self._answers.popleft()
        else:
            answer = await self._link.expect(m.Hashes)
        if (answer.disk, answer.offset, answer.length) != (disk, offset, length):
            raise m.RemoteProtocolError("peer hashed another range")
        return answer.segments

    async def goodbye(self) -> None:
        """End the session in order."""
        await say_last(self._link, m.Bye())
