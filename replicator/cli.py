"""The ``replicator`` command. What it can do is in `replicator.commands`, one module each."""

import importlib
import logging
import pkgutil

import click

from fusedisk import commandline
from fusedisk.errors import FuseDiskError
from replicator import commands
from replicator.running import first_error

__all__ = ["main"]


class _Commands(click.Group):
    """Imports the module of the command that is called, so that `status` loads no receiver."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"replicator.commands.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands)
def cli() -> None:
    """Copies the disks of a fusedisk mount to another host while they are being written."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


def main() -> None:
    """Entry point: an error is one line and its exit status."""
    try:
        commandline.run("replicator", cli)
    except BaseExceptionGroup as group:
        error = first_error(group)
        if not isinstance(error, FuseDiskError):
            raise
        commandline.fail("replicator", str(error), error.exit_code)
