"""Addresses of receivers: what they may look like. `replicator.transport` is how to reach them.

Invariant: nothing in an address can be taken for an option of ssh, hide a line in a log, or end a
string early; so an address may come from a file, a control socket or a peer's record.
"""

import ipaddress
import re
from dataclasses import dataclass

from fusedisk.errors import UsageError

_UNIX_PATH_BYTES_MAX = 107
_TEXT_BYTES_MAX = 4096

_HOST = r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,32})?)\]|" + (
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]{0,252}))"
)
_TCP = re.compile(rf"(?P<kind>tcp|tls)://{_HOST}:(?P<port>[0-9]{{1,5}})")
_SSH = re.compile(
    rf"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._+-]{{0,63}})@)?{_HOST}(?::(?P<port>[0-9]{{1,5}}))?"
    r"(?P<store>/.+)"
)
_FD = re.compile(r"fd:(?P<number>[0-9]{1,6})")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class TcpAddress:
    """A TCP endpoint; port 0 lets a listener choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True)
class TlsAddress:
    """A TCP endpoint that speaks TLS; the sender checks the certificate against the host."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tls://{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    """A Unix socket by absolute path."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True)
class SshAddress:
    """A store on a host that ssh reaches; ``user`` and ``port`` are ssh's own choice where None."""

    host: str
    store: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user is not None else ""
        port = f":{self.port}" if self.port is not None else ""
        return f"ssh://{user}{_bracketed(self.host)}{port}{self.store}"


@dataclass(frozen=True)
class ExecAddress:
    """A command for the shell, whose standard input and output are the stream."""

    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"


@dataclass(frozen=True)
class FdAddress:
    """An inherited descriptor: a stream socket. For a receiver, 0 and 1 may be pipes."""

    number: int

    def __str__(self) -> str:
        return f"fd:{self.number}"


Address = TcpAddress | TlsAddress | UnixAddress | SshAddress | ExecAddress | FdAddress


def parse_address(text: str) -> Address:
    """Raises UsageError, naming what is accepted."""
    found = _parse(text) if len(text) <= _TEXT_BYTES_MAX and text.isprintable() else None
    if found is None:
        raise UsageError(
            f"{text[:200]!r} is not an address; write tcp://HOST:PORT, tls://HOST:PORT, "
            "unix:///PATH, ssh://[USER@]HOST[:PORT]/STORE, exec:COMMAND or fd:N"
        )
    return found


def _parse(text: str) -> Address | None:
    if match := _TCP.fullmatch(text):
        host, port = _host(match), int(match["port"])
        if host is None or port >= 1 << 16:
            return None
        return TcpAddress(host, port) if match["kind"] == "tcp" else TlsAddress(host, port)
    if match := _SSH.fullmatch(text):
        host, port = _host(match), int(match["port"] or 22)
        if host is None or not 1 <= port < 1 << 16:
            return None
        return SshAddress(host, match["store"], match["user"], port if match["port"] else None)
    if text.startswith("unix:///"):
        path = text.removeprefix("unix://")
        return UnixAddress(path) if 1 < len(path.encode()) <= _UNIX_PATH_BYTES_MAX else None
    if text.startswith("exec:"):
        command = text.removeprefix("exec:").strip()
        return ExecAddress(command) if command else None
    if match := _FD.fullmatch(text):
        return FdAddress(int(match["number"]))
    return None


def _host(match: re.Match[str]) -> str | None:
    if match["ipv6"] is None:
        return match["host"]
    try:
        ipaddress.IPv6Address(match["ipv6"])
    except ValueError:
        return None
    return match["ipv6"]
