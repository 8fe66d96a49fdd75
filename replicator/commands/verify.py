"""``replicator verify``."""

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import click
import msgspec
import trio

from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.mounting import find_state
from fusedisk.replicas import Sent, read_record
from fusedisk.units import parse_size
from replicator import control
from replicator.address import parse_address
from replicator.link import Link, LinkLost
from replicator.messages import RemoteProtocolError
from replicator.options import sender_options
from replicator.progress import Progress
from replicator.running import run_trio
from replicator.sender import Session
from replicator.senderlock import lock_replica
from replicator.source import Source
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings
from replicator.verify import EXIT_DIFFERS, Findings, VerifyOptions, verify_directly


@click.command()
@click.option("--name")
@click.option("--bandwidth", metavar="RATE", help="Bytes of data to compare each second.")
@click.option("--repair", is_flag=True, help="Send again what differs, and compare it once more.")
@click.option("--json", "as_json", is_flag=True)
@sender_options
@click.argument("mountpoint", type=Path)
def command(
    mountpoint: Path,
    name: str | None,
    bandwidth: str | None,
    repair: bool,
    as_json: bool,
    settings: Settings,
) -> None:
    """Compare the last committed epoch of a replica with the disks, by hash."""
    rate = None if bandwidth is None else parse_size(bandwidth)
    if rate == 0:
        raise UsageError("--bandwidth must be more than nothing")
    options = VerifyOptions(rate, repair)
    state = find_state(mountpoint)
    name = control.choose(state, name)
    try:
        lock = lock_replica(state, name)
    except FuseDiskError:
        # Who holds the replica's lock has the link to the target.
        found = _ask_sender(state, name, options)
    else:
        try:
            if repair:
                raise FuseDiskError(
                    f"replica {name} has no running sender to repair it; start one, then verify"
                )
            found = _verify_here(mountpoint, name, options, settings).report()
        finally:
            os.close(lock)
    click.echo(json.dumps(found) if as_json else _describe(found))
    if found["outcome"] == "differs":
        sys.exit(EXIT_DIFFERS)


def _ask_sender(state: Path, name: str, options: VerifyOptions) -> dict[str, Any]:
    request = f"verify {msgspec.json.encode(options).decode()}"
    try:
        # However large the disks are: the sender answers, or ends and closes the connection.
        found = control.ask(state, name, request, None)
    except FuseDiskError:
        raise FuseDiskError(
            f"the sender of replica {name} ended before it answered; verify again"
        ) from None
    if "error" in found:
        raise FuseDiskError(found["error"])
    if "outcome" not in found:
        raise FuseDiskError(f"the sender of replica {name} cannot verify; start it again")
    return found


def _verify_here(
    mountpoint: Path, name: str, options: VerifyOptions, settings: Settings
) -> Findings:
    source = Source(mountpoint)
    record = read_record(source.state, name)
    if record is None:
        raise FuseDiskError(f"replica {name} has nothing committed yet; start its sender")
    address = parse_address(record.address)
    found: list[Findings] = []

    async def run() -> None:
        try:
            async with connected(address, settings) as stream:
                session = Session(
                    *(source, Link(stream, "sender"), name, str(uuid.uuid4())), Progress(), Sent()
                )
                try:
                    found.append(await verify_directly(session, source, name, options))
                finally:
                    await session.goodbye()
        except (LinkLost, OSError, trio.TooSlowError, RemoteProtocolError) as error:
            raise FuseDiskError(
                f"cannot compare with the receiver at {address} ({error or 'no answer'}); "
                "see that it runs, then verify again"
            ) from None

    try:
        run_trio(run)
    finally:
        source.close()
    return found[0]


def _describe(found: dict[str, Any]) -> str:
    counted = (
        f"{found['compared_bytes']} bytes compared, {found['left_out_bytes']} left out because "
        f"they changed since epoch {found['epoch']}"
    )
    if found["outcome"] == "equal":
        return f"equal: {counted}"
    if found["outcome"] == "repaired":
        return f"repaired: {found['repaired_bytes']} bytes differed and were sent again; {counted}"
    lines = [f"differs: {found['differing_bytes']} bytes in the ranges below; {counted}"]
    lines += [f"{r['disk']} offset {r['offset']} length {r['length']}" for r in found["differing"]]
    if more := found["differing_ranges"] - len(found["differing"]):
        lines.append(f"and {more} more ranges")
    return "\n".join(lines)
