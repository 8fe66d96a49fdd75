"""A receiver's life: listen on every address, and run a session for each connection."""

import functools
from collections.abc import Sequence
from pathlib import Path

import trio

from replicator.address import Address, UnixAddress
from replicator.limits import raise_limits
from replicator.receiver import Receiver
from replicator.store import Store
from replicator.transport import sockets, tls
from replicator.transport.listening import Bound, Listener, listen
from replicator.transport.settings import Settings


async def receive(store: Store, addresses: Sequence[Address], settings: Settings) -> None:
    """Serve until cancelled, or where all are inherited streams until these end.

    Prints one line for each address that is listened on; nothing for a stream, which may be our
    standard output. Raises UsageError, FuseDiskError or OSError before anything is served.
    """
    raise_limits()
    receiver = Receiver(store)
    bound: list[Bound] = []
    try:
        for address in addresses:
            bound.append(await listen(address, settings))
        for one in bound:
            if one.listeners:
                print(f"listening on {one.address}", flush=True)
        async with trio.open_nursery() as nursery:
            for one in bound:
                if one.stream is not None:
                    nursery.start_soon(receiver.serve, one.stream)
            if listeners := [listener for one in bound for listener in one.listeners]:
                handler = functools.partial(_serve_connection, receiver, settings)
                nursery.start_soon(trio.serve_listeners, handler, listeners)
    finally:
        for one in bound:
            _forget(one.address, one.listeners)


async def _serve_connection(
    receiver: Receiver,
    settings: Settings,
    stream: "trio.SocketStream | trio.SSLStream[trio.SocketStream]",
) -> None:
    if isinstance(stream, trio.SSLStream):
        sockets.keep_alive(stream.transport_stream)
        await receiver.serve(stream, functools.partial(tls.admit, stream, settings.allow))
    else:
        sockets.keep_alive(stream)
        await receiver.serve(stream)


def _forget(address: Address, listeners: Sequence[Listener]) -> None:
    if isinstance(address, UnixAddress) and listeners:
        Path(address.path).unlink(missing_ok=True)
