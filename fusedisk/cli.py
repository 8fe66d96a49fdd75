"""The ``fusedisk`` command."""

import json
from pathlib import Path

import click

from fusedisk import commandline, mounting
from fusedisk.keeper import survives_crashes
from fusedisk.replicas import lagging
from fusedisk.signals import StopSignals
from fusedisk.status import status as mount_status
from fusedisk.units import format_size, parse_size
from fusedisk.unsettled import unsettled_text

# Nothing is checked here: opening says more, and ends as any other failure. Where something may be
# mounted already it is plain Path: click's own asks for attributes, which a dead server never says.
PATH = click.Path(readable=False, path_type=Path)


@click.group()
def cli() -> None:
    """A guest's disk as a file in a FUSE mount that knows what changed."""


def _size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    return None if text is None else parse_size(text)


def _mode(_: click.Context, __: click.Parameter, text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter("write it in octal, for example 640")
    return mode


@cli.command()
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.argument("mountpoint", type=PATH)
@click.option("-f", "--foreground", is_flag=True, help="Stay until it is unmounted.")
@click.option("--create", "create_size", callback=_size, metavar="SIZE", help="Make missing ones.")
@click.option("--chunk-size", callback=_size, default="64KiB", show_default=True)
@click.option("--state-dir", type=PATH, help="Default: beside the first.")
@click.option("--read-only", is_flag=True)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "none"]),
    default="writeback",
    show_default=True,
    help="Use the host's page cache, or write to the images past it.",
)
@click.option("--distrust", is_flag=True, help="Compare all replicas in full, by hash.")
@click.option("--standby", is_flag=True, help="A replica's images: writable once it is promoted.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as far as the mode does.")
@click.option("--uid", type=click.IntRange(0, 2**32 - 2))
@click.option("--gid", type=click.IntRange(0, 2**32 - 2))
@click.option("--mode", callback=_mode, default="600", show_default=True)
def mount(
    images: tuple[Path, ...],
    mountpoint: Path,
    foreground: bool,
    create_size: int | None,
    chunk_size: int,
    state_dir: Path | None,
    read_only: bool,
    cache: str,
    distrust: bool,
    standby: bool,
    allow_other: bool,
    uid: int | None,
    gid: int | None,
    mode: int,
) -> None:
    """Serve raw images or block devices; each appears as MOUNTPOINT/<basename>."""
    options = mounting.MountOptions(
        create_size=create_size,
        chunk_size=chunk_size,
        state_dir=state_dir,
        read_only=read_only,
        cache=cache,
        distrust=distrust,
        standby=standby,
        allow_other=allow_other,
        uid=uid,
        gid=gid,
        mode=mode,
    )
    signals = StopSignals()
    mounted = mounting.mount(images, mountpoint, options, signals)
    if not survives_crashes():
        click.echo(
            "fusedisk: Linux is older than 6.9: a crash of the disk server will not be survived",
            err=True,
        )
    for notice in mounted.notices:
        click.echo(f"fusedisk: {notice}", err=True)
    if foreground:
        mounting.stay(mounted, signals)


@cli.command()
@click.argument("mountpoint", type=Path)
def unmount(mountpoint: Path) -> None:
    """Flush, record a clean state, end the daemons."""
    state = mounting.find_state(mountpoint)
    note = mounting.unmount(mountpoint)
    if note:
        click.echo(f"fusedisk: {note}", err=True)
    for name, lag in lagging(state):
        what = f"lacks {lag.bytes} bytes" if lag else "has no complete copy of these disks"
        click.echo(f"replica {name} {what}; the next start goes on from there")


@cli.command()
@click.argument("mountpoint", type=Path)
def upgrade(mountpoint: Path) -> None:
    """Replace the disk server by one of the installed code; no request fails."""
    click.echo(f"served by process {mounting.upgrade(mountpoint)}")


@cli.command()
@click.argument("mountpoint", type=Path)
@click.option("--json", "as_json", is_flag=True)
def status(mountpoint: Path, as_json: bool) -> None:
    """Show the disks of a mount and how much of them was written."""
    found = mount_status(mountpoint)
    if as_json:
        click.echo(json.dumps(found))
        return
    fence = ", fenced" if found["fenced"] else ""
    fence += ", standing by until the replica is promoted" if found["standby"] else ""
    if found["slowed_to"] is not None:
        fence += f", the guest slowed to {format_size(found['slowed_to'])}/s"
    click.echo(f"{found['mountpoint']}: epoch {found['epoch']}{fence}")
    if found["cutover"] is not None:
        click.echo(f"  {unsettled_text(found['cutover'])}")
    if found["server"]["pid"] is None and found["keeper"]["pid"] is None:
        click.echo("  server and keeper are gone, the disks are dead: unmount, then mount again")
    elif found["server"]["pid"] is None:
        click.echo("  the disk server is down; the keeper is starting another one")
    elif found["keeper"]["pid"] is None:
        click.echo("  the keeper is gone: a crash of the server would now take the disks away")
    for disk in found["disks"]:
        click.echo(
            f"  {disk['name']}: {disk['size']} bytes, {disk['allocated']} allocated, "
            f"{disk['changed_chunks']} of {disk['chunks']} chunks changed"
        )


def main() -> None:
    """Entry point: an error is one line and its exit status."""
    commandline.run("fusedisk", cli)
