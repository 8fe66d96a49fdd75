"""``replicator cutover``."""

import json
import os
import select
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from fusedisk.mounting import find_state
from fusedisk.replicas import read_record
from fusedisk.state import read_mount_record
from replicator import control
from replicator.cutover import CutoverOptions
from replicator.display import cutover_text
from replicator.guest import check_options
from replicator.handover import OutcomeUnknown
from replicator.hooks import BeforeNote, run_hook
from replicator.options import Seconds
from replicator.running import run_trio
from replicator.settings import MAX_DOWNTIME_MS
from replicator.slowing import check_floor

_SHOW_SECONDS = 0.5


@click.command()
@click.option("--name")
@click.option("--max-downtime", type=click.IntRange(1, 3600_000), metavar="MS")
@click.option("--timeout", default=60.0, type=Seconds(0.1, 86400), metavar="SECONDS")
@click.option("--before", metavar="CMD", help="Pauses the guest; failing means rollback.")
@click.option("--after", metavar="CMD", help="Runs once the replica is promoted.")
@click.option("--on-rollback", metavar="CMD", help="Lets the guest go on, if --before ran.")
@click.option(
    "--hook-timeout",
    default=30.0,
    type=Seconds(0.1, 86400),
    show_default=True,
    metavar="SECONDS",
    help="A command above that takes longer has failed.",
)
@click.option(
    "--verify",
    default="last",
    type=click.Choice(["none", "last", "full"]),
    show_default=True,
    help="What is read again on both sides and compared before the switch.",
)
@click.option(
    "--qmp",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="QEMU's monitor: the guest is paused for the switch.",
)
@click.option("--migrate-to", metavar="URI", help="Moves the memory to the QEMU that waits there.")
@click.option("--slow-guest", is_flag=True, help="Slows writes step by step if they are too many.")
@click.option(
    "--slow-floor",
    default="1MiB",
    show_default=True,
    metavar="RATE",
    help="Bytes of disk a second that --slow-guest leaves to the guest.",
)
@click.option("--dry-run", is_flag=True, help="All but the switch; says what it would take.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("mountpoint", type=Path)
def command(
    mountpoint: Path,
    name: str | None,
    max_downtime: int | None,
    timeout: float,
    before: str | None,
    after: str | None,
    on_rollback: str | None,
    hook_timeout: float,
    verify: str,
    qmp: Path | None,
    migrate_to: str | None,
    slow_guest: bool,
    slow_floor: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Move the disks to the target: all of it, or nothing."""
    monitor = check_options(qmp, migrate_to)
    state = find_state(mountpoint)
    name = control.choose(state, name)
    if max_downtime is None:
        noted = read_record(state, name)
        max_downtime = (noted and noted.max_downtime_ms) or MAX_DOWNTIME_MS
    options = CutoverOptions(
        downtime_seconds_max=max_downtime / 1000,
        timeout_seconds=timeout,
        before=before,
        after=after,
        on_rollback=on_rollback,
        hook_seconds_max=hook_timeout,
        verify=verify,  # type: ignore[arg-type]
        dry_run=dry_run,
        qmp=monitor,
        migrate_to=migrate_to,
        slow_floor=check_floor(slow_floor) if slow_guest else None,
    )
    request = f"cutover {msgspec.json.encode(options).decode()}"
    waiting = _Waiting(state, name, options)
    ended = threading.Event()
    if sys.stderr.isatty():
        threading.Thread(target=_show, args=(state, name, ended), daemon=True).start()
    try:
        # Every step has a bound of its own, and a sender that ends closes the socket.
        result = control.ask(state, name, request, None)
    except FuseDiskError as lost:
        result = waiting.without_sender(lost)
    finally:
        ended.set()
    error, code = result.pop("error", None), result.pop("exit_code", 0)
    if as_json:
        click.echo(json.dumps(result))
    elif not error:
        click.echo(_summary(result))
    if failed := result.get("after"):
        error = f"{error}; and " if error else "the replica is promoted, but "
        error, code = error + failed, FuseDiskError.exit_code
    if error:
        click.echo(f"replicator: {error}", err=True)
        sys.exit(code)


class _Waiting:
    """What a command notes before it waits, for a sender that ends without an answer."""

    def __init__(self, state: Path, name: str, options: CutoverOptions) -> None:
        self._state, self._name, self._options = state, name, options
        self._note = BeforeNote(state, name)
        self._left_over = self._note.read()
        self._sender = -1
        # Where no sender runs, the request itself says so.
        with suppress(FuseDiskError, OSError):
            self._sender = os.pidfd_open(control.ask(state, name, "status")["sender"]["pid"])

    def without_sender(self, error: FuseDiskError) -> dict[str, Any]:
        """How the cutover stands: what its sender recorded tells, once that has ended."""
        if self._sender >= 0:
            # Told to stop, it may be past the point from which it carries the promotion out.
            select.select([self._sender], [], [])
        record = read_fence(Path(disk.path) for disk in read_mount_record(self._state).disks)
        if record is None:
            return self._rolled_back(error)
        told: dict[str, Any] = {"downtime_ms": None, "phases": {}, "epoch": record.epoch}
        if record.replica != self._name and record.state == "fenced":
            return {
                "outcome": "unknown",
                **told,
                "error": f"{error}; {self._name} was not promoted, {record.replica} at "
                f"{record.address} is the disk already: cut over from there",
                "exit_code": FuseDiskError.exit_code,
            }
        if record.state == "fenced":
            after = self._options.after
            if after is not None:
                told["after"] = (
                    f"nothing tells that --after was run: look, and run it by hand: {after}"
                )
            return {"outcome": "promoted", "predicted_ms": None, "root": "unknown", **told}
        return {
            "outcome": "unknown",
            **told,
            "error": f"{error}; the promotion of {record.replica} was begun, run "
            "'replicator resolve'",
            "exit_code": OutcomeUnknown.exit_code,
        }

    def _rolled_back(self, error: FuseDiskError) -> dict[str, Any]:
        """Without a record nothing was promoted, and the guest that a hook paused has to go on."""
        said = str(error)
        if self._sender >= 0:
            said = (
                f"the sender of {self._name} ended during the cutover and nothing was promoted; "
                "the guest goes on at the source"
            )
        facts, command = self._note.read(), self._options.on_rollback
        if facts is not None and facts != self._left_over:
            failed = "there was no --on-rollback"
            if command is not None:
                failed = self._let_go_on(command, facts)
            said += f", but --before was begun and {failed}: let it go on by hand" if failed else ""
        return {
            "outcome": "rolled-back",
            "downtime_ms": None,
            "phases": {},
            "epoch": None,
            "error": said,
            "exit_code": error.exit_code,
        }

    def _let_go_on(self, command: str, facts: dict[str, Any]) -> str:
        """Run ``--on-rollback`` in the place of the sender; what went wrong."""
        seconds = self._options.hook_seconds_max
        facts = {**facts, "outcome": "rolled-back"}
        try:
            self._note.take_over(seconds)
            run_trio(partial(run_hook, "--on-rollback", command, facts, seconds))
        except (OSError, FuseDiskError) as failure:
            return str(failure)
        finally:
            self._note.remove()
        return ""


def _summary(result: dict[str, Any]) -> str:
    if result["predicted_ms"] is None:
        return f"promoted at epoch {result['epoch']}"
    predicted = f"{result['predicted_ms']:.1f} ms"
    if result["outcome"] == "dry-run":
        return f"nothing was switched: the downtime would be about {predicted}"
    phases = ", ".join(f"{k} {v:.1f} ms" for k, v in result["phases"].items())
    return (
        f"promoted at epoch {result['epoch']}: downtime {result['downtime_ms']:.1f} ms, "
        f"predicted {predicted}\n  {phases}"
    )


def _show(state: Path, name: str, ended: threading.Event) -> None:
    shown = ""
    while not ended.wait(_SHOW_SECONDS):
        try:
            found = control.ask(state, name, "status", 1.0).get("cutover")
        except FuseDiskError:
            continue
        text = cutover_text(found) if found else "waiting until the replica follows"
        if text != shown and not ended.is_set():
            shown = text
            click.echo(text, err=True)
