"""Batches: many jobs with one id, one price, one progress and one end. `batching.py` makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import outbox
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.model import TERMINAL, WAITING, State
from mutoscope.jobs.schema import batches, jobs

PRICED, RUNNING, FINISHED, CANCELLED = "priced", "running", "finished", "cancelled"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One row of `batches`, with how far its jobs are."""

    id: str
    account_id: str
    name: str
    state: str
    priority: str
    total: int
    estimate: dict[str, Any]
    metadata: dict[str, Any]
    created_at: float
    confirmed_at: float | None
    finished_at: float | None
    counts: dict[State, int]
    progress: float
    credits: int  # captured so far


def get(tx: Tx, account_id: str, batch_id: str) -> Batch:
    """One batch.

    Raises:
        NotFound: the account has none of this id.
    """
    row = tx.first(sa.select(batches).where(batches.c.id == batch_id, batches.c.account_id == account_id))
    if row is None:
        raise NotFound(f"No batch {batch_id!r}.")
    return _batch(tx, row)


def listing(tx: Tx, account_id: str, *, limit: int = 20, offset: int = 0) -> list[Batch]:
    """Batches of an account, newest first."""
    query = sa.select(batches).where(batches.c.account_id == account_id)
    rows = tx.all(query.order_by(batches.c.created_at.desc(), batches.c.id).limit(limit).offset(offset))
    return [_batch(tx, row) for row in rows]


def job_ids(tx: Tx, batch_id: str) -> Iterator[str]:
    """Ids of a batch's jobs in the order in which they were given."""
    for row in tx.all(sa.select(jobs.c.id).where(jobs.c.batch_id == batch_id).order_by(jobs.c.batch_index)):
        yield row.id


def on_end(tx: Tx, batch_id: str) -> None:
    """A job of the batch has ended: if it was the last one, and all were made, so has the batch."""
    whole = sa.or_(batches.c.made == batches.c.total, batches.c.state == CANCELLED)
    left = (jobs.c.batch_id == batch_id, jobs.c.state.not_in(list(TERMINAL)))
    last_first = jobs.c.batch_index.desc()  # they end in about their order, so what is left is found at once
    if tx.first(sa.select(jobs.c.id).where(*left).order_by(last_first).limit(1)) is not None:
        return
    end = sa.update(batches).where(batches.c.id == batch_id, batches.c.finished_at.is_(None), whole)
    state = sa.case((batches.c.state == RUNNING, FINISHED), else_=batches.c.state)
    row = tx.first(end.values(state=state, finished_at=tx.now).returning(*batches.c))
    if row is not None:
        shown = public(_batch(tx, row))
        outbox.enqueue_batch(tx, row.account_id, shown, webhook_url=row.webhook_url)


def public(batch: Batch) -> dict[str, Any]:
    """The JSON of a batch."""
    from mutoscope.jobs.view import iso

    return {
        "id": batch.id,
        "object": "batch",
        "name": batch.name,
        "state": batch.state,
        "priority": batch.priority,
        "total": batch.total,
        "counts": {state.value: n for state, n in batch.counts.items()},
        "progress": round(batch.progress, 4),
        "estimate": batch.estimate,
        "credits": batch.credits,
        "metadata": batch.metadata,
        "created_at": iso(batch.created_at),
        "confirmed_at": iso(batch.confirmed_at),
        "finished_at": iso(batch.finished_at),
    }


def _batch(tx: Tx, row: Row[Any]) -> Batch:
    mine = sa.select(
        jobs.c.state, sa.func.count(), sa.func.sum(jobs.c.progress), sa.func.sum(jobs.c.cost_captured)
    )
    counts: dict[State, int] = dict.fromkeys(State, 0)
    done, credits = 0.0, 0
    for state, n, progress, captured in tx.all(mine.where(jobs.c.batch_id == row.id).group_by(jobs.c.state)):
        counts[State(state)] = int(n)
        done += float(n) if State(state) in TERMINAL else float(progress or 0.0)
        credits += int(captured or 0)
    if row.state == CANCELLED:  # what still waits has not long to wait
        for state in WAITING:
            done += counts[state]
            counts[State.CANCELLED] += counts[state]
            counts[state] = 0
    if row.confirmed_at is not None:  # those to come wait too, until somebody does not want them any more
        counts[State.QUEUED if row.state == RUNNING else State.CANCELLED] += row.total - row.made
        done += 0 if row.state == RUNNING else row.total - row.made
    names = ("id", "account_id", "name", "state", "priority", "total", "estimate", "metadata", "created_at",
             "confirmed_at", "finished_at")  # fmt: skip
    values = {name: row._mapping[name] for name in names}
    return Batch(**values, counts=counts, progress=done / max(1, row.total), credits=credits)
