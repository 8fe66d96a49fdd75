"""The ``replicator`` command."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import trio

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from fusedisk.mounting import find_state
from replicator import control
from replicator.address import connect, parse_address
from replicator.cutover import CutoverOptions, OutcomeUnknown, settle
from replicator.cutover import resolve as ask_outcome
from replicator.following import Follower, lock_replica
from replicator.link import Link, LinkLost
from replicator.receiver import first_error
from replicator.receiver import receive as serve_store
from replicator.source import Source
from replicator.store import Store, check_replica_name, list_replicas

__all__ = ["main"]


@click.group()
def cli() -> None:
    """Copies the disks of a fusedisk mount to another host while they are being written."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


async def _until_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


@cli.command()
@click.option("--store", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.argument("addresses", nargs=-1, required=True)
def receive(store: Path, addresses: tuple[str, ...]) -> None:
    """Serve a store until SIGTERM or SIGINT."""
    parsed = [parse_address(text) for text in addresses]

    async def run() -> None:
        with Store(store) as opened:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_signal, nursery.cancel_scope)
                await serve_store(opened, parsed)

    _run(run)


@cli.command()
@click.option("--name", help="The replica's name; default: the mountpoint's last component.")
@click.option("--once", is_flag=True, help="End when nothing is left to send.")
@click.option("--rpo", default=5.0, type=click.FloatRange(0.1, 86400), show_default=True)
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.argument("address")
def start(mountpoint: Path, address: str, name: str | None, once: bool, rpo: float) -> None:
    """Replicate all disks of a mount, in the foreground."""
    name = name or mountpoint.resolve().name
    check_replica_name(name)
    target = parse_address(address)
    source = Source(mountpoint)
    lock_replica(source.state, name)
    follower = Follower(source, name, target, rpo_seconds=rpo, once=once)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_signal, nursery.cancel_scope)
            nursery.start_soon(
                control.serve, control.path(source.state, name), follower, nursery.cancel_scope
            )
            nursery.start_soon(_log_progress, follower)
            await follower.run()
            nursery.cancel_scope.cancel()

    _run(run)


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


@cli.command()
@click.option("--json", "as_json", is_flag=True)
@click.argument("mountpoint", type=click.Path(path_type=Path))
def status(mountpoint: Path, as_json: bool) -> None:
    """Show the replicas of a mount."""
    found = {"replicas": control.reports(find_state(mountpoint))}
    if as_json:
        click.echo(json.dumps(found))
        return
    for replica in found["replicas"]:
        error = f" ({replica['error']})" if replica["error"] else ""
        click.echo(
            f"{replica['name']}: {replica['state']}{error}, {replica['address']}, "
            f"epoch {replica['epoch']['committed']}"
        )


@cli.command()
@click.option("--name")
@click.argument("mountpoint", type=click.Path(path_type=Path))
def stop(mountpoint: Path, name: str | None) -> None:
    """End a sender; the next start goes on from the last committed epoch."""
    control.ask(find_state(mountpoint), name, "stop")


@cli.command()
@click.option("--name")
@click.option("--max-downtime", default=1000, type=click.IntRange(1, 3600_000), metavar="MS")
@click.option("--timeout", default=60.0, type=click.FloatRange(0.1, 86400), metavar="SECONDS")
@click.option("--before", metavar="CMD", help="Pauses the guest; failing means rollback.")
@click.option("--after", metavar="CMD", help="Runs once the replica is promoted.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("mountpoint", type=click.Path(path_type=Path))
def cutover(
    mountpoint: Path,
    name: str | None,
    max_downtime: int,
    timeout: float,
    before: str | None,
    after: str | None,
    as_json: bool,
) -> None:
    """Move the disks to the target: all of it, or nothing."""
    options = CutoverOptions(max_downtime / 1000, timeout, before)
    request = f"cutover {msgspec.json.encode(options).decode()}"
    wait = 2 * timeout + max_downtime / 1000 + 60
    result = control.ask(find_state(mountpoint), name, request, wait)
    error, code = result.pop("error", None), result.pop("exit_code", 0)
    if as_json:
        click.echo(json.dumps(result))
    elif not error:
        phases = ", ".join(f"{k} {v:.1f} ms" for k, v in result["phases"].items())
        click.echo(f"promoted at epoch {result['epoch']}: downtime {result['downtime_ms']:.1f} ms")
        click.echo(f"  {phases}")
    if error:
        click.echo(f"replicator: {error}", err=True)
        sys.exit(code)
    if after is not None and (status := subprocess.run(["sh", "-c", after]).returncode):
        raise FuseDiskError(f"the replica is promoted, but --after ended with status {status}")


@cli.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
def resolve(mountpoint: Path) -> None:
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
        link = Link(await connect(parse_address(record.address)), "sender")
        try:
            outcome = await ask_outcome(link, record, source.record.source_id)
        except (LinkLost, trio.TooSlowError) as error:
            raise OutcomeUnknown(f"the target cannot be asked ({error}); try again") from None
        finally:
            await link.close()
        settle(source, images, record, outcome)
        click.echo(outcome)

    _run(run)


@cli.command("list")
@click.option("--json", "as_json", is_flag=True)
@click.argument("store", type=click.Path(path_type=Path, file_okay=False))
def list_store(store: Path, as_json: bool) -> None:
    """List the replicas in a store."""
    found: list[dict[str, Any]] = [info._asdict() for info in list_replicas(store)]
    if as_json:
        click.echo(json.dumps({"replicas": found}, default=str))
        return
    for replica in found:
        click.echo(f"{replica['name']}: {replica['state']}, {replica['size']} bytes")


def _run(run: Any) -> None:
    try:
        trio.run(run)
    except* (FuseDiskError, OSError) as group:
        error = first_error(group)
        if isinstance(error, OSError):
            raise FuseDiskError(str(error)) from None
        raise error from None


def main() -> None:
    """Entry point: an error is one line and its exit status."""
    try:
        cli.main(prog_name="replicator")
    except BaseException as error:
        found = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if not isinstance(found, FuseDiskError):
            raise
        click.echo(f"replicator: {found}", err=True)
        sys.exit(found.exit_code)
