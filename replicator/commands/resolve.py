"""``replicator resolve``."""

from pathlib import Path
from typing import Literal

import click

from fusedisk.errors import FuseDiskError
from fusedisk.mounting import find_state
from replicator.commands.promote import promote
from replicator.options import sender_options
from replicator.resolving import resolve_at_source, resolve_at_target
from replicator.store import Store
from replicator.transport.settings import Settings


@click.command()
@click.option("--name", help="The replica; may be left out where there is one.")
@click.option(
    "--assume",
    type=click.Choice(["source", "target"]),
    help="Which side is the disk, if the other side is gone for good and cannot be asked.",
)
@sender_options
@click.argument(
    "where", metavar="MOUNTPOINT|STORE/NAME", type=click.Path(path_type=Path, file_okay=False)
)
def command(
    where: Path,
    name: str | None,
    assume: Literal["source", "target"] | None,
    settings: Settings,
) -> None:
    """Settle a cutover of unknown outcome: with the target, or by hand if one side is gone."""
    try:
        find_state(where)
    except FuseDiskError as not_mounted:
        if not (where / ".fusedisk").is_dir():
            raise FuseDiskError(f"{not_mounted}, and no replica of a store") from None
    else:
        resolve_at_source(where, name, assume, settings)
        return
    if assume == "target":
        promote(where, None, force=False, as_json=False)
        return
    with Store(where.parent) as store:
        click.echo(resolve_at_target(store, where.name, assume))
