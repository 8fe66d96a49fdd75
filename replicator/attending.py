"""The child's side of `replicator.attendant`: requests come in until the sender is gone.

A sender that was stopped, or hangs, is as good as gone: where a duty has a limit, the sender beats.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from fusedisk.errors import FuseDiskError

log = logging.getLogger("replicator.attending")

SILENCE_SECONDS_MAX = 5.0
"""For a duty that the sender beats to (`replicator.guest`)."""
# A child that was itself stopped finds what was said meanwhile when it looks again.
_LOOK_AGAIN_SECONDS = 0.5

Note = Callable[[dict[str, Any]], None]


class Duty(Protocol):
    """What a child does."""

    @property
    def silence_seconds_max(self) -> float | None:
        """After so long without a word the sender counts as dead; None: never."""

    async def handle(self, request: dict[str, Any], note: Note) -> dict[str, Any]:
        """Do ``request["do"]``. Raises FuseDiskError. Cancelled by the next request."""

    async def abandoned(self) -> None:
        """The sender died: bring the guest to a state in which it can be left alone."""


def attend(duty: Duty) -> None:
    """Serve the sender that started this process, then end."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    # The library tells of every failure as well; we tell what it means.
    logging.getLogger("qemu").setLevel(logging.CRITICAL)
    # A service manager may tell all of a service to end at once, but the sender decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_attend(duty))


async def _attend(duty: Duty) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    task: asyncio.Task[None] | None = None
    while line := await _next_line(reader, duty.silence_seconds_max):
        request = json.loads(line)
        if request["do"] == "beat":
            continue
        if task is not None:
            task.cancel()
            # An error of the task has been reported; a cancelled one reports nothing.
            with suppress(asyncio.CancelledError):
                await task
        if request["do"] == "dismiss":
            return
        task = asyncio.create_task(_answer(duty, request))
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    log.warning("the sender is gone, or hangs")
    await duty.abandoned()


async def _next_line(reader: asyncio.StreamReader, seconds: float | None) -> bytes:
    """What the sender says next; empty where it is gone, or silent for too long."""
    for limit in (seconds, _LOOK_AGAIN_SECONDS):
        with suppress(TimeoutError):
            return await asyncio.wait_for(reader.readline(), limit)
    return b""


async def _answer(duty: Duty, request: dict[str, Any]) -> None:
    number = request["id"]
    try:
        done = await duty.handle(request, lambda note: _say({"id": number, "note": note}))
    except FuseDiskError as error:
        _say({"id": number, "error": str(error)})
    else:
        _say({"id": number, "done": done})


def _say(line: dict[str, Any]) -> None:
    # A sender that is gone is noticed by the end of the input.
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(line).encode() + b"\n")
