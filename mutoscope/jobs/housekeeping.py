"""What has to happen without being asked. Call `sweep` every few seconds, from any number of processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mutoscope.jobs import accounts, assets, eta, feed, idempotency, outbox, queue, router
from mutoscope.jobs.blobs import Blobs
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.model import TERMINAL, State
from mutoscope.jobs.schema import jobs, settings_kept
from mutoscope.settings import Settings

DAY_S = 24 * 3600.0
AT_ONCE = 200


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep did."""

    lost: int = 0  # leases that had run out
    emptied: int = 0  # jobs whose files were deleted
    forgotten: int = 0  # rows that nobody needs any more


def sweep(db: Database, settings: Settings) -> Swept:
    """Leases that ran out, files that are too old or whose job was deleted, rows that nobody needs any more."""
    lost = _rescue(db, settings)
    with db.read() as tx:
        now = tx.now
    old = now - settings.retention_days * DAY_S
    emptied = _empty(db, settings, "swept_finished", jobs.c.finished_at, old)
    emptied += _empty(db, settings, "swept_deleted", jobs.c.deleted_at, now)
    with db.write() as tx:
        n = idempotency.prune(tx, now - settings.idempotency_hours * 3600)
        n += feed.prune(tx, before=old)
        n += outbox.prune(tx, old)
        n += router.prune(tx, old)
        n += assets.expire(tx, data_dir=settings.data_dir)
        n += eta.prune(tx)
        accounts.renew_due(tx)
    return Swept(lost=lost, emptied=emptied, forgotten=n)


def sweep_leftovers(db: Database, settings: Settings) -> int:
    """Delete what killed workers left: inputs of leases that are over, and of ended jobs what is no output.
    Returns how many folders. Looks at every job's folder, so call it seldom.

    Folders of jobs that the database does not know are not ours to judge, and stay.
    """
    scratch = [(path, *path.name.rpartition("-")[::2]) for path in _folders(settings.data_dir / "work")]
    outputs = [(path, path.name) for path in _folders(settings.data_dir / "outputs")]
    known = _known(db, {job_id for _, job_id, _ in scratch} | {job_id for _, job_id in outputs})
    gone = []
    for path, job_id, fence in scratch:
        job = known.get(job_id)
        if job is not None and (job.state != State.RUNNING or str(job.fence) != fence):
            gone.append(path)
    for path, job_id in outputs:
        job = known.get(job_id)
        if job is not None and State(job.state) in TERMINAL:
            kept = {PurePosixPath(output["path"]).parts[2] for output in job.outputs}
            gone += [part for part in _folders(path) if part.name not in kept] if kept else [path]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return len(gone)


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


def _known(db: Database, ids: Iterable[str]) -> dict[str, Any]:
    """State, fence and outputs of jobs."""
    wanted = sorted(ids)
    found: dict[str, Any] = {}
    with db.read() as tx:
        for start in range(0, len(wanted), 500):
            part = jobs.c.id.in_(wanted[start : start + 500])
            query = sa.select(jobs.c.id, jobs.c.state, jobs.c.fence, jobs.c.outputs).where(part)
            found |= {row.id: row for row in tx.all(query)}
    return found


def _rescue(db: Database, settings: Settings) -> int:
    """One transaction for each job: a job that cannot be moved does not keep the others."""
    with db.read() as tx:
        late = queue.expired(tx)
    lost = 0
    for job in late:
        with db.write() as tx:
            if queue.is_expired(tx, job):  # it may have been heard of in between
                silent_s = tx.now - (job.lease_until or tx.now) + settings.lease_s
                why = f"its worker was not heard of for {silent_s:.0f} s"
                moved = queue.lose(tx, job.id, job.fence, why, max_crashes=settings.max_crashes)
                lost += moved is not None
    return lost


def _empty(db: Database, settings: Settings, name: str, column: sa.Column[Any], before: float) -> int:
    """Delete the files of jobs that ended or were deleted before a moment; the rows stay, for the books.

    `name` keeps how far this has come, so that a sweep does not look at what it has seen.
    """
    blobs = Blobs(settings.data_dir)
    with db.read() as tx:
        since = float(tx.scalar(sa.select(settings_kept.c.value).where(settings_kept.c.name == name)) or 0.0)
        has_files = sa.cast(jobs.c.outputs, sa.Text) != "[]"
        query = sa.select(jobs.c.id).where(column >= since, column < before, has_files)
        ids = [row.id for row in tx.all(query.order_by(column).limit(AT_ONCE))]
    for job_id in ids:
        blobs.remove_job(job_id)
    with db.write() as tx:
        if ids:
            tx.run(sa.update(jobs).where(jobs.c.id.in_(ids)).values(outputs=[]))
        if len(ids) < AT_ONCE:
            _keep(tx, name, before)
    return len(ids)


def _keep(tx: Tx, name: str, value: float) -> None:
    insert = sqlite.insert if tx.is_sqlite else postgresql.insert
    row = insert(settings_kept).values(name=name, value=repr(value), locked=False)
    tx.run(row.on_conflict_do_update(index_elements=["name"], set_={"value": repr(value)}))
