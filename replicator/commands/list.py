"""``replicator list``."""

import json
from pathlib import Path
from typing import Any

import click

from replicator.store import list_replicas


@click.command("list")
@click.option("--json", "as_json", is_flag=True)
@click.argument("store", type=click.Path(path_type=Path, file_okay=False))
def command(store: Path, as_json: bool) -> None:
    """List the replicas in a store."""
    found: list[dict[str, Any]] = [info._asdict() for info in list_replicas(store)]
    if as_json:
        click.echo(json.dumps({"replicas": found}, default=str))
        return
    for replica in found:
        size, points = replica["size"], replica["points"]
        click.echo(f"{replica['name']}: {replica['state']}, {size} bytes, {points} points")
