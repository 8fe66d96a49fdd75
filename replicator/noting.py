"""The note on a replica beside its mount.

Status shows it while no sender runs, and the next sender begins with it.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import ReplicaRecord, read_record, write_record

log = logging.getLogger("replicator.sender")


def read_note(state: Path, name: str) -> ReplicaRecord | None:
    """The note of the sender before this one; None where there is none, or a damaged one."""
    try:
        return read_record(state, name)
    except FuseDiskError as damage:
        log.warning("%s; it is written anew", damage)
        return None


class Note:
    """Written by one task, after whatever changed; several changes may be one writing."""

    def __init__(self, state: Path, content: Callable[[], ReplicaRecord]) -> None:
        """``content`` is what is to be written as of now."""
        self._state, self._content = state, content
        self._due = trio.Event()

    def changed(self) -> None:
        """Let the task write."""
        self._due.set()

    async def keep(self) -> None:
        """Write after each change until cancelled."""
        while True:
            await self._due.wait()
            self._due = trio.Event()
            await self.write()

    async def write(self) -> None:
        """Write now."""
        try:
            await trio.to_thread.run_sync(write_record, self._state, self._content())
        except OSError as error:
            # Only status misses it: the target's own record decides where to go on.
            log.warning("cannot note the state of the replica: %s", error)
