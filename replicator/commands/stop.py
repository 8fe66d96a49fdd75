"""``replicator stop``."""

from pathlib import Path

import click

from fusedisk.mounting import find_state
from replicator import control


@click.command()
@click.option("--name")
@click.argument("mountpoint", type=Path)
def command(mountpoint: Path, name: str | None) -> None:
    """End a sender; the next start goes on from the last committed epoch."""
    control.command(find_state(mountpoint), name, "stop")
