"""``replicator restore``."""

import sys
from pathlib import Path

import click

from fusedisk.errors import FuseDiskError
from fusedisk.units import format_size
from replicator.points import PointView
from replicator.replica import Replica
from replicator.restore import restore
from replicator.store import Store, require_replica


@click.command()
@click.option("--point", type=click.IntRange(1), help="Its id in 'points'; default: the newest.")
@click.argument("replica", metavar="STORE/NAME", type=click.Path(path_type=Path, file_okay=False))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
def command(replica: Path, directory: Path, point: int | None) -> None:
    """Copy the disks of a replica, as they were at a point, to DIR; run again it goes on."""
    require_replica(replica)
    with Store(replica.parent) as store, Replica.load(store, replica.name) as opened:
        manifest = opened.manifest
        if manifest.state == "promoted":
            raise FuseDiskError(
                f"replica {replica.name!r} is promoted and belongs to its guest; "
                "its images are no recovery point, copy them as they are"
            )
        if not manifest.points:
            raise FuseDiskError(
                f"replica {replica.name!r} has no recovery point yet; let its first fill finish"
            )
        if directory.resolve().is_relative_to(replica.parent.resolve()):
            raise FuseDiskError(f"{directory} is inside the store; restore to another directory")
        chosen = manifest.points[-1].id if point is None else point
        view = PointView(store.files, store.replica_path(replica.name), manifest, chosen)
        try:
            total = 2 * sum(disk.size for disk in view.disks)
            with click.progressbar(length=total, label="restoring", file=sys.stderr) as bar:
                written = restore(view, directory, bar.update)
        finally:
            view.close()
        click.echo(
            f"restored point {chosen} (epoch {view.point.epoch}) to {directory}: "
            f"{format_size(written)} written, verified"
        )
