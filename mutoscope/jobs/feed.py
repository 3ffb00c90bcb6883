"""The log of what happens to jobs, for those who watch: numbered rows, replayed from any number on.

Types: "state" (a transition), "progress" (stage, step, fraction, expected end), "preview" (a picture as data URI).

A reader that has seen a number never gets a smaller one later. On SQLite that is so by itself, as there is one writer
at a time. PostgreSQL gives out numbers when rows are written and shows rows when they are committed, so a smaller one
may show up after a larger one. There writers share a lock until they commit, and a reader that finds a number missing
waits until nobody holds it: then what is missing stays missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import Job
from mutoscope.jobs.schema import job_events

_LOCK = 74206


@dataclass(frozen=True, kw_only=True)
class FeedEvent:
    """One row; `id` is what SSE calls the event id."""

    id: int
    job_id: str
    account_id: str
    at: float
    type: str
    data: dict[str, Any]


def write(tx: Tx, job: Job, type_: str, data: Mapping[str, Any]) -> None:
    """Add an event."""
    write_many(tx, [(job, type_, data)])


def write_many(tx: Tx, events: Iterable[tuple[Job, str, Mapping[str, Any]]]) -> None:
    """Add events, in this order."""
    rows = [
        {"job_id": job.id, "account_id": job.account_id, "at": tx.now, "type": type_, "data": dict(data)}
        for job, type_, data in events
    ]
    if not tx.is_sqlite:
        tx.scalar(sa.select(sa.func.pg_advisory_xact_lock_shared(_LOCK)))
    tx.conn.execute(sa.insert(job_events), rows)


def after(
    tx: Tx, event_id: int, *, job_id: str | None = None, account_id: str | None = None, limit: int = 500
) -> list[FeedEvent]:
    """Events with a number above `event_id`, oldest first. Nothing is skipped: see above."""
    query = sa.select(job_events).where(job_events.c.id > event_id).order_by(job_events.c.id).limit(limit)
    if job_id is not None:  # the job's own row keeps its events in order
        return _read(tx, query.where(job_events.c.job_id == job_id))
    if account_id is not None:
        _settle(tx)
        return _read(tx, query.where(job_events.c.account_id == account_id))
    found = _read(tx, query)
    if found and not tx.is_sqlite and found[-1].id - event_id != len(found):
        _settle(tx)
        found = _read(tx, query)
    return found


def last_id(tx: Tx) -> int:
    """The highest number so far, 0 at the beginning."""
    _settle(tx)
    return int(tx.scalar(sa.select(sa.func.max(job_events.c.id))) or 0)


def prune(tx: Tx, *, before: float, limit: int = 10_000) -> int:
    """Forget what was written before a moment, at most `limit` events at once. Returns how many."""
    first = tx.scalar(sa.select(sa.func.min(job_events.c.id)))
    old = sa.select(job_events.c.id).where(job_events.c.id < (first or 0) + limit, job_events.c.at < before)
    return tx.run(sa.delete(job_events).where(job_events.c.id.in_(old)))


def drop_previews(tx: Tx, job_id: str) -> None:
    """A job has ended: its previews have served, but for the last one."""
    previews = (job_events.c.job_id == job_id, job_events.c.type == "preview")
    newest = sa.select(sa.func.max(job_events.c.id)).where(*previews).scalar_subquery()
    tx.run(sa.delete(job_events).where(*previews, job_events.c.id < newest))


def _read(tx: Tx, query: sa.Select[Any]) -> list[FeedEvent]:
    return [FeedEvent(**row._mapping) for row in tx.all(query)]


def _settle(tx: Tx) -> None:
    """Wait until those who write now have committed."""
    if not tx.is_sqlite:
        tx.scalar(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
