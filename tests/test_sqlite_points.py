"""SQLite under load: each recovery point is the database as its client had been told by then.

FUSEDISK_DATABASE_POINTS is how many points are made and checked (default 8).
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

from conftest import Mount
from database_points import (
    POINTS,
    WINDOW,
    Client,
    Ledger,
    Row,
    check_points,
    filesystems,
    recovered,
    replicate_under_load,
)

from replicator.manifest import Point


def connect(path: Path) -> sqlite3.Connection:
    """Every commit is in the log, and on the disk, before it is acknowledged."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    database.execute("PRAGMA synchronous=FULL")
    # Often, so that the database itself is in the midst of being written at many points.
    database.execute("PRAGMA wal_autocheckpoint=100")
    return database


def create(path: Path) -> sqlite3.Connection:
    database = connect(path)
    database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, payload BLOB, checksum TEXT)")
    database.execute("CREATE INDEX checksums ON rows (checksum)")
    database.execute("CREATE TABLE summary (newest INTEGER, chain TEXT)")
    database.execute("INSERT INTO summary VALUES (0, '')")
    return database


def commit(database: sqlite3.Connection, row: Row) -> None:
    database.execute("BEGIN")
    database.execute("INSERT INTO rows VALUES (?, ?, ?)", (row.number, row.payload, row.checksum))
    database.execute("DELETE FROM rows WHERE number <= ?", (row.number - WINDOW,))
    database.execute("UPDATE summary SET newest = ?, chain = ?", (row.number, row.chain))
    database.execute("COMMIT")


def test_every_point_is_a_state_of_the_database(tmp_path: Path, fuse: Callable[..., Mount]) -> None:
    mount = fuse(tmp_path / "disk.img")
    mount.mount("--create", "64MiB")
    ledger = Ledger(mount, seed=21)
    with filesystems([mount.disk()], make=True) as (base, _):
        database = create(base / "0/rows.sqlite")
        client = Client(ledger, lambda row: commit(database, row))
        try:
            replica = replicate_under_load(mount, client, tmp_path, POINTS)
        finally:
            client.end()
            database.close()
    client.check()

    def check(disks: list[Path], point: Point) -> int:
        with recovered(disks) as base:
            restored = connect(base / "0/rows.sqlite")
            try:
                assert restored.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                rows = restored.execute("SELECT * FROM rows ORDER BY number").fetchall()
                summary = restored.execute("SELECT newest, chain FROM summary").fetchone()
            finally:
                restored.close()
        return ledger.check(point.epoch, rows, summary)

    check_points(replica, tmp_path, check, "SQLite")
