"""``replicator mount``."""

from collections.abc import Callable
from pathlib import Path

import click

from fusedisk.errors import UsageError
from fusedisk.units import parse_size
from replicator.detaching import detach
from replicator.pointmount import ViewOptions, check_mountpoint, log_path, serve
from replicator.store import require_replica


def _size(_: click.Context, __: click.Parameter, text: str) -> int:
    return parse_size(text)


@click.command()
@click.option("--point", type=click.IntRange(1), help="Its id in 'points'; default: the newest.")
@click.option("-w", "--writable", is_flag=True, help="What is written is gone with the mount.")
@click.option("--room", callback=_size, metavar="SIZE", default="4GiB", help="For what is written.")
@click.option(
    "--scratch", type=Path, metavar="DIR", help="Where that is; default: $TMPDIR or /tmp."
)
@click.option("-f", "--foreground", is_flag=True, help="Stay until it is unmounted.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as far as the mode does.")
@click.option("--uid", type=click.IntRange(0, 2**32 - 2))
@click.option("--gid", type=click.IntRange(0, 2**32 - 2))
@click.argument("replica", metavar="STORE/NAME", type=Path)
@click.argument("mountpoint", type=Path)
def command(
    replica: Path,
    mountpoint: Path,
    point: int | None,
    writable: bool,
    room: int,
    scratch: Path | None,
    foreground: bool,
    allow_other: bool,
    uid: int | None,
    gid: int | None,
) -> None:
    """Show the disks of a replica as they were at a point, as files below MOUNTPOINT.

    Nothing is copied, and replication goes on. The point is kept for as long as it is mounted.
    """
    if scratch is not None and not writable:
        raise UsageError("--scratch is of use with --writable only")
    require_replica(replica)
    check_mountpoint(mountpoint)
    options = ViewOptions(
        point=point,
        room=room if writable else None,
        scratch=scratch,
        allow_other=allow_other,
        uid=uid,
        gid=gid,
    )
    replica, mountpoint = replica.resolve(), mountpoint.resolve()
    if foreground:
        serve(replica, mountpoint, options, lambda: None)
        return

    def work(ready: Callable[[], None]) -> None:
        serve(replica, mountpoint, options, ready)

    detach(work, log_path(replica), leave=mountpoint)
