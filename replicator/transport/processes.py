"""A command's standard input and output as a stream, and its standard error in the log."""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from replicator.running import first_error
from replicator.transport.unsent import unsent_bytes

log = logging.getLogger("replicator.command")

_LINE_BYTES_MAX = 500
_ENDING_SECONDS_MAX = 5.0
_PIPE_BYTES = 1 << 20

Explain = Callable[[int, str, bool], Exception]
"""From exit status, last line on standard error, and whether anything was received, to an error."""


class ProcessStream(trio.abc.Stream):
    """The stream of a running command. Its end is an error that says what the command said."""

    def __init__(self, process: trio.Process, explain: Explain) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._explain = process, explain
        self._stdin, self._stdout = process.stdin, process.stdout
        self._received = False
        self._last_line = ""
        self._heard_all = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises what `Explain` makes of a command that has ended."""
        try:
            await self._stdin.send_all(data)
        except trio.BrokenResourceError:
            raise await self._ending() from None

    async def wait_send_all_might_not_block(self) -> None:
        """As a pipe does."""
        await self._stdin.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Raises what `Explain` makes of a command that has ended; never returns nothing."""
        data = await self._stdout.receive_some(max_bytes)
        if not data:
            raise await self._ending()
        self._received = True
        return bytes(data)

    def unsent_bytes(self) -> int:
        """What the command has not read."""
        return unsent_bytes(self._stdin)

    async def aclose(self) -> None:
        """Close the pipes; a command that reads its input then ends."""
        await self._stdin.aclose()
        await self._stdout.aclose()

    async def _ending(self) -> Exception:
        with trio.move_on_after(_ENDING_SECONDS_MAX):
            await self._heard_all.wait()
            await self._process.wait()
        code = self._process.returncode
        if code is None:
            return trio.BrokenResourceError("the command closed its output")
        return self._explain(code, self._last_line, self._received)

    async def listen_to_stderr(self, name: str) -> None:
        """Log each line, and keep the last, or the last that says why replicator ended."""
        assert self._process.stderr is not None
        rest = b""
        async for data in self._process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            # Invariant: what is kept of an endless line is bounded.
            rest = rest[:_LINE_BYTES_MAX]
            for line in lines:
                self._note(name, line)
        self._note(name, rest)
        self._heard_all.set()

    def _note(self, name: str, line: bytes) -> None:
        text = line[:_LINE_BYTES_MAX].decode(errors="replace").strip()
        text = "".join(c if c.isprintable() else "?" for c in text)
        if text:
            log.info("%s: %s", name, text)
            self._last_line = text.removeprefix("replicator: ")


@asynccontextmanager
async def running(
    command: Sequence[str], name: str, explain: Explain, *, own_session: bool
) -> AsyncIterator[ProcessStream]:
    """Run a command as long as the block lasts. Raises OSError where it cannot be started.

    With ``own_session`` it has no terminal to ask on, and no Ctrl-C meant for us ends it.
    """
    process = await trio.lowlevel.open_process(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=own_session,
    )
    stream = ProcessStream(process, explain)
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[union-attr]
    try:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.listen_to_stderr, name)
                yield stream
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The only other task raises nothing of its own: this is the error of the block.
            raise first_error(group) from None
    finally:
        with trio.CancelScope(shield=True):
            await _end(process, stream, group=own_session)


async def _end(process: trio.Process, stream: ProcessStream, *, group: bool) -> None:
    await trio.aclose_forcefully(stream)
    # A command that reads its input has the time to end in order.
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None and group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        elif number is not None:
            process.send_signal(number)
        with trio.move_on_after(1):
            await process.wait()
            return
    await process.wait()
