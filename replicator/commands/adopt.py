"""``replicator adopt``."""

from pathlib import Path

import click

from replicator.adoption import adopt
from replicator.store import Store, check_replica_name


@click.command()
@click.argument("replica", metavar="STORE/NAME", type=click.Path(path_type=Path, file_okay=False))
@click.argument("images", nargs=-1, type=Path)
def command(replica: Path, images: tuple[Path, ...]) -> None:
    """Make a replica of images that a cutover fenced, so that a disk can come home.

    IMAGES move into the store, on the same filesystem. Without IMAGES, the promoted replica that
    was mounted and cut over from here becomes a replica again.
    """
    check_replica_name(replica.name)
    replica.parent.mkdir(parents=True, exist_ok=True)
    with Store(replica.parent) as store, store.claiming(replica.name):
        try:
            manifest, problem = adopt(replica, images)
        finally:
            store.release(replica.name)
    names = ", ".join(str(replica / disk.name) for disk in manifest.disks)
    click.echo(f"{replica.name}: a replica of {names}")
    if problem:
        click.echo(f"everything will be compared by hash, because {problem}")
