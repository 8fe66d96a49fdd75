"""QEMU's monitor: one connection, with bounded waits and errors that say what to do."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from fusedisk.errors import FuseDiskError

_CONNECT_SECONDS_MAX = 5.0
_ANSWER_SECONDS_MAX = 30.0


class GuestError(FuseDiskError):
    """QEMU refused or does not answer."""


class Monitor:
    """A QMP connection to a Unix socket. QEMU serves one client on a socket at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._client = QMPClient("replicator")

    async def connect(self) -> None:
        """Raises GuestError, or FuseDiskError where no QEMU listens."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS_MAX):
                await self._client.connect(str(self._path))
        except TimeoutError:
            raise GuestError(
                f"QEMU does not answer at {self._path}; is another client connected there?"
            ) from None
        except (ConnectError, OSError) as error:
            cause = getattr(error, "exc", error)
            # Nobody listens there: QEMU has ended, and its guest with it.
            gone = isinstance(cause, ConnectionRefusedError | FileNotFoundError)
            kind = FuseDiskError if gone else GuestError
            raise kind(f"cannot reach QEMU at {self._path}: {cause}") from None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What QEMU answers. Raises GuestError; without an answer, QEMU may still carry it out."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS_MAX):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise GuestError(f"QEMU refused {command}: {error}") from None
        except TimeoutError:
            raise GuestError(
                f"QEMU did not answer {command} within {_ANSWER_SECONDS_MAX:g} s"
            ) from None
        except (QMPError, OSError, EOFError):
            raise GuestError(f"QEMU at {self._path} is gone") from None

    async def status(self) -> str:
        """The run state, e.g. ``running``."""
        return str((await self.execute("query-status"))["status"])

    async def close(self) -> None:
        """End the connection, in whatever state it is."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS_MAX):
                await self._client.disconnect()
        except (QMPError, OSError, EOFError, TimeoutError):
            return
