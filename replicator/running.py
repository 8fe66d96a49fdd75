"""How a command runs its tasks: under trio, until a signal, with one error at the end."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from fusedisk.errors import FuseDiskError


async def until_signal(scope: trio.CancelScope) -> None:
    """Cancel ``scope`` on SIGINT or SIGTERM."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def run_trio(run: Callable[[], Awaitable[None]]) -> None:
    """Run to the end; the errors of tasks that failed together become one FuseDiskError."""
    try:
        trio.run(run)
    except* (FuseDiskError, OSError) as group:
        error = first_error(group)
        if isinstance(error, OSError):
            raise FuseDiskError(str(error)) from None
        raise error from None


@contextmanager
def one_error() -> Iterator[None]:
    """Around a nursery: one of its errors comes out, and no group.

    An `except*` would not do: where a task is cancelled while another one fails, what it raises is
    put into a group with the Cancelled, and so goes past whoever expects it.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_error(group)
        # Its cause says what kind of error it is, to whoever has to decide on it.
        raise error from error.__cause__


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error out of a nursery's group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        # Who is cancelled is so because of another's error, where there is one.
        errors = [e for e in error.exceptions if not isinstance(e, trio.Cancelled)]
        error = (errors or error.exceptions)[0]
    return error
