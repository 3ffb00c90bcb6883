"""Alembic migrations, run from the package: `upgrade` brings any database, new or old, to the newest schema."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from mutoscope.errors import FileError
from mutoscope.jobs.database import Database


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return made


def newest() -> str:
    """The revision that this version of the code needs."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    assert head is not None
    return head


def current(db: Database) -> str | None:
    """The revision that the database is at; None if it is empty."""
    with db.engine.connect() as conn:
        return MigrationContext.configure(conn).get_current_revision()


def upgrade(db: Database) -> None:
    """Make or change the tables, in one transaction. Two processes that start at once wait for each other.

    Raises:
        FileError: the database was made by a newer version.
    """
    at = current(db)
    if at == newest():
        return
    known = {revision.revision for revision in ScriptDirectory.from_config(config()).walk_revisions()}
    if at is not None and at not in known:
        raise FileError(
            f"The database is at revision {at}, which this version does not know.",
            hint="It was made by a newer Mutoscope; install that, or use another data folder.",
        )
    with db.write() as tx:
        if not tx.is_sqlite:
            tx.conn.exec_driver_sql("SELECT pg_advisory_xact_lock(74205)")
        settings = config()
        settings.attributes["connection"] = tx.conn
        command.upgrade(settings, "head")
