"""``replicator start``."""

import logging
from pathlib import Path

import click
import trio

from replicator import control
from replicator.address import parse_address
from replicator.following import Follower, lock_replica
from replicator.options import sender_options
from replicator.running import run_trio, until_signal
from replicator.source import Source
from replicator.store import check_replica_name
from replicator.transport.connecting import check_target
from replicator.transport.settings import Settings


@click.command()
@click.option("--name", help="The replica's name; default: the mountpoint's last component.")
@click.option("--once", is_flag=True, help="End when nothing is left to send.")
@click.option("--rpo", default=5.0, type=click.FloatRange(0.1, 86400), show_default=True)
@sender_options
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.argument("address")
def command(
    mountpoint: Path, address: str, name: str | None, once: bool, rpo: float, settings: Settings
) -> None:
    """Replicate all disks of a mount, in the foreground."""
    name = name or mountpoint.resolve().name
    check_replica_name(name)
    target = parse_address(address)
    check_target(target)
    source = Source(mountpoint)
    lock_replica(source.state, name)
    follower = Follower(source, name, target, settings, rpo_seconds=rpo, once=once)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_signal, nursery.cancel_scope)
            nursery.start_soon(
                control.serve, control.path(source.state, name), follower, nursery.cancel_scope
            )
            nursery.start_soon(_log_progress, follower)
            await follower.run()
            nursery.cancel_scope.cancel()

    run_trio(run)


async def _log_progress(follower: Follower) -> None:
    log = logging.getLogger("replicator.progress")
    while True:
        await trio.sleep(2)
        if follower.state in ("filling", "comparing"):
            now = follower.progress.report()
            log.info(
                "%s: %.1f%% of %d MiB, %.0f MiB/s",
                *(follower.state, now["percent"], (now["total"] or 0) / 2**20),
                (now["rate"] or 0) / 2**20,
            )
