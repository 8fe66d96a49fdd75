"""Descriptors that we were started with: a connected or listening socket, or a pair of pipes."""

import os
import socket
import stat

import trio

from fusedisk.errors import UsageError
from replicator.address import FdAddress

_taken: set[int] = set()


def take_stream(address: FdAddress) -> trio.abc.Stream:
    """The stream of an inherited descriptor, which is then ours.

    Raises UsageError if it is none, or was taken before: it cannot be connected again.
    """
    kind = _kind(address)
    if kind == "socket":
        return trio.SocketStream(trio.socket.from_stdlib_socket(_take_socket(address)))
    if kind == "pipes":
        return _take_pipes()
    raise UsageError(f"{address} is not a connected stream socket")


def take_listener(address: FdAddress) -> trio.SocketListener | None:
    """A listener where the descriptor is a listening socket, as systemd passes them; else None."""
    if _kind(address) != "listener":
        return None
    return trio.SocketListener(trio.socket.from_stdlib_socket(_take_socket(address)))


def _kind(address: FdAddress) -> str | None:
    if address.number in _taken:
        raise UsageError(f"{address} was used up: such a connection cannot be made again")
    try:
        mode = os.fstat(address.number).st_mode
    except OSError as error:
        raise UsageError(f"{address} is not there: {error.strerror}") from None
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(address.number)) as sock:
            if sock.type != socket.SOCK_STREAM:
                return None
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return "listener" if listening else "socket"
    if address.number == 0 and stat.S_ISFIFO(mode) and stat.S_ISFIFO(os.fstat(1).st_mode):
        return "pipes"
    return None


def _take_socket(address: FdAddress) -> socket.socket:
    sock = socket.socket(fileno=os.dup(address.number))
    _hide(address.number)
    return sock


def _take_pipes() -> trio.abc.Stream:
    reading, writing = os.dup(0), os.dup(1)
    _hide(0)
    _hide(1)
    return trio.StapledStream(
        trio.lowlevel.FdStream(writing),
        trio.lowlevel.FdStream(reading),
    )


def _hide(number: int) -> None:
    """Put something harmless in its place: nobody else may write into the stream or inherit it."""
    _taken.add(number)
    if number == 1:
        os.dup2(2, 1)
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, number, inheritable=number < 3)
    os.close(null)
    if number == 0:
        _hide_output_of_same_socket()


def _hide_output_of_same_socket() -> None:
    # inetd and sshd may pass one socket as both; a stray line on it would break the stream.
    if stat.S_ISSOCK(os.fstat(1).st_mode):
        os.dup2(2, 1)
