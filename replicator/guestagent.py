"""QEMU's guest agent: freezing and thawing the guest's file systems.

Lines of JSON, as its reference documents them. A connection may begin with what is left of an
earlier client's conversation, so it is synchronised first: the agent answers
``guest-sync-delimited`` with a byte 0xFF, which no other answer contains, and the number it got.
"""

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

from fusedisk.errors import FuseDiskError

_SYNC_SECONDS_MAX = 5.0
_FREEZE_SECONDS_MAX = 10.0
_ANSWER_BYTES_MAX = 1 << 16
_DELIMITER = b"\xff"


class AgentError(FuseDiskError):
    """The agent refused, or does not answer."""


class AgentGone(AgentError):
    """Nobody listens: the QEMU that served the channel has ended."""


class GuestAgent:
    """One connection to the socket of the agent's channel, which takes one client at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, path: Path) -> "GuestAgent":
        """Connect and synchronise. Raises AgentError."""
        try:
            async with asyncio.timeout(_SYNC_SECONDS_MAX):
                reader, writer = await asyncio.open_unix_connection(path, limit=_ANSWER_BYTES_MAX)
        except TimeoutError:
            raise AgentError(f"the guest agent's channel at {path} is busy") from None
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise AgentGone(f"cannot reach the guest agent at {path}: {error}") from None
        except OSError as error:
            raise AgentError(f"cannot reach the guest agent at {path}: {error}") from None
        agent = cls(reader, writer)
        try:
            await agent._synchronise()
        except BaseException:
            agent.close()
            raise
        return agent

    async def freeze(self) -> int:
        """How many file systems are frozen now. Raises AgentError; some may be frozen then."""
        return await self._count("guest-fsfreeze-freeze")

    async def thaw(self) -> int:
        """How many file systems were thawed. Raises AgentError."""
        return await self._count("guest-fsfreeze-thaw")

    def close(self) -> None:
        """End the connection."""
        self._writer.close()

    async def _synchronise(self) -> None:
        number = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}

        async def exchange() -> Any:
            # The delimiter also makes the agent's parser forget half a request.
            self._writer.write(_DELIMITER + json.dumps(request).encode() + b"\n")
            await self._writer.drain()
            while True:
                await self._reader.readuntil(_DELIMITER)
                if _decode(await self._reader.readline()).get("return") == number:
                    return

        await self._bounded(exchange(), _SYNC_SECONDS_MAX, "guest-sync-delimited")

    async def _count(self, command: str) -> int:
        async def exchange() -> dict[str, Any]:
            self._writer.write(json.dumps({"execute": command}).encode() + b"\n")
            await self._writer.drain()
            return _decode(await self._reader.readline())

        answer = await self._bounded(exchange(), _FREEZE_SECONDS_MAX, command)
        if not isinstance(answer.get("return"), int):
            error = answer.get("error")
            reason = error.get("desc") if isinstance(error, dict) else "it makes no sense"
            raise AgentError(f"the guest agent refused {command}: {reason}")
        return int(answer["return"])

    async def _bounded(self, exchange: Any, seconds: float, command: str) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await exchange
        except TimeoutError:
            raise AgentError(
                f"the guest agent did not answer {command} within {seconds:g} s; does it run?"
            ) from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise AgentError(f"the guest agent is gone ({error})") from None


def _decode(line: bytes) -> dict[str, Any]:
    if not line:
        raise EOFError("the connection ended")
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("it answers no object")
    return found
