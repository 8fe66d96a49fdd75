"""``replicator status``."""

import json
import time
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from fusedisk.mounting import find_state
from fusedisk.replicas import read_reports, total_entry
from replicator import display

_WATCH_SECONDS = 0.5


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--watch", is_flag=True, help="Show it until Ctrl-C; with --json, a line each time.")
@click.argument("mountpoint", type=Path)
def command(mountpoint: Path, as_json: bool, watch: bool) -> None:
    """Show the replicas of a mount."""
    state = find_state(mountpoint)
    if watch:
        try:
            _watch(mountpoint, as_json)
        except KeyboardInterrupt:
            return
    if as_json:
        _print_json(state)
        return
    for entry in read_reports(state):
        click.echo(display.line(entry))


def _print_json(state: Path) -> None:
    found = read_reports(state)
    click.echo(json.dumps({"replicas": found, "total": total_entry(found)}))


def _watch(mountpoint: Path, as_json: bool) -> None:
    if as_json:
        while True:
            _print_json(find_state(mountpoint))
            time.sleep(_WATCH_SECONDS)
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(display.table(read_reports(find_state(mountpoint))), refresh=True)
            time.sleep(_WATCH_SECONDS)
