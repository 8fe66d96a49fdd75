"""``replicator keys``."""

from pathlib import Path

import click

from replicator.keys import make_keys


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
def command(directory: Path, hosts: tuple[str, ...]) -> None:
    """Make TLS keys for hosts, by a small CA in DIRECTORY.

    Each HOST is the name or the IP address by which others connect to it. Called again, the same CA
    makes keys for more hosts; nothing is overwritten.
    """
    made = make_keys(directory, list(hosts))
    for keys in made:
        click.echo(
            f"{keys.host}: copy cert.pem and key.pem, and the CA's ca.pem, from {keys.directory} "
            f"to /etc/fusedisk/tls there, or where its --tls says; valid until {keys.expires}"
        )
    click.echo(f"keep {directory / 'ca-key.pem'} off these hosts: it makes keys that all accept")
