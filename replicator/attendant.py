"""A child process that talks to a guest for the sender, and outlives it by long enough to undo.

A guest that is paused or frozen must not stay so because the sender was killed. So the sender
never pauses a guest itself: a child does, in a session of its own, and learns of the sender's death
by the end of its standard input, or by missing the sender's beats. Should the child be killed, the
sender notices and starts another.

A line of JSON in is a request ``{"id", "do", ...}``; lines out carry the id of their request, notes
``{"id", "note"}`` first and one ``{"id", "done"}`` or ``{"id", "error"}`` at last. A new request
ends the one before it, which is not answered any more; a beat does not. ``replicator.attending`` is
the child's side.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from fusedisk.errors import FuseDiskError

_LINE_BYTES_MAX = 1 << 16
_END_SECONDS_MAX = 5.0

Note = Callable[[dict[str, Any]], None]


class AttendantDied(FuseDiskError):
    """The child is gone, so what it held is in nobody's hand."""


class Attendant:
    """One child, running ``python -m MODULE``; its errors and last deeds go to ``log``."""

    def __init__(self, module: str, log: Path) -> None:
        self._module, self._log = module, log
        self._process: trio.Process | None = None
        self._received = b""
        self._asked = 0
        self._sending = trio.Lock()

    async def start(self) -> None:
        """Start the child, or another one in place of a dead one."""
        self._received = b""
        with self._log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Ctrl-C on a terminal goes to a whole group, and is not for the child.
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid if self._process is not None else None

    async def ask(
        self, what: str, seconds: float, on_note: Note = lambda _: None, **arguments: Any
    ) -> dict[str, Any]:
        """The answer to one request.

        Raises FuseDiskError with what the child said, or after ``seconds``; AttendantDied.
        """
        self._asked += 1
        request = {"id": self._asked, "do": what, **arguments}
        try:
            with trio.fail_after(seconds):
                await self._send(request)
                while True:
                    line = await self._line()
                    if line.get("id") != self._asked:
                        continue
                    if "note" in line:
                        on_note(line["note"])
                    elif "error" in line:
                        raise FuseDiskError(str(line["error"]))
                    else:
                        return dict(line["done"])
        except trio.TooSlowError:
            raise FuseDiskError(f"no answer to {what!r} within {seconds:g} s") from None

    async def beat(self) -> None:
        """Say that the sender lives. Raises AttendantDied."""
        await self._send({"id": 0, "do": "beat"})

    async def dismiss(self) -> None:
        """End the child; it leaves everything as it is."""
        if self._process is None:
            return
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_END_SECONDS_MAX):
                with suppress(AttendantDied):
                    await self._send({"id": 0, "do": "dismiss"})
                await self._process.wait()
            # Invariant: it is not told by the end of its input, which means our death.
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self._close()

    async def _close(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        await trio.aclose_forcefully(self._process.stdin)
        await trio.aclose_forcefully(self._process.stdout)
        self._process = None

    async def _send(self, request: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise AttendantDied("the process that talks to the guest is not running")
        try:
            async with self._sending:
                await self._process.stdin.send_all(json.dumps(request).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise AttendantDied("the process that talks to the guest died") from None

    async def _line(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        while b"\n" not in self._received:
            if len(self._received) > _LINE_BYTES_MAX:
                raise AttendantDied("the process that talks to the guest makes no sense")
            more = await self._process.stdout.receive_some(_LINE_BYTES_MAX)
            if not more:
                raise AttendantDied("the process that talks to the guest died")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise AttendantDied("the process that talks to the guest makes no sense")
        return found
