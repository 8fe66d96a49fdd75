"""``replicator unmount``."""

from pathlib import Path

import click

from replicator.pointmount import unmount


@click.command()
@click.argument("mountpoint", type=Path)
def command(mountpoint: Path) -> None:
    """Unmount a recovery point; what was written to it is gone."""
    unmount(mountpoint)
