"""``replicator resume``."""

from pathlib import Path

import click

from fusedisk.mounting import find_state
from replicator import control


@click.command()
@click.option("--name")
@click.argument("mountpoint", type=Path)
def command(mountpoint: Path, name: str | None) -> None:
    """Go on after a pause."""
    control.command(find_state(mountpoint), name, "resume")
