"""Addresses of receivers: ``tcp://HOST:PORT`` and ``unix:///PATH``."""

import re
from dataclasses import dataclass

import trio

from fusedisk.errors import UsageError


@dataclass(frozen=True)
class TcpAddress:
    """A TCP endpoint; port 0 lets a listener choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """A Unix socket by absolute path."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Raises UsageError, naming what is accepted."""
    if match := re.fullmatch(
        r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]{1,253})):(\d{1,5})", text
    ):
        port = int(match[3])
        if port < 1 << 16:
            return TcpAddress(match[1] or match[2], port)
    if text.startswith("unix:///") and 1 < len(text.encode()) - 7 < 108 and "\0" not in text:
        return UnixAddress(text.removeprefix("unix://"))
    raise UsageError(f"{text!r} is not an address; write tcp://HOST:PORT or unix:///PATH")


async def connect(address: Address) -> trio.SocketStream:
    """Connect. Raises OSError."""
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    return await trio.open_tcp_stream(address.host, address.port)
