"""Writes to a socket, by the task or on a thread.

A socket takes some megabytes in ten parts or so, and to wake a task for each of them takes longer
than to copy it. A thread that waits for the socket by itself is woken at a tenth of the price.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    import outcome

# So often, at least, the caller hears how far it got.
_SECONDS_MAX = 0.5
_BUFFERS_A_CALL_MAX = 256


class SocketWriter:
    """Writes to a socket, one caller at a time."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._fd = self._wake = -1
        self._writing = self._closed = False

    async def write(self, views: Sequence[memoryview]) -> int:
        """Write once if the socket takes anything, else wait until it may; the count of bytes.

        Raises OSError, or ClosedResourceError after `close`.
        """
        self._require_open()
        with suppress(BlockingIOError):
            return os.writev(self._socket.fileno(), views[:_BUFFERS_A_CALL_MAX])
        await trio.lowlevel.wait_writable(self._socket)
        return 0

    async def write_on_thread(self, views: Sequence[memoryview]) -> int:
        """Write what the socket takes, for half a second at most; the count of bytes.

        Cancelled, it may have written any part, and nothing may be written any more. Raises
        OSError, or ClosedResourceError after `close`.
        """
        self._require_open()
        if self._fd < 0:
            # Invariant: a thread writes to this very connection, whoever closes the socket
            # meanwhile, and whatever is opened under its number then.
            self._fd = os.dup(self._socket.fileno())
        if self._wake < 0:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._writing = True
        try:
            return await self._on_thread(views)
        finally:
            self._writing = False
            if self._closed:
                self._close_files()

    async def _on_thread(self, views: Sequence[memoryview]) -> int:
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        cancelled: list[trio.lowlevel.RaiseCancelT] = []

        def deliver(result: outcome.Outcome[int]) -> None:
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        def abort(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            # Invariant: the buffers are used again only once the thread is done with them, so it
            # is waited for; it ends at once.
            cancelled.append(raise_cancel)
            self._interrupt()
            return trio.lowlevel.Abort.FAILED

        trio.lowlevel.start_thread_soon(lambda: self._write(views), deliver)
        done: int = await trio.lowlevel.wait_task_rescheduled(abort)
        if cancelled:
            cancelled[0]()
        self._require_open()
        return done

    def _write(self, views: Sequence[memoryview]) -> int:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        poller.register(self._wake, select.POLLIN)
        until = time.monotonic() + _SECONDS_MAX
        left = list(views)
        done = 0
        while True:
            taken = 0
            with suppress(BlockingIOError):
                taken = os.writev(self._fd, left[:_BUFFERS_A_CALL_MAX])
            done += taken
            left = after(left, taken)
            seconds = until - time.monotonic()
            if not left or seconds <= 0:
                return done
            if any(fd == self._wake for fd, _ in poller.poll(seconds * 1000)):
                return done

    def close(self) -> None:
        """End a write that is under way, and write no more."""
        self._closed = True
        if self._writing:
            self._interrupt()
        else:
            self._close_files()

    def _interrupt(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _require_open(self) -> None:
        if self._closed or self._socket.fileno() < 0:
            raise trio.ClosedResourceError

    def _close_files(self) -> None:
        for fd in (self._fd, self._wake):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake = -1


def after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers after their first bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
