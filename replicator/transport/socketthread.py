"""Work on a socket by a thread, which ends when nobody waits for it any more.

To wake a task for each part of a stream takes longer than to copy it. A thread that waits for the
socket by itself is woken at a tenth of the price, and may do much before it comes back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    import outcome

Result = TypeVar("Result")


class SocketThread:
    """Runs one piece of work at a time on a thread, with a descriptor of its own for the socket."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self.fd = -1
        """The socket, for the thread; whoever else closes it."""
        self.wake = -1
        """Readable once the thread has to end."""
        self.interrupted = False
        """Whether the thread has to end."""
        self._working = self._closed = False

    def require_open(self) -> None:
        """Raises ClosedResourceError where the socket is closed, or this."""
        if self._closed or self._socket.fileno() < 0:
            raise trio.ClosedResourceError

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do it on a thread, and wait for its end in any case.

        Raises what it raises, or ClosedResourceError after `close`.
        """
        self.require_open()
        if self.fd < 0:
            # Invariant: a thread works on this very connection, whoever closes the socket
            # meanwhile, and whatever is opened under its number then.
            self.fd = os.dup(self._socket.fileno())
        if self.wake < 0:
            self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._working = True
        try:
            return await self._run(work)
        finally:
            self._working = False
            if self._closed:
                self._close_files()

    async def _run(self, work: Callable[[], Result]) -> Result:
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        cancelled: list[trio.lowlevel.RaiseCancelT] = []
        self.interrupted = False
        with suppress(BlockingIOError):
            os.eventfd_read(self.wake)

        def deliver(result: outcome.Outcome[Result]) -> None:
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        def abort(raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            # Invariant: the buffers are used again only once the thread is done with them, so it
            # is waited for; it ends after what it has in hand.
            cancelled.append(raise_cancel)
            self._interrupt()
            return trio.lowlevel.Abort.FAILED

        trio.lowlevel.start_thread_soon(work, deliver)
        result: Result = await trio.lowlevel.wait_task_rescheduled(abort)
        if cancelled:
            cancelled[0]()
        self.require_open()
        return result

    def close(self) -> None:
        """End work that is under way, and do no more."""
        self._closed = True
        if self._working:
            self._interrupt()
        else:
            self._close_files()

    def _interrupt(self) -> None:
        self.interrupted = True
        os.eventfd_write(self.wake, 1)

    def _close_files(self) -> None:
        for fd in (self.fd, self.wake):
            if fd >= 0:
                os.close(fd)
        self.fd = self.wake = -1
