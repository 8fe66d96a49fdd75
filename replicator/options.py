"""Options that several commands share."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

from replicator.transport.settings import REMOTE_COMMAND, Settings

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Seconds(click.FloatRange):
    """A time in seconds from ``min`` to ``max``, or with ms, s, m, h or d behind it."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a range lets what is none through, since it is not less than anything."""
        if isinstance(value, str) and (
            match := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", value, re.ASCII)
        ):
            value = float(match[1]) * _UNITS[match[2]]
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a time", param, ctx)
        return number


Command: TypeAlias = Callable[..., None]

_tls = click.option(
    "--tls",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="ca.pem, cert.pem and key.pem; default: ~/.config/fusedisk/tls or /etc/fusedisk/tls.",
)
_insecure = click.option(
    "--insecure", is_flag=True, help="Allow tcp:// beyond the loopback, open to anybody there."
)
_allow = click.option(
    "--allow",
    multiple=True,
    metavar="NAME",
    help="Certificate name that may connect by TLS; repeatable. Default: any of the CA.",
)
_remote_command = click.option(
    "--remote-command",
    default=REMOTE_COMMAND,
    show_default=True,
    metavar="COMMAND",
    help="Starts replicator on an ssh:// host; the shell there takes it as it is.",
)


def sender_options(function: Command) -> Command:
    """Options of a command that connects; it gets them as ``settings``."""
    return _tls(_insecure(_remote_command(_with_settings(function))))


def receiver_options(function: Command) -> Command:
    """Options of a command that listens; it gets them as ``settings``."""
    return _tls(_insecure(_allow(_with_settings(function))))


def _with_settings(function: Command) -> Command:
    @functools.wraps(function)
    def command(
        tls: Path | None,
        insecure: bool,
        allow: tuple[str, ...] = (),
        remote_command: str = REMOTE_COMMAND,
        **rest: Any,
    ) -> None:
        if not remote_command.strip() or not remote_command.isprintable():
            raise click.BadParameter("must be one line of text", param_hint="--remote-command")
        function(settings=Settings(tls, insecure, allow, remote_command), **rest)

    return command
