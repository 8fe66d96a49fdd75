"""PostgreSQL with its data on one file system and its log on another, and a client by psql."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import unavailable
from database_points import WINDOW, Row
from test_filesystems import run

USER = "postgres"
# Checkpoints and writeback all the time: else the data disk would be at rest at most points.
SETTINGS = """
listen_addresses = ''
fsync = on
synchronous_commit = on
full_page_writes = on
shared_buffers = 1MB
min_wal_size = 2MB
max_wal_size = 4MB
bgwriter_delay = 10ms
max_connections = 10
max_worker_processes = 0
max_parallel_workers = 0
autovacuum_naptime = 2s
"""
TABLES = """
create extension amcheck;
create table rows (number bigint primary key, payload bytea, checksum text);
alter table rows alter payload set storage external;
create index checksums on rows (checksum);
create table summary (newest bigint, chain text);
insert into summary values (0, '');
"""


def programs() -> Path:
    """Where PostgreSQL's own programs are; Debian keeps them out of PATH."""
    if os.geteuid() != 0:
        unavailable("only root becomes the user that PostgreSQL wants to run as")
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[4])
    )
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        unavailable("PostgreSQL is not installed: apt-get install postgresql, as scripts/test does")
    return found[-1].parent if found else Path(str(on_path)).parent


class Postgres:
    """A server whose data are in ``base/0`` and whose log is in ``base/1``."""

    def __init__(self, base: Path) -> None:
        self._programs, self.base = programs(), base
        self.data = base / "0/data"
        self.log = base / "server.log"
        shutil.chown(base, USER)

    def _command(self, program: str, *arguments: str | Path) -> list[str]:
        return ["runuser", "-u", USER, "--", str(self._programs / program), *map(str, arguments)]

    def create(self) -> None:
        """Make the cluster, with data checksums; it finds its log by a relative path."""
        for number in range(2):
            shutil.chown(self.base / str(number), USER)
        options = ["--data-checksums", "--wal-segsize=1", "--auth=trust", "--no-locale", "-EUTF8"]
        log = self.base / "1/pg_wal"
        run(*self._command("initdb", "-D", self.data, "-X", log, *options))
        link = self.data / "pg_wal"
        link.unlink()
        link.symlink_to("../../1/pg_wal")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(SETTINGS)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start it, which recovers what has to be, and stop it."""
        # The host of the point is gone, and its process number means another process here.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        control = self._command("pg_ctl", "-D", self.data, "-w", "-t", "60")
        # Into a file: the server would hold on to a pipe.
        options = f"-c unix_socket_directories={self.base}"
        started = [*control, "-s", "-l", str(self.log), "-o", options, "start"]
        assert subprocess.run(started, check=False).returncode == 0, self.log.read_text()
        try:
            yield
        finally:
            run(*control, "-s", "-m", "fast", "stop")

    def client(self, *options: str) -> list[str]:
        where = ("-h", self.base, "-d", "postgres")
        return self._command("psql", "-qAtX", "-v", "ON_ERROR_STOP=1", *where, *options)

    def ask(self, query: str) -> list[list[str]]:
        return [line.split("|") for line in run(*self.client("-c", query)).splitlines()]

    def check_indexes(self) -> None:
        run(*self._command("pg_amcheck", "-h", self.base, "--heapallindexed", "postgres"))

    def check_checksums(self) -> None:
        """Of every block; wants the server stopped in order."""
        said = run(*self._command("pg_checksums", "--check", "-D", self.data))
        assert "Bad checksums:  0" in said and "Data checksum version: 1" in said, said


class Session:
    """One connection; a commit returns when the server acknowledged it."""

    def __init__(self, server: Postgres) -> None:
        self._psql = subprocess.Popen(
            server.client(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def commit(self, row: Row) -> None:
        assert self._psql.stdin is not None and self._psql.stdout is not None
        self._psql.stdin.write(
            "begin;\n"
            f"insert into rows values ({row.number}, '\\x{row.payload.hex()}', '{row.checksum}');\n"
            f"delete from rows where number <= {row.number - WINDOW};\n"
            f"update summary set newest = {row.number}, chain = '{row.chain}';\n"
            f"commit;\n\\echo committed {row.number}\n"
        )
        self._psql.stdin.flush()
        assert self._psql.stdout.readline() == f"committed {row.number}\n"

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._psql.communicate(timeout=60)
