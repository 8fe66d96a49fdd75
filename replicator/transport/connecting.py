"""Connecting to a receiver, whatever its address."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

import trio

from fusedisk.errors import FuseDiskError, UsageError
from replicator.address import (
    Address,
    ExecAddress,
    FdAddress,
    SshAddress,
    TcpAddress,
    TlsAddress,
    UnixAddress,
)
from replicator.transport import inherited, processes, sockets, ssh, tls
from replicator.transport.settings import Settings, may_ask

_CONNECT_SECONDS_MAX = 10.0

Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[trio.abc.Stream]]
"""`connected`, with an address and its settings; a simulated network takes its place."""


@asynccontextmanager
async def connected(address: Address, settings: Settings) -> AsyncIterator[trio.abc.Stream]:
    """A stream to a receiver while the block lasts; a command started for it ends with the block.

    Raises FuseDiskError for what trying again would not mend, OSError or trio.TooSlowError for what
    it may. Errors of the stream are of the same kinds, with trio.BrokenResourceError besides.
    """
    if isinstance(address, SshAddress):
        asking = may_ask()
        command = ssh.command_line(address, settings.remote_command, may_ask=asking)
        explain = ssh.explain(address)
        async with processes.running(command, "ssh", explain, own_session=not asking) as stream:
            yield stream
    elif isinstance(address, ExecAddress):
        command = ["/bin/sh", "-c", address.command]
        async with processes.running(command, "exec", _explain_exec, own_session=True) as stream:
            yield stream
    else:
        connection = await _reach(address, settings)
        try:
            yield connection
        finally:
            await trio.aclose_forcefully(connection)


async def _reach(
    address: TcpAddress | TlsAddress | UnixAddress | FdAddress, settings: Settings
) -> trio.abc.Stream:
    try:
        with trio.fail_after(_CONNECT_SECONDS_MAX):
            return await _connect(address, settings)
    except trio.TooSlowError:
        why = f"no answer within {_CONNECT_SECONDS_MAX:.0f} s"
    except OSError as error:
        why = _reason(error)
    raise OSError(f"cannot reach {address}: {why}")


def _reason(error: BaseException) -> str:
    """What the system said, from below what trio put around it."""
    while not isinstance(error, OSError) or error.errno is None:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return str(error)
    # Negative numbers are those of name resolution.
    text = os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return text[:1].lower() + text[1:]


async def _connect(
    address: TcpAddress | TlsAddress | UnixAddress | FdAddress, settings: Settings
) -> trio.abc.Stream:
    match address:
        case TcpAddress():
            return await sockets.connect_tcp(
                address.host, address.port, loopback_only=not settings.insecure
            )
        case TlsAddress():
            context = await trio.to_thread.run_sync(tls.client_context, settings.tls)
            stream = await sockets.connect_tcp(address.host, address.port, loopback_only=False)
            return await tls.shake_hands(stream, context, address.host, str(address))
        case UnixAddress():
            return await sockets.connect_unix(address.path)
        case FdAddress():
            return inherited.take_stream(address)


def _explain_exec(code: int, last_line: str, received: bool) -> Exception:
    said = last_line or f"status {code}"
    if not received and code in (126, 127):
        return FuseDiskError(f"the command of the exec: address cannot be run: {said}")
    return trio.BrokenResourceError(f"the command of the exec: address ended: {said}")


def check_target(address: Address) -> None:
    """Raises UsageError for an address that a sender cannot connect to."""
    if isinstance(address, TcpAddress | TlsAddress) and address.port == 0:
        raise UsageError(f"{address} has no port to connect to")
    if isinstance(address, FdAddress):
        try:
            os.fstat(address.number)
        except OSError as error:
            raise UsageError(f"{address} is not there: {error.strerror}") from None
