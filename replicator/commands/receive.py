"""``replicator receive``."""

from pathlib import Path

import click
import trio

from replicator.address import parse_address
from replicator.options import receiver_options
from replicator.running import run_trio, until_signal
from replicator.serving import receive as serve_store
from replicator.store import Store
from replicator.transport.settings import Settings


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--keep",
    metavar="SPEC",
    help="Recovery points to keep of each replica: COUNT or COUNTxTIME, e.g. 12x5m,24x1h,7x1d. "
    "Default: as before, and at first the newest alone.",
)
@receiver_options
@click.argument("addresses", nargs=-1, required=True)
def command(store: Path, keep: str | None, addresses: tuple[str, ...], settings: Settings) -> None:
    """Serve a store until SIGTERM or SIGINT, or fd:0 until its other end closes."""
    parsed = [parse_address(text) for text in addresses]

    async def run() -> None:
        with Store(store, keep=keep) as opened:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_signal, nursery.cancel_scope)
                await serve_store(opened, parsed, settings)
                nursery.cancel_scope.cancel()

    run_trio(run)
