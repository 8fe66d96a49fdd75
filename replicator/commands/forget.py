"""``replicator forget``."""

import os
from pathlib import Path

import click

from fusedisk.mounting import find_state
from fusedisk.state import sync_directory
from replicator import control
from replicator.senderlock import lock_replica

_KINDS = ("json", "sock", "before", "before.new")


@click.command()
@click.option("--name", required=True)
@click.argument("mountpoint", type=Path)
def command(mountpoint: Path, name: str) -> None:
    """Remove the source's record of a replica; what the target holds stays."""
    state = find_state(mountpoint)
    lock = lock_replica(state, control.choose(state, name))
    try:
        folder = state / "replicas"
        # The lock file stays: another process may be about to lock it.
        for leftover in (*(f"{name}.{kind}" for kind in _KINDS), *_logs(folder, name)):
            (folder / leftover).unlink(missing_ok=True)
        sync_directory(folder)
    finally:
        os.close(lock)


def _logs(folder: Path, name: str) -> list[str]:
    return [f"{name}.log", *(f"{name}.log.{n}" for n in range(1, 10))]
