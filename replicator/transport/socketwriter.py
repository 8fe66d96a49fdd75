"""Writes to a socket, by the task or on a thread."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import trio

from replicator.transport.socketthread import SocketThread

# So often, at least, the caller hears how far it got.
_SECONDS_MAX = 0.5
# So long buffers are asked for before the caller hears of it.
_STREAM_SECONDS = 0.25
_BUFFERS_A_CALL_MAX = 256

More: TypeAlias = Callable[[float], Sequence[memoryview] | None]
"""What follows, and None for nothing within so many seconds; all that came before was taken."""


class SocketWriter:
    """Writes to a socket, one caller at a time."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._thread = SocketThread(sock)

    async def write(self, views: Sequence[memoryview]) -> int:
        """Write once if the socket takes anything, else wait until it may; the count of bytes.

        Raises OSError, or ClosedResourceError after `close`.
        """
        self._thread.require_open()
        with suppress(BlockingIOError):
            return os.writev(self._socket.fileno(), views[:_BUFFERS_A_CALL_MAX])
        await trio.lowlevel.wait_writable(self._socket)
        return 0

    async def write_on_thread(self, views: Sequence[memoryview]) -> int:
        """Write what the socket takes, for half a second at most; the count of bytes.

        Cancelled, it may have written any part, and nothing may be written any more. Raises
        OSError, or ClosedResourceError after `close`.
        """
        return await self._thread.run(lambda: self._write(views, time.monotonic() + _SECONDS_MAX))

    async def stream(self, left: Sequence[memoryview], more: More) -> tuple[int, list[memoryview]]:
        """Write on a thread what is left and what `more` gives; bytes written, and what is left.

        A quarter of a second long no end is made of it, after twice that in any case. Else as
        `write_on_thread`; what `more` raises is raised.
        """
        return await self._thread.run(lambda: self._stream(left, more))

    def _stream(self, views: Sequence[memoryview], more: More) -> tuple[int, list[memoryview]]:
        begun = time.monotonic()
        left = list(views)
        total = 0
        while True:
            if left:
                done = self._write(left, begun + _SECONDS_MAX)
                total += done
                left = after(left, done)
            seconds = begun + _STREAM_SECONDS - time.monotonic()
            if left or self._thread.interrupted or seconds <= 0:
                return total, left
            following = more(seconds)
            if following is None:
                return total, left
            left = list(following)

    def _write(self, views: Sequence[memoryview], until: float) -> int:
        fd, wake = self._thread.fd, self._thread.wake
        left = list(views)
        done = 0
        while True:
            taken = 0
            with suppress(BlockingIOError):
                taken = os.writev(fd, left[:_BUFFERS_A_CALL_MAX])
            done += taken
            left = after(left, taken)
            seconds = until - time.monotonic()
            if not left or seconds <= 0:
                return done
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.register(wake, select.POLLIN)
            if any(ready == wake for ready, _ in poller.poll(seconds * 1000)):
                return done

    def close(self) -> None:
        """End a write that is under way, and write no more."""
        self._thread.close()


def after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers after their first bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
