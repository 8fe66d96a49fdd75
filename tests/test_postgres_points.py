"""PostgreSQL with its log on another disk: at every recovery point both disks are of one instant.

A log older than the data, or data older than the checkpoint in the log, would not recover, or would
lack what its client had been told. But between two checkpoints the log alone makes right whatever
instant the data are of. So the client notes each row beside the data before it commits it.
FUSEDISK_DATABASE_POINTS counts here by half (default 4 points).
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount
from database_points import (
    POINTS,
    Client,
    Ledger,
    Row,
    check_points,
    filesystems,
    recovered,
    replicate_under_load,
)
from postgres import TABLES, Postgres, Session, programs

from replicator.manifest import Point

RECOVERED = "database system was not properly shut down; automatic recovery in progress"


def note(base: Path, number: int) -> None:
    """Durably, on the disk of the data."""
    fd = os.open(base / "0/noted", os.O_CREAT | os.O_WRONLY | os.O_DSYNC)
    try:
        os.pwrite(fd, b"%20d" % number, 0)
    finally:
        os.close(fd)


@pytest.mark.long
def test_every_point_is_a_state_of_both_disks(tmp_path: Path, fuse: Callable[..., Mount]) -> None:
    programs()
    mount = fuse(tmp_path / "0data.img", tmp_path / "1log.img")
    mount.mount("--create", "160MiB")
    ledger = Ledger(mount, seed=22)
    with filesystems([mount.disk(0), mount.disk(1)], make=True) as (base, _):
        server = Postgres(base)
        server.create()
        with server.running():
            server.ask(TABLES)
            session = Session(server)
            note(base, 0)

            def commit(row: Row) -> None:
                note(base, row.number)
                session.commit(row)

            client = Client(ledger, commit)
            try:
                replica = replicate_under_load(mount, client, tmp_path, max(2, POINTS // 2))
            finally:
                client.end()
                session.close()
    client.check()

    def check(disks: list[Path], point: Point) -> int:
        with recovered(disks) as base:
            noted = int((base / "0/noted").read_text())
            restored = Postgres(base)
            with restored.running():
                assert RECOVERED in restored.log.read_text()
                found = restored.ask(
                    "select number, encode(payload, 'hex'), checksum from rows order by number"
                )
                ((newest, chain),) = restored.ask("select newest, chain from summary")
                restored.check_indexes()
            restored.check_checksums()
        rows = [(int(number), bytes.fromhex(data), own) for number, data, own in found]
        assert int(newest) <= noted <= int(newest) + 1, (
            f"{noted} on one disk, {newest} on the other"
        )
        return ledger.check(point.epoch, rows, (int(newest), chain))

    check_points(replica, tmp_path, check, "PostgreSQL")
