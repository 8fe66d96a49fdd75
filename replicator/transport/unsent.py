"""How much of what was written to a stream is still on this side of it.

A peer cannot answer what it has not got: over a slow link it is not silent while this goes down.
"""

import array
import fcntl
import termios
from typing import Protocol, runtime_checkable

import trio


@runtime_checkable
class Holding(Protocol):
    """A stream that is made of others, and knows which of them holds what it was given."""

    def unsent_bytes(self) -> int:
        """Bytes that were written and have not gone on, as far as that is known."""


def unsent_bytes(stream: object) -> int:
    """Bytes that were written and have not gone on; 0 for a stream that nothing is known of."""
    match stream:
        case trio.SocketStream():
            # Until the peer's host has them (tcp(7), unix(7): SIOCOUTQ).
            return _asked_of_kernel(stream.socket.fileno(), termios.TIOCOUTQ)
        case trio.lowlevel.FdStream():
            # Until the process at the other end has read them (pipe(7)).
            return _asked_of_kernel(stream.fileno(), termios.FIONREAD)
        case trio.SSLStream():
            return unsent_bytes(stream.transport_stream)
        case trio.StapledStream():
            return unsent_bytes(stream.send_stream)
        case Holding():
            return stream.unsent_bytes()
        case _:
            return 0


def _asked_of_kernel(fd: int, request: int) -> int:
    if fd < 0:
        # Closed, while somebody still watches the link.
        return 0
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, request, count)
    except OSError:
        return 0
    return count[0]
