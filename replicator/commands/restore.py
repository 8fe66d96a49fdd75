"""``replicator restore``."""

import re
from pathlib import Path

import click
import trio

from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.units import format_size
from replicator.address import Address, parse_address
from replicator.link import Link, LinkLost
from replicator.livepoint import LivePoint
from replicator.messages import RemoteProtocolError
from replicator.options import sender_options
from replicator.progress import Progress
from replicator.restore import restore
from replicator.restoring import restore_from
from replicator.running import run_trio, until_signal
from replicator.showing import showing_progress
from replicator.store import Store, check_replica_name
from replicator.transport.connecting import check_target, connected
from replicator.transport.settings import Settings

_ADDRESS = re.compile(r"(tcp|tls|unix|ssh)://|exec:|fd:")


@click.command()
@click.option("--point", type=click.IntRange(1), help="Its id in 'points'; default: the newest.")
@sender_options
@click.argument("replica", metavar="STORE/NAME|ADDRESS/NAME")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
def command(replica: str, directory: Path, point: int | None, settings: Settings) -> None:
    """Copy the disks of a replica, as they were at a point, to DIR; run again it goes on.

    The replica is in a store here, or behind a receiver. Replication may go on meanwhile.
    """
    if _ADDRESS.match(replica) is None:
        path = Path(replica)
        _check_name(path.name)
        if directory.resolve().is_relative_to(path.parent.resolve()):
            raise FuseDiskError(f"{directory} is inside the store; restore to another directory")
        run_trio(lambda: _from_store(path, point, directory))
        return
    where, _, name = replica.rpartition("/")
    _check_name(name)
    if where.startswith("unix://") and where == "unix://":
        raise UsageError(f"{replica!r} names no replica; write ADDRESS/NAME")
    address = parse_address(where)
    check_target(address)
    run_trio(lambda: _from_receiver(address, name, point, directory, settings))


def _check_name(name: str) -> None:
    try:
        check_replica_name(name)
    except FuseDiskError as error:
        raise UsageError(str(error)) from None


async def _from_store(path: Path, point: int | None, directory: Path) -> None:
    progress = Progress()

    def work() -> str:
        with Store(path.parent) as store:
            view = LivePoint(store, path.name, point)
            try:
                progress.begin("restoring", [2 * sum(disk.size for disk in view.disks)])

                def advance(count: int) -> None:
                    trio.from_thread.check_cancelled()
                    progress.advance(0, count, trio.from_thread.run_sync(trio.current_time))

                written = restore(view, directory, advance)
            finally:
                view.close()
            return _summary(view.point.id, view.point.epoch, directory, written)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_signal, nursery.cancel_scope)
        nursery.start_soon(showing_progress, progress)
        click.echo(await trio.to_thread.run_sync(work))
        progress.finish()
        nursery.cancel_scope.cancel()


async def _from_receiver(
    address: Address, name: str, point: int | None, directory: Path, settings: Settings
) -> None:
    progress = Progress()

    def begin(total: int) -> None:
        progress.begin("restoring", [total])

    def advance(count: int) -> None:
        progress.advance(0, count, trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_signal, nursery.cancel_scope)
        nursery.start_soon(showing_progress, progress)
        try:
            async with connected(address, settings) as stream:
                link = Link(stream, "sender")
                found, written = await restore_from(link, name, point, directory, begin, advance)
        except (LinkLost, trio.TooSlowError, trio.BrokenResourceError, OSError) as error:
            raise FuseDiskError(
                f"cannot restore from {address}: {error or 'it does not answer'}; remove the "
                "cause and run it again, it goes on where it was"
            ) from None
        except RemoteProtocolError as error:
            raise FuseDiskError(f"the receiver at {address} is none: {error}") from None
        click.echo(_summary(found.point, found.epoch, directory, written))
        progress.finish()
        nursery.cancel_scope.cancel()


def _summary(point: int, epoch: int, directory: Path, written: int) -> str:
    size = format_size(written)
    return f"restored point {point} (epoch {epoch}) to {directory}: {size} written, verified"
