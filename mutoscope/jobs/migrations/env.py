"""Run by Alembic: the migrations take the connection that `upgrade` opened."""

from __future__ import annotations

from alembic import context

from mutoscope.jobs.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
context.run_migrations()
