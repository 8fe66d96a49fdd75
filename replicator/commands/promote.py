"""``replicator promote``."""

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

import click

from fusedisk.errors import FuseDiskError
from replicator.manifest import Manifest
from replicator.promotion import disk_paths
from replicator.store import Store
from replicator.taking import take


@click.command()
@click.option("--point", type=click.IntRange(1), help="A recovery point to go back to first.")
@click.option(
    "--force",
    is_flag=True,
    help="Also where there is no whole point, or the source is connected.",
)
@click.option("--json", "as_json", is_flag=True)
@click.argument("replica", metavar="STORE/NAME", type=click.Path(path_type=Path, file_okay=False))
def command(replica: Path, point: int | None, force: bool, as_json: bool) -> None:
    """Make a replica the disk because its source is gone; that is refused from then on."""
    promote(replica, point, force=force, as_json=as_json)


def promote(path: Path, point: int | None, *, force: bool, as_json: bool) -> None:
    """Promote, and say what is the disk now. Raises FuseDiskError."""
    with Store(path.parent) as store, take(store, path.name, force=force) as replica:
        already = replica.manifest.state == "promoted"
        if already and point is not None:
            raise FuseDiskError(
                f"replica {path.name!r} is promoted and belongs to its guest; "
                "it cannot go back to a point"
            )
        whole = replica.manifest.state != "filling"
        if point is not None:
            if not whole:
                raise FuseDiskError(f"replica {path.name!r} has no recovery point")
            replica.roll_back(point)
        replica.take_over(str(uuid.uuid4()), force=force)
        manifest = replica.manifest
        if already and manifest.epoch is None:
            whole = False
    if not whole:
        click.echo(
            f"replicator: warning: replica {path.name!r} had NO WHOLE POINT and was promoted by "
            "force: its images are no state that the disks ever had; check them before use",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(_report(path, manifest, already=already)))
        return
    epoch = "no whole point" if manifest.epoch is None else f"epoch {manifest.epoch}"
    was = "was promoted before" if already else "promoted"
    click.echo(f"{path.name}: {was}, {epoch}; the disks are now:")
    for disk in disk_paths(path, manifest):
        click.echo(f"  {disk}")


def _report(path: Path, manifest: Manifest, *, already: bool) -> dict[str, object]:
    when = manifest.promoted_at
    return {
        "outcome": "promoted",
        "already": already,
        "whole": manifest.epoch is not None,
        "token": manifest.token,
        "generation": manifest.generation,
        "epoch": manifest.epoch,
        "time": when and datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds"),
        "disks": disk_paths(path, manifest),
    }
