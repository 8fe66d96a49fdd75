"""Listening for senders, whatever the address."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import trio

from fusedisk.errors import UsageError
from replicator.address import Address, FdAddress, TcpAddress, TlsAddress, UnixAddress
from replicator.transport import inherited, sockets, tls
from replicator.transport.settings import Settings

Listener: TypeAlias = "trio.SocketListener | trio.SSLListener[trio.SocketStream]"


@dataclass(frozen=True)
class Bound:
    """An address that is listened on, or the one stream that was inherited.

    ``address`` is the one it really has.
    """

    address: Address
    listeners: Sequence[Listener] = ()
    stream: trio.abc.Stream | None = None


async def listen(address: Address, settings: Settings) -> Bound:
    """Raises UsageError for an address that only a sender can use, FuseDiskError, OSError."""
    match address:
        case TcpAddress(host, port):
            plain, port = await sockets.listen_tcp(host, port, loopback_only=not settings.insecure)
            return Bound(TcpAddress(host, port), plain)
        case TlsAddress(host, port):
            context = await trio.to_thread.run_sync(tls.server_context, settings.tls)
            plain, port = await sockets.listen_tcp(host, port, loopback_only=False)
            return Bound(TlsAddress(host, port), [trio.SSLListener(one, context) for one in plain])
        case UnixAddress(path):
            return Bound(address, [await sockets.listen_unix(path)])
        case FdAddress():
            if (listener := inherited.take_listener(address)) is not None:
                return Bound(address, [listener])
            return Bound(address, stream=inherited.take_stream(address))
        case _:
            raise UsageError(
                f"{address} is an address for a sender; a receiver listens on tcp://, tls://, "
                "unix:// or fd:"
            )
