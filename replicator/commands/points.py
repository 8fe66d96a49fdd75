"""``replicator points``."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from fusedisk.units import format_size
from replicator.store import require_replica


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.argument("replica", metavar="STORE/NAME", type=click.Path(path_type=Path, file_okay=False))
def command(replica: Path, as_json: bool) -> None:
    """List the recovery points of a replica, oldest first."""
    manifest = require_replica(replica)
    now = time.time()
    found: list[dict[str, Any]] = [
        {
            "id": point.id,
            "generation": point.generation,
            "epoch": point.epoch,
            "time": datetime.fromtimestamp(point.time, UTC).isoformat(timespec="seconds"),
            "age": max(0.0, round(now - point.time, 3)),
            "used": point.undo_bytes,
        }
        for point in manifest.points
    ]
    if as_json:
        click.echo(json.dumps({"keep": manifest.keep, "points": found}))
        return
    for point in found:
        click.echo(
            f"{point['id']}: epoch {point['epoch']}, {point['time']}, {point['age']:.0f} s old, "
            f"{format_size(point['used'])}"
        )
