"""``replicator points``."""

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from fusedisk.units import format_size
from replicator.clones import clone_path
from replicator.exclusive import exclusive_bytes
from replicator.manifest import Point
from replicator.pins import pinned_points
from replicator.store import require_replica


def _used(replica: Path, point: Point, disks: int) -> int:
    """What letting the point alone go would give back, in bytes."""
    used = point.undo_bytes
    if point.clone is not None:
        for disk in range(disks):
            # Replication goes on: it may just have been let go.
            with suppress(FileNotFoundError):
                used += exclusive_bytes(clone_path(replica, point.clone, disk))
    return used


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.argument("replica", metavar="STORE/NAME", type=click.Path(path_type=Path, file_okay=False))
def command(replica: Path, as_json: bool) -> None:
    """List the recovery points of a replica, oldest first."""
    manifest = require_replica(replica)
    now = time.time()
    in_use = pinned_points(replica.parent, replica.name)
    found: list[dict[str, Any]] = [
        {
            "id": point.id,
            "generation": point.generation,
            "epoch": point.epoch,
            "time": datetime.fromtimestamp(point.time, UTC).isoformat(timespec="seconds"),
            "age": max(0.0, round(now - point.time, 3)),
            "kind": "undo" if point.clone is None else "clone",
            "used": _used(replica, point, len(manifest.disks)),
            "frozen": point.frozen,
            "in_use": point.id in in_use,
        }
        for point in manifest.points
    ]
    if as_json:
        click.echo(json.dumps({"keep": manifest.keep, "points": found}))
        return
    for point in found:
        click.echo(
            f"{point['id']}: epoch {point['epoch']}, {point['time']}, {point['age']:.0f} s old, "
            f"{format_size(point['used'])}{', frozen' if point['frozen'] else ''}"
            f"{', in use' if point['in_use'] else ''}"
        )
