"""``replicator start``."""

import functools
from collections.abc import Callable
from pathlib import Path

import click
import trio

from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.units import parse_rate, parse_size
from replicator import control
from replicator.address import parse_address
from replicator.compression import Method
from replicator.detaching import detach as run_detached
from replicator.following import Follower
from replicator.freeze import EVERY_SECONDS, freeze_settings
from replicator.link import SILENCE_SECONDS_MAX
from replicator.options import Seconds, sender_options
from replicator.running import run_trio, until_signal
from replicator.senderlock import lock_replica
from replicator.settings import OnError, SenderSettings, check_bandwidth, check_spill
from replicator.showing import show
from replicator.source import Source
from replicator.store import check_replica_name
from replicator.transport.connecting import check_target, connected
from replicator.transport.settings import Settings


@click.command()
@click.option("--name", help="The replica's name; default: the mountpoint's last component.")
@click.option("--once", is_flag=True, help="End when nothing is left to send.")
@click.option("--detach", is_flag=True, help="Go into the background; the log is in the state.")
@click.option("--rpo", default=5.0, type=Seconds(0.1, 86400), show_default=True)
@click.option("--bandwidth", default="none", metavar="RATE", help="Bytes a second, e.g. 10MiB.")
@click.option(
    "--compress",
    type=click.Choice(["zstd", "none"]),
    default="none",
    show_default=True,
    help="zstd steps back by itself where it does not pay.",
)
@click.option(
    "--spill",
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="Room at the source for copies of what the guest overwrites before it was sent.",
)
@click.option(
    "--link-timeout",
    default=SILENCE_SECONDS_MAX,
    type=Seconds(2, 3600),
    show_default=True,
    metavar="SECONDS",
    help="A receiver that is silent for longer is gone; connect again.",
)
@click.option("--freeze", metavar="qga:SOCKET", help="Freeze through QEMU's guest agent.")
@click.option("--freeze-cmd", metavar="CMD", help="Freezes the guest as an epoch is closed.")
@click.option("--thaw-cmd", metavar="CMD", help="Undoes --freeze-cmd; may be run twice.")
@click.option(
    "--freeze-every",
    default=EVERY_SECONDS,
    type=Seconds(0, 86400),
    show_default=True,
    metavar="SECONDS",
    help="At most this often.",
)
@click.option(
    "--verify-every",
    type=Seconds(1, 366 * 86400),
    metavar="TIME",
    help="Compare the replica by hash so often, e.g. 7d; the outcome is in the status.",
)
@click.option(
    "--verify-bandwidth",
    metavar="RATE",
    help="Bytes of data to compare each second then; default: no limit.",
)
@click.option(
    "--on-target-error",
    type=click.Choice(["wait", "stop"]),
    default="wait",
    show_default=True,
    help="Where the target is full or its disk fails: try again, or end with status 1.",
)
@click.option(
    "--on-source-error",
    type=click.Choice(["wait", "stop"]),
    default="wait",
    show_default=True,
    help="Where an image cannot be read: read it again, or end with status 1.",
)
@sender_options
@click.argument("mountpoint", type=Path)
@click.argument("address")
def command(
    mountpoint: Path,
    address: str,
    name: str | None,
    once: bool,
    detach: bool,
    rpo: float,
    bandwidth: str,
    compress: Method,
    spill: str,
    link_timeout: float,
    freeze: str | None,
    freeze_cmd: str | None,
    thaw_cmd: str | None,
    freeze_every: float,
    verify_every: float | None,
    verify_bandwidth: str | None,
    on_target_error: OnError,
    on_source_error: OnError,
    settings: Settings,
) -> None:
    """Replicate all disks of a mount, in the foreground."""
    name = name or mountpoint.resolve().name
    try:
        check_replica_name(name)
    except FuseDiskError as error:
        raise UsageError(f"{error}; give another --name") from None
    target = parse_address(address)
    check_target(target)
    wanted = SenderSettings(rpo_seconds=rpo, once=once, silence_seconds_max=link_timeout)
    wanted.compress = compress
    wanted.spill_bytes = check_spill(parse_size(spill))
    wanted.bandwidth = check_bandwidth(parse_rate(bandwidth))
    wanted.freeze = freeze_settings(freeze, freeze_cmd, thaw_cmd, freeze_every)
    wanted.verify_every = verify_every
    wanted.verify_bandwidth = None if verify_bandwidth is None else parse_rate(verify_bandwidth)
    wanted.on_target_error, wanted.on_source_error = on_target_error, on_source_error
    source = Source(mountpoint)
    lock_replica(source.state, name)

    def work(ready: Callable[[], None]) -> None:
        connect = functools.partial(connected, target, settings)
        _replicate(lambda: Follower(source, name, target, connect, wanted), source, name, ready)

    if detach:
        run_detached(work, source.state / "replicas" / f"{name}.log", leave=mountpoint)
    else:
        work(lambda: None)


def _replicate(
    make_follower: Callable[[], Follower], source: Source, name: str, ready: Callable[[], None]
) -> None:
    async def run() -> None:
        follower = make_follower()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_signal, nursery.cancel_scope)
            socket = control.path(source.state, name)
            await nursery.start(control.serve, socket, follower, nursery.cancel_scope)
            ready()
            nursery.start_soon(show, follower)
            await follower.run()
            nursery.cancel_scope.cancel()

    run_trio(run)
