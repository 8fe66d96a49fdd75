"""``replicator receive``."""

from pathlib import Path

import click
import trio

from replicator.address import parse_address
from replicator.receiver import receive as serve_store
from replicator.running import run_trio, until_signal
from replicator.store import Store


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.argument("addresses", nargs=-1, required=True)
def command(store: Path, addresses: tuple[str, ...]) -> None:
    """Serve a store until SIGTERM or SIGINT."""
    parsed = [parse_address(text) for text in addresses]

    async def run() -> None:
        with Store(store) as opened:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_signal, nursery.cancel_scope)
                await serve_store(opened, parsed)

    run_trio(run)
