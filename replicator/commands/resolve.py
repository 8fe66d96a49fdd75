"""``replicator resolve``."""

from pathlib import Path

import click
import trio

from fusedisk.fencing import read_fence
from replicator.address import parse_address
from replicator.handover import OutcomeUnknown, settle
from replicator.handover import resolve as ask_outcome
from replicator.link import Link, LinkLost
from replicator.options import sender_options
from replicator.running import run_trio
from replicator.source import Source
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings


@click.command()
@sender_options
@click.argument("mountpoint", type=click.Path(path_type=Path))
def command(mountpoint: Path, settings: Settings) -> None:
    """Settle a cutover of unknown outcome with the target."""
    source = Source(mountpoint)
    images = [Path(disk.path) for disk in source.record.disks]
    record = read_fence(images)
    if record is None:
        click.echo("nothing to resolve: the source is the disk")
        return
    if record.state == "fenced":
        click.echo(f"nothing to resolve: {record.replica} at {record.address} is the disk")
        return

    async def run() -> None:
        try:
            async with connected(parse_address(record.address), settings) as stream:
                link = Link(stream, "sender")
                outcome = await ask_outcome(link, record, source.record.source_id)
        except (LinkLost, OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
            raise OutcomeUnknown(f"the target cannot be asked ({error}); try again") from None
        settle(source, images, record, outcome)
        click.echo(outcome)

    run_trio(run)
