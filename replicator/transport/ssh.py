"""Starting a receiver by the user's own ssh, with nothing on the other side but the package."""

import re
import shlex

import trio

from fusedisk.errors import FuseDiskError
from replicator.address import SshAddress
from replicator.transport.processes import Explain

_CONNECT_SECONDS_MAX = 10
_ALIVE_SECONDS, _ALIVE_COUNT = 5, 3
_SSH_FAILED, _NOT_EXECUTABLE, _NOT_FOUND = 255, 126, 127
# What ssh says where another attempt would end in the same way.
_HOPELESS = re.compile(
    "Host key verification failed|Permission denied|Too many authentication failures|"
    "No more authentication methods|Bad configuration|bad configuration|no matching .* found"
)


def command_line(address: SshAddress, remote_command: str, *, may_ask: bool) -> list[str]:
    """The local command. Every value is an argument of its own, and none can be an option."""
    options = [
        "EscapeChar=none",
        "ClearAllForwardings=yes",
        f"BatchMode={'no' if may_ask else 'yes'}",
        f"ConnectTimeout={_CONNECT_SECONDS_MAX}",
        f"ServerAliveInterval={_ALIVE_SECONDS}",
        f"ServerAliveCountMax={_ALIVE_COUNT}",
    ]
    command = ["ssh", "-T", "-x", "-a"]
    for option in options:
        command += ["-o", option]
    if address.port is not None:
        command += ["-p", str(address.port)]
    if address.user is not None:
        command += ["-l", address.user]
    return [*command, "--", address.host, remote_line(address, remote_command)]


def remote_line(address: SshAddress, remote_command: str) -> str:
    """What the shell on the other side runs; ``remote_command`` is its user's to quote."""
    return f"{remote_command} {shlex.join(['receive', '--store', address.store, 'fd:0'])}"


def explain(address: SshAddress) -> Explain:
    """What the end of ssh means: FuseDiskError where trying again would not help."""

    def error(code: int, last_line: str, received: bool) -> Exception:
        if received:
            return trio.BrokenResourceError(f"ssh to {address.host} ended: {last_line or code}")
        if code in (_NOT_FOUND, _NOT_EXECUTABLE):
            return FuseDiskError(
                f"{address.host} cannot run replicator ({last_line or code}); install the package "
                "there, or say where it is by --remote-command"
            )
        said = last_line or f"status {code}"
        if code == _SSH_FAILED and not _HOPELESS.search(last_line):
            return trio.BrokenResourceError(f"ssh to {address.host} failed: {said}")
        if code == _SSH_FAILED:
            return FuseDiskError(
                f"ssh to {address.host} failed: {said}; make 'ssh {address.host}' work without a "
                "question first"
            )
        return FuseDiskError(f"the receiver on {address.host} ended: {said}")

    return error
