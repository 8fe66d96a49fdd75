"""Takes from a socket, by the task or on a thread, and is woken for bulk data only once a good part
of it is there: to wake whoever takes it takes as long as to copy what a socket delivers at a time.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

from replicator.transport.socketthread import SocketThread

# Of a part of a frame that is at least so long, so much is waited for, but no longer than that.
_WAKE_BYTES_MIN, _WAKE_BYTES_MAX = 64 << 10, 512 << 10
_WAKE_SECONDS_MAX = 0.1
# What is there already is taken without a look at the other tasks, up to so much at a time.
_AT_ONCE_BYTES = 4 << 20

Result = TypeVar("Result")


class SocketReader:
    """Reads into one buffer and what is too much for it into another; one caller at a time."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._thread = SocketThread(sock)
        self._wake_bytes = 1
        self._at_once = 0

    async def receive(self, buffer: memoryview, ahead: memoryview) -> int:
        """Bytes taken, 0 at the end. Raises OSError, or ClosedResourceError after `close`."""
        if self._at_once > 0 and self._socket.fileno() >= 0:
            with suppress(BlockingIOError):
                return self._take(buffer, ahead)
        self._at_once = _AT_ONCE_BYTES
        self._wake_for(buffer)
        while True:
            # Invariant: what a slow peer sends is counted soon; else it would be taken for dead.
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError
            seconds = _WAKE_SECONDS_MAX if self._wake_bytes > 1 else math.inf
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(self._socket)
            with suppress(BlockingIOError):
                return self._take(buffer, ahead)
            self._wake_at(1)

    async def on_thread(self, work: Callable[[], Result]) -> Result:
        """Do work on a thread that may call `receive_now`, to its end in any case.

        Raises what it raises, or ClosedResourceError after `close`.
        """
        return await self._thread.run(work)

    @property
    def interrupted(self) -> bool:
        """Whether nobody waits any more for what a thread does."""
        return self._thread.interrupted

    def receive_now(self, buffer: memoryview, ahead: memoryview, until: float) -> int | None:
        """The same on a thread; None where nothing has come when it has waited.

        That is up to a time by the monotonic clock, or a part of it.
        """
        with suppress(BlockingIOError):
            return os.readv(self._thread.fd, [buffer, ahead])
        if (seconds := until - time.monotonic()) <= 0:
            return None
        self._wake_for(buffer)
        poller = select.poll()
        poller.register(self._thread.fd, select.POLLIN)
        poller.register(self._thread.wake, select.POLLIN)
        poller.poll(1000 * min(seconds, _WAKE_SECONDS_MAX))
        with suppress(BlockingIOError):
            return os.readv(self._thread.fd, [buffer, ahead])
        return None

    def _take(self, buffer: memoryview, ahead: memoryview) -> int:
        count = os.readv(self._socket.fileno(), [buffer, ahead])
        self._at_once -= count
        return count

    def _wake_for(self, buffer: memoryview) -> None:
        # Never more than is left of the frame, which is all that the peer owes us.
        self._wake_at(min(len(buffer), _WAKE_BYTES_MAX) if len(buffer) >= _WAKE_BYTES_MIN else 1)

    def _wake_at(self, count: int) -> None:
        if count != self._wake_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wake_bytes = count

    def close(self) -> None:
        """End what a thread waits for."""
        self._thread.close()
