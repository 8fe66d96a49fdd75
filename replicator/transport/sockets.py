"""Plain sockets: TCP, which has to stay on the loopback or be allowed, and Unix sockets."""

import errno
import ipaddress
import os
import socket
import stat
from pathlib import Path

import trio

from fusedisk.errors import FuseDiskError

_BACKLOG = 64
# A peer that vanished without a word is noticed after about a minute, also while nothing is sent.
_KEEPALIVE_IDLE_SECONDS, _KEEPALIVE_INTERVAL_SECONDS, _KEEPALIVE_COUNT = 30, 10, 3


async def require_loopback(host: str) -> None:
    """Raises FuseDiskError unless every address of the host is a loopback; OSError if unknown."""
    found = await trio.socket.getaddrinfo(
        host, None, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE
    )
    if not all(_is_loopback(str(sockaddr[0])) for *_, sockaddr in found):
        raise _insecure(host)


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _insecure(host: str) -> FuseDiskError:
    return FuseDiskError(
        f"tcp beyond the loopback ({host}) is unencrypted and open to all: use tls:// (keys are "
        "made by 'replicator keys') or ssh://, or give --insecure on a network that is yours alone"
    )


async def connect_tcp(host: str, port: int, *, loopback_only: bool) -> trio.SocketStream:
    """Connect. Raises FuseDiskError for a host beyond the loopback, and OSError."""
    if loopback_only:
        await require_loopback(host)
    stream = await trio.open_tcp_stream(host, port)
    # A name can be resolved differently the second time.
    if loopback_only and not _is_loopback(stream.socket.getpeername()[0]):
        await trio.aclose_forcefully(stream)
        raise _insecure(host)
    keep_alive(stream)
    return stream


def keep_alive(stream: trio.SocketStream) -> None:
    """Let the kernel notice a peer that is gone; without effect on a Unix socket."""
    if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_SECONDS)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_SECONDS)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)


async def connect_unix(path: str) -> trio.SocketStream:
    """Connect. Raises OSError."""
    return await trio.open_unix_socket(path)


async def listen_tcp(
    host: str, port: int, *, loopback_only: bool
) -> tuple[list[trio.SocketListener], int]:
    """Listeners for a host, and their port. Raises FuseDiskError beyond the loopback, OSError."""
    if loopback_only:
        await require_loopback(host)
    listeners = list(await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG))
    if port == 0:
        # Each has a port of its own, and one is all that can be announced.
        for listener in listeners[1:]:
            await listener.aclose()
        del listeners[1:]
    return listeners, listeners[0].socket.getsockname()[1]


async def listen_unix(path: str) -> trio.SocketListener:
    """A listener that only this user may connect to. Raises OSError."""
    _remove_stale(Path(path))
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    try:
        # Before bind, so that there is no moment in which the socket is open to others.
        os.fchmod(sock.fileno(), 0o600)
        await sock.bind(path)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            path.unlink()
