"""How a command line ends: with 0, or with one line that says what was wrong and its status."""

import os
import sys
from typing import NoReturn

import click

from fusedisk.errors import FuseDiskError


def run(name: str, cli: click.Group) -> NoReturn:
    """Run the command called on ``sys.argv`` as ``name`` and exit with its status."""
    try:
        sys.exit(cli.main(prog_name=name, standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        fail(name, error.format_message(), error.exit_code)
    except click.Abort:
        fail(name, "interrupted", 1)
    except BrokenPipeError:
        # Whoever read our output has enough; flushing the rest at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except FuseDiskError as error:
        fail(name, str(error), error.exit_code)


def fail(name: str, message: str, status: int) -> NoReturn:
    """Say why on stderr, as one line whatever a name or a peer put into it, and exit."""
    line = "".join(c if c.isprintable() else " " for c in message)
    click.echo(f"{name}: {line}", err=True)
    sys.exit(status)
