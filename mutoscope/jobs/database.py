"""The database: SQLite (WAL) or PostgreSQL, one transaction at a time, with the clock in hand.

    with db.write() as tx:          # one transaction; on SQLite it holds the only write lock
        job = service.submit(tx, caller, spec)

Every function of the domain takes a `Tx` and asks it for the time, so that tests own the clock and several changes
share one transaction: a job, its credits and its webhooks are written together or not at all.

SQLite: WAL, `synchronous=FULL` (a committed job survives a power cut), writes begin with BEGIN IMMEDIATE so that they
queue instead of failing half-way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row
from sqlalchemy.pool import NullPool

BUSY_TIMEOUT_S = 30


@dataclass(frozen=True)
class Tx:
    """A connection in a transaction, and the time that counts in it (unix seconds)."""

    conn: Connection
    now: float

    def all(self, statement: sa.Executable, **values: Any) -> Sequence[Row[*tuple[Any, ...]]]:
        return self.conn.execute(statement, values).all()

    def first(self, statement: sa.Executable, **values: Any) -> Row[*tuple[Any, ...]] | None:
        return self.conn.execute(statement, values).first()

    def scalar(self, statement: sa.Executable, **values: Any) -> Any:
        return self.conn.execute(statement, values).scalar()

    def run(self, statement: sa.Executable, **values: Any) -> int:
        """Rows that an UPDATE or DELETE changed. Of an INSERT not every driver tells: ask with RETURNING."""
        return int(self.conn.execute(statement, values).rowcount)

    @property
    def is_sqlite(self) -> bool:
        return self.conn.dialect.name == "sqlite"


class Database:
    """Opens nothing until the first transaction. Safe to share between threads, not between processes."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self.url = url
        self.clock = clock
        self.is_sqlite = url.startswith("sqlite")
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT_S}} if self.is_sqlite else {}
        if not self.is_sqlite:
            options = {"pool_size": 10, "max_overflow": 20, "pool_pre_ping": True}
        elif ":memory:" in url:
            options["poolclass"] = (
                NullPool  # refused below; a memory database would vanish with its connection
            )
            raise ValueError("a database in memory would lose jobs; give a file")
        self.engine: Engine = sa.create_engine(url, **options)
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)

    @contextmanager
    def write(self) -> Iterator[Tx]:
        """A transaction that may change things; committed at the end of the block, rolled back on an exception."""
        with self.engine.connect() as conn:
            if self.is_sqlite:
                conn.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                conn.begin()
            try:
                yield Tx(conn, self.clock())
            except BaseException:
                conn.rollback()
                raise
            conn.commit()

    @contextmanager
    def read(self) -> Iterator[Tx]:
        """One consistent look; changes are rolled back."""
        with self.engine.connect() as conn:
            if self.is_sqlite:
                conn.exec_driver_sql("BEGIN")
            try:
                yield Tx(conn, self.clock())
            finally:
                conn.rollback()

    def close(self) -> None:
        self.engine.dispose()


def _prepare_sqlite(raw: Any, _record: Any) -> None:
    raw.isolation_level = None  # the driver begins no transactions of its own
    cursor = raw.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
