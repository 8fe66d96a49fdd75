"""``replicator cutover``."""

import json
import subprocess
import sys
from pathlib import Path

import click
import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.mounting import find_state
from fusedisk.replicas import read_record
from replicator import control
from replicator.cutover import CutoverOptions
from replicator.options import Seconds
from replicator.settings import MAX_DOWNTIME_MS


@click.command()
@click.option("--name")
@click.option("--max-downtime", type=click.IntRange(1, 3600_000), metavar="MS")
@click.option("--timeout", default=60.0, type=Seconds(0.1, 86400), metavar="SECONDS")
@click.option("--before", metavar="CMD", help="Pauses the guest; failing means rollback.")
@click.option("--after", metavar="CMD", help="Runs once the replica is promoted.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("mountpoint", type=click.Path(path_type=Path))
def command(
    mountpoint: Path,
    name: str | None,
    max_downtime: int | None,
    timeout: float,
    before: str | None,
    after: str | None,
    as_json: bool,
) -> None:
    """Move the disks to the target: all of it, or nothing."""
    state = find_state(mountpoint)
    name = control.choose(state, name)
    if max_downtime is None:
        noted = read_record(state, name)
        max_downtime = (noted and noted.max_downtime_ms) or MAX_DOWNTIME_MS
    options = CutoverOptions(max_downtime / 1000, timeout, before)
    request = f"cutover {msgspec.json.encode(options).decode()}"
    wait = 2 * timeout + max_downtime / 1000 + 60
    result = control.ask(state, name, request, wait)
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
