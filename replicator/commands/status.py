"""``replicator status``."""

import json
from pathlib import Path

import click

from fusedisk.mounting import find_state
from replicator import control


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.argument("mountpoint", type=click.Path(path_type=Path))
def command(mountpoint: Path, as_json: bool) -> None:
    """Show the replicas of a mount."""
    found = {"replicas": control.reports(find_state(mountpoint))}
    if as_json:
        click.echo(json.dumps(found))
        return
    for replica in found["replicas"]:
        error = f" ({replica['error']})" if replica["error"] else ""
        click.echo(
            f"{replica['name']}: {replica['state']}{error}, {replica['address']}, "
            f"epoch {replica['epoch']['committed']}"
        )
