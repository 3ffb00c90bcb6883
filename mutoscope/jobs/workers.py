"""The workers that there are: one row each, kept by the worker itself, read by the router and by people."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import State
from mutoscope.jobs.scheduling import RUNNING
from mutoscope.jobs.schema import jobs, workers

KEEP_GONE_S = 24 * 3600.0
"""Rows of workers that ended are kept that long."""


@dataclass(frozen=True, kw_only=True)
class WorkerRow:
    """One row of `workers`; times in unix seconds."""

    id: str
    device: str
    host: str
    pid: int
    state: str  # "starting", "idle", "busy", "draining", "gone"
    model: str
    job_id: str | None
    switches: int
    started_at: float
    beat_at: float


def register(tx: Tx, *, worker_id: str, device: str, host: str, pid: int) -> None:
    """A worker begins. Rows of workers that are long gone are removed."""
    tx.run(sa.delete(workers).where(workers.c.beat_at < tx.now - KEEP_GONE_S))
    tx.run(
        sa.insert(workers).values(
            id=worker_id, device=device, host=host, pid=pid, state="starting", model="", job_id=None,
            switches=0, started_at=tx.now, beat_at=tx.now,
        )
    )  # fmt: skip


def update(tx: Tx, worker_id: str, *, state: str, model: str, job_id: str | None, switches: int) -> None:
    """What the worker does now; also a sign of life. A worker that was declared gone and lives shows up again."""
    values = {"state": state, "model": model, "job_id": job_id, "switches": switches, "beat_at": tx.now}
    tx.run(sa.update(workers).where(workers.c.id == worker_id).values(values))


def gone(tx: Tx, worker_id: str) -> None:
    """The worker's process has ended."""
    row = sa.update(workers).where(workers.c.id == worker_id)
    tx.run(row.values(state="gone", job_id=None, model=""))


def record(tx: Tx, worker_id: str) -> tuple[bool, bool]:
    """Of a worker that has died, before its job is given back: had it come up, and has it made a job?"""
    row = tx.first(sa.select(workers.c.state, workers.c.started_at).where(workers.c.id == worker_id))
    if row is None:
        return False, False
    mine = sa.select(jobs.c.seq).where(jobs.c.worker_id == worker_id).limit(1)
    running = mine.where(RUNNING)  # it may die over its first job before it has told that it is busy
    made = mine.where(jobs.c.finished_at >= row.started_at, jobs.c.state == State.SUCCEEDED)
    return row.state != "starting" or tx.first(running) is not None, tx.first(made) is not None


def listing(tx: Tx, *, alive: bool = True) -> list[WorkerRow]:
    """All workers, oldest first; `alive` leaves out those that ended."""
    query = sa.select(workers).order_by(workers.c.started_at, workers.c.id)
    if alive:
        query = query.where(workers.c.state != "gone")
    return [WorkerRow(**row._mapping) for row in tx.all(query)]
