"""``replicator set``."""

from pathlib import Path

import click
import msgspec

from fusedisk.errors import UsageError
from fusedisk.mounting import find_state
from fusedisk.units import parse_rate
from replicator import control
from replicator.options import Seconds
from replicator.settings import Changes, check_bandwidth


@click.command()
@click.option("--name")
@click.option("--bandwidth", metavar="RATE", help="Bytes a second, e.g. 10MiB; none: no limit.")
@click.option("--rpo", type=Seconds(0.1, 86400), metavar="SECONDS")
@click.option("--max-downtime", type=click.IntRange(1, 3600_000), metavar="MS")
@click.argument("mountpoint", type=Path)
def command(
    mountpoint: Path,
    name: str | None,
    bandwidth: str | None,
    rpo: float | None,
    max_downtime: int | None,
) -> None:
    """Change the settings of a running sender."""
    changes = Changes()
    if bandwidth is not None:
        changes.bandwidth = check_bandwidth(parse_rate(bandwidth))
    if rpo is not None:
        changes.rpo_seconds = rpo
    if max_downtime is not None:
        changes.max_downtime_ms = max_downtime
    if changes == Changes():
        raise UsageError("say what to set: --bandwidth, --rpo or --max-downtime")
    control.command(find_state(mountpoint), name, f"set {msgspec.json.encode(changes).decode()}")
