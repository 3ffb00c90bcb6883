"""What has to happen without being asked. Call `sweep` every few seconds, from any number of processes."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from mutoscope.jobs import assets, eta, feed, idempotency, outbox, queue
from mutoscope.jobs.blobs import Blobs
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import TERMINAL
from mutoscope.jobs.schema import jobs
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
    with db.write() as tx:
        late = queue.expired(tx)
        for job in late:
            silent_s = tx.now - (job.lease_until or tx.now) + settings.lease_s
            why = f"its worker was not heard of for {silent_s:.0f} s"
            queue.lose(tx, job.id, job.fence, why, max_crashes=settings.max_crashes)
    emptied = _empty(db, settings)
    with db.write() as tx:
        n = idempotency.prune(tx, tx.now - settings.idempotency_hours * 3600)
        n += feed.prune(tx, before=tx.now - settings.retention_days * DAY_S)
        n += outbox.prune(tx, tx.now - settings.retention_days * DAY_S)
        n += assets.expire(tx, data_dir=settings.data_dir)
        n += eta.prune(tx)
    return Swept(lost=len(late), emptied=emptied, forgotten=n)


def _empty(db: Database, settings: Settings) -> int:
    """Delete the files of old and of deleted jobs; the rows stay, for the books."""
    blobs = Blobs(settings.data_dir)
    with db.read() as tx:
        old = jobs.c.finished_at < tx.now - settings.retention_days * DAY_S
        has_files = sa.cast(jobs.c.outputs, sa.Text) != "[]"
        ended = jobs.c.state.in_(list(TERMINAL))
        query = sa.select(jobs.c.id).where(ended, old | jobs.c.deleted_at.is_not(None), has_files)
        ids = [row.id for row in tx.all(query.limit(AT_ONCE))]
    for job_id in ids:
        blobs.remove_job(job_id)
    if ids:
        with db.write() as tx:
            tx.run(sa.update(jobs).where(jobs.c.id.in_(ids)).values(outputs=[]))
    return len(ids)
