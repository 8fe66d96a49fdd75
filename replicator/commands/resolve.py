"""``replicator resolve``."""

from pathlib import Path
from typing import Literal

import click

from fusedisk.errors import FuseDiskError, UsageError
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
@click.option(
    "--qmp",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="The source's QEMU: lets its guest go on where the disk is.",
)
@sender_options
@click.argument("where", metavar="MOUNTPOINT|STORE/NAME", type=Path)
def command(
    where: Path,
    name: str | None,
    assume: Literal["source", "target"] | None,
    qmp: Path | None,
    settings: Settings,
) -> None:
    """Settle a cutover of unknown outcome: with the target, or by hand if one side is gone."""
    try:
        find_state(where)
    except FuseDiskError as not_mounted:
        if not (where / ".fusedisk").is_dir():
            raise FuseDiskError(f"{not_mounted}, and no replica of a store") from None
    else:
        resolve_at_source(where, name, assume, settings, None if qmp is None else qmp.absolute())
        return
    if qmp is not None:
        raise UsageError("--qmp is for the source: give its mountpoint")
    if assume == "target":
        promote(where, None, force=False, as_json=False)
        return
    with Store(where.parent) as store:
        click.echo(resolve_at_target(store, where.name, assume))
