"""Settling who is the disk: by asking the target, or by hand if one side is gone for good.

What somebody who knows says always counts more than what is assumed: an assumption is taken only
where the target gives no answer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import click
import trio

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord
from fusedisk.replicas import read_record, replica_names
from replicator.address import parse_address
from replicator.handover import OutcomeUnknown, resolve_with_token, settle, settling
from replicator.link import Link, LinkLost, Refused
from replicator.messages import RemoteProtocolError
from replicator.migration import conclude
from replicator.running import run_trio
from replicator.source import Source
from replicator.store import Store
from replicator.taking import existing_manifest, take
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings

Side = Literal["source", "target"]
_NO_ANSWER = (
    *(LinkLost, Refused, RemoteProtocolError, OSError),
    *(trio.TooSlowError, trio.BrokenResourceError),
)


def resolve_at_source(
    mountpoint: Path, name: str | None, assume: Side | None, settings: Settings, qmp: Path | None
) -> None:
    """Settle at the source, and say how; with a monitor its guest goes on where the disk is.

    Raises FuseDiskError, OutcomeUnknown.
    """
    source = Source(mountpoint)
    images = [Path(disk.path) for disk in source.record.disks]
    with settling(source) as record:
        if record is None:
            _look_for_promotion(source, images, name, assume, settings)
        else:
            _settle_cutover(source, images, record, name, assume, settings)
        if not source.mounted:
            # Invariant: a mount publishes its control file before it looks for a record. So one
            # that took the place of ours has seen what is settled now, or is found here.
            raise FuseDiskError(
                f"{mountpoint} was unmounted meanwhile; if it is mounted again, run this once more"
            )
        if qmp is not None:
            # Invariant: with the lease still held no cutover promotes what is the disk here.
            asyncio.run(conclude(qmp, images))


def _settle_cutover(
    source: Source,
    images: list[Path],
    record: FenceRecord,
    name: str | None,
    assume: Side | None,
    settings: Settings,
) -> None:
    if name is not None and record.replica != name:
        raise FuseDiskError(f"the cutover on record is of replica {record.replica}, not of {name}")
    if record.state == "fenced" and assume != "source":
        click.echo(f"nothing to resolve: {record.replica} at {record.address} is the disk")
        return
    answer = _ask(source, record, settings)
    if isinstance(answer, tuple):
        outcome, token = answer
        if outcome == "promoted" and assume == "source":
            # Known is known, also for the record, if it was not yet.
            settle(source, images, _with_token(record, token), outcome)
            raise FuseDiskError(
                f"{record.address} answers that replica {record.replica} is promoted: it is the "
                "disk, and the source stays fenced. To go home, adopt these images and cut over"
            )
        if outcome == "rolled-back" and assume == "target":
            settle(source, images, record, outcome)
            raise FuseDiskError(
                f"{record.address} answers that replica {record.replica} is not promoted: the "
                "source goes on. To make the replica the disk, cut over"
            )
    elif assume is None:
        raise OutcomeUnknown(
            f"the target cannot be asked ({answer}); try again, or see --assume if it is gone "
            "for good"
        )
    else:
        outcome, token = ("promoted" if assume == "target" else "rolled-back"), record.token
    settle(source, images, _with_token(record, token), outcome)
    click.echo(outcome)


def _with_token(record: FenceRecord, token: str) -> FenceRecord:
    return FenceRecord(token, record.state, record.replica, record.address, record.epoch)


def _look_for_promotion(
    source: Source, images: list[Path], name: str | None, assume: Side | None, settings: Settings
) -> None:
    """Without a cutover on record, a replica may have been promoted at the target alone."""
    unheard = False
    names = [n for n in replica_names(source.state) if name is None or n == name]
    if name is not None and not names:
        raise FuseDiskError(f"this mount has no replica {name}")
    for each in names:
        noted = read_record(source.state, each)
        if noted is None:
            continue
        asked = FenceRecord("", "fenced", each, noted.address, noted.epoch or 0)
        answer = _ask(source, asked, settings)
        if isinstance(answer, tuple):
            outcome, token = answer
        else:
            click.echo(f"replicator: {each} cannot be asked ({answer})", err=True)
            unheard = True
            outcome, token = "unheard", f"assumed for {each}"
            if assume == "target" and (name is not None or len(names) == 1):
                outcome = "promoted"
        if outcome == "promoted":
            settle(source, images, _with_token(asked, token), outcome)
            click.echo(outcome)
            return
    said = ", as far as could be asked" if unheard and assume is None else ""
    click.echo(f"nothing to resolve: the source is the disk{said}")


def _ask(source: Source, record: FenceRecord, settings: Settings) -> tuple[str, str] | str:
    """(outcome, token of the promotion) from the target, or why it gave no answer."""
    answer: list[tuple[str, str] | str] = []

    async def run() -> None:
        try:
            async with connected(parse_address(record.address), settings) as stream:
                link = Link(stream, "sender")
                answer.append(await resolve_with_token(link, record, source.record.source_id))
        except _NO_ANSWER as error:
            answer.append(str(error) or "it does not answer")

    run_trio(run)
    return answer[0]


def resolve_at_target(store: Store, name: str, assume: Side | None) -> str:
    """What the target knows; with `assume` source it will never promote for a cutover begun so far.

    Raises FuseDiskError where that cannot be.
    """
    if assume == "source":
        # A sender asks for a promotion only in the session that holds the replica, under a token
        # made for it: whoever has the lock knows that none is on its way.
        with take(store, name, force=False) as replica:
            manifest = replica.manifest
            if manifest.state == "promoted":
                raise FuseDiskError(
                    f"replica {name!r} is promoted and may have been written since: it is the "
                    "disk. To make it a replica again, cut over from a mount of it"
                )
        return "rolled-back"
    manifest = existing_manifest(store, name)
    if manifest.state == "promoted":
        return f"promoted: {name} is the disk"
    return (
        f"not promoted: {name} is {manifest.state} at epoch {manifest.epoch}; settle at the "
        "source, or by --assume if that is gone for good"
    )
