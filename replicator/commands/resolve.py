"""``replicator resolve``."""

from pathlib import Path

import click
import trio

from fusedisk.fencing import FenceRecord
from replicator.address import parse_address
from replicator.handover import OutcomeUnknown, asking, settle, settling
from replicator.link import LinkLost
from replicator.options import sender_options
from replicator.running import run_trio
from replicator.source import Source
from replicator.transport.settings import Settings


@click.command()
@sender_options
@click.argument("mountpoint", type=click.Path(path_type=Path))
def command(mountpoint: Path, settings: Settings) -> None:
    """Settle a cutover of unknown outcome with the target."""
    source = Source(mountpoint)
    with settling(source) as record:
        if record is None:
            click.echo("nothing to resolve: the source is the disk")
        elif record.state == "fenced":
            click.echo(f"nothing to resolve: {record.replica} at {record.address} is the disk")
        else:
            click.echo(_settled(source, record, settings))


def _settled(source: Source, record: FenceRecord, settings: Settings) -> str:
    ask_outcome = asking(parse_address(record.address), settings, source.record.source_id)
    outcome: list[str] = []

    async def run() -> None:
        try:
            outcome.append(await ask_outcome(record))
        except (LinkLost, OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
            raise OutcomeUnknown(f"the target cannot be asked ({error}); try again") from None

    run_trio(run)
    settle(source, [Path(disk.path) for disk in source.record.disks], record, outcome[0])
    return outcome[0]
