"""Shared by the tests of the service: databases of both kinds with a clock that stands still, accounts and jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mutoscope.jobs.database import Database
from mutoscope.media import sandbox
from tests.service.databases import Clock, Postgres, Sqlite
from tests.service.making import make_account


@pytest.fixture(scope="session", autouse=True)
def no_helper_is_left() -> Iterator[None]:
    """The sandbox keeps a helper process; the last test is when it may go."""
    yield
    sandbox.close()


@pytest.fixture(scope="session")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Sqlite:
    return Sqlite(tmp_path_factory.mktemp("sqlite"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sqlite_db(sqlite: Sqlite, tmp_path: Path, clock: Clock) -> Iterator[Database]:
    """For tests that would learn nothing from the other database."""
    db = sqlite.make(tmp_path, clock)
    yield db
    db.close()


@pytest.fixture
def postgres_db(postgres: Postgres, clock: Clock) -> Iterator[Database]:
    db = postgres.make(clock)
    yield db
    db.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest) -> Database:
    """An empty database with all tables: the test runs once on SQLite and once on PostgreSQL."""
    made = request.getfixturevalue("sqlite_db" if request.param == "sqlite" else "postgres_db")
    assert isinstance(made, Database)
    return made


@pytest.fixture
def account(db: Database) -> str:
    """The id of an account with 1,000 credits on the unlimited plan."""
    with db.write() as tx:
        return make_account(tx, "acct")
