"""What others are to be told: rows of `deliveries`, written in the transaction of the change that they tell about.

So an event is neither lost with a crash nor sent for a change that was rolled back. `webhooks.py` sends them.

The body is written when the event happens, not when it is sent: it says what was true then. `data.sequence` counts
the events of a job, for receivers that get them late or in another order.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import endpoints, view
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.model import Job
from mutoscope.jobs.schema import deliveries, webhook_endpoints

MAX_BODY_BYTES = 18_000
"""Standard Webhooks asks for less than 20 kB, and links to the outputs come on top when a body is sent; large fields
are left out and named in `data.omitted`."""
PROGRESS_EVERY_S = 10.0
STYLES = {"luma": "luma"}
"""Dialects whose jobs' own URL gets the vendor's body; all else is "standard"."""
OWN_URL_EVENTS = ("job.running", "job.succeeded", "job.failed", "job.cancelled", "batch.finished")
"""What goes to the URL of a single job or batch: whoever made it knows that it was created."""
_NEVER_OMITTED = ("id", "state", "sequence", "outputs", "failure")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One event on its way to one URL."""

    seq: int
    id: str  # webhook-id: the same on every attempt
    account_id: str
    endpoint_id: str | None
    url: str
    style: str
    event: str
    job_id: str | None
    sequence: int
    body: str
    state: str  # "pending", "delivered", "failed"
    attempts: int
    next_at: float
    lease_until: float | None
    last_status: int | None
    last_error: str
    created_at: float
    delivered_at: float | None


def enqueue(tx: Tx, job: Job, event: str) -> None:
    """Tell all who asked that something happened to a job. Events: `endpoints.EVENTS`.

    job.progress goes only to endpoints that name it, at most once in 10 s and job.
    """
    targets = _endpoints(tx, job.account_id, event)
    own = job.spec.get("webhook_url") if event in OWN_URL_EVENTS else None
    if not targets and not own:
        return
    if event == "job.progress" and _recent_progress(tx, job.id):
        return
    sequence = 1 + (
        tx.scalar(sa.select(sa.func.max(deliveries.c.sequence)).where(deliveries.c.job_id == job.id)) or 0
    )
    data = {**view.public(tx, job, live=False), "sequence": sequence}
    common = {"account_id": job.account_id, "event": event, "job_id": job.id, "sequence": sequence}
    body = _body(tx, event, data)
    rows = [{"endpoint_id": t.id, "url": t.url, "style": "standard", "body": body, **common} for t in targets]
    if own:
        style = STYLES.get(job.dialect, "standard")
        rows.append({"endpoint_id": None, "url": own, "style": style, "body": body, **common})
    _insert(tx, rows)


def listens(tx: Tx, account_id: str, event: str) -> bool:
    """Whether an endpoint of the account takes this event."""
    return bool(_endpoints(tx, account_id, event))


def enqueue_batch(
    tx: Tx, account_id: str, data: Mapping[str, Any], *, webhook_url: str | None = None
) -> None:
    """Tell that a batch has finished; `data` is the batch as the API shows it."""
    event = "batch.finished"
    targets = _endpoints(tx, account_id, event)
    if not targets and not webhook_url:
        return
    body = _body(tx, event, data)
    common = {"account_id": account_id, "event": event, "job_id": None, "sequence": 0, "style": "standard"}
    rows = [{"endpoint_id": t.id, "url": t.url, "body": body, **common} for t in targets]
    if webhook_url:
        rows.append({"endpoint_id": None, "url": webhook_url, "body": body, **common})
    _insert(tx, rows)


def ping(tx: Tx, account_id: str, endpoint_id: str) -> Delivery:
    """Send a test event to one endpoint."""
    endpoint = endpoints.get(tx, account_id, endpoint_id)
    row = {
        "account_id": account_id, "endpoint_id": endpoint.id, "url": endpoint.url, "style": "standard",
        "event": endpoints.PING, "job_id": None, "sequence": 0,
        "body": _body(tx, endpoints.PING, {"endpoint_id": endpoint.id}),
    }  # fmt: skip
    (delivery_id,) = _insert(tx, [row])
    return get(tx, account_id, delivery_id)


def get(tx: Tx, account_id: str, delivery_id: str) -> Delivery:
    """One delivery.

    Raises:
        NotFound: the account has none of this id.
    """
    row = tx.first(
        sa.select(deliveries).where(deliveries.c.id == delivery_id, deliveries.c.account_id == account_id)
    )
    if row is None:
        raise NotFound(f"No webhook delivery {delivery_id}.")
    return from_row(row)


def listing(
    tx: Tx,
    account_id: str,
    *,
    endpoint_id: str | None = None,
    job_id: str | None = None,
    states: Sequence[str] = (),
    before: int | None = None,
    limit: int = 50,
) -> list[Delivery]:
    """Deliveries of an account, newest first; `before` is the `seq` of the last one that was seen."""
    query = sa.select(deliveries).where(deliveries.c.account_id == account_id)
    if endpoint_id is not None:
        query = query.where(deliveries.c.endpoint_id == endpoint_id)
    if job_id is not None:
        query = query.where(deliveries.c.job_id == job_id)
    if states:
        query = query.where(deliveries.c.state.in_(states))
    if before is not None:
        query = query.where(deliveries.c.seq < before)
    return [from_row(row) for row in tx.all(query.order_by(deliveries.c.seq.desc()).limit(limit))]


def replay(
    tx: Tx,
    account_id: str,
    *,
    delivery_id: str | None = None,
    endpoint_id: str | None = None,
    since: float | None = None,
) -> int:
    """Send again: one delivery, whatever became of it, or all failed ones since a time. Ids stay the same.

    Returns how many. Those to an endpoint go to the URL that it has now.
    """
    which = [deliveries.c.account_id == account_id, deliveries.c.state != "pending"]
    if delivery_id is not None:
        get(tx, account_id, delivery_id)
        which.append(deliveries.c.id == delivery_id)
    else:
        which += [deliveries.c.state == "failed", deliveries.c.created_at >= (since or 0.0)]
    if endpoint_id is not None:
        endpoints.get(tx, account_id, endpoint_id)
        which.append(deliveries.c.endpoint_id == endpoint_id)
    e = webhook_endpoints.c
    now_at = sa.select(e.url).where(e.id == deliveries.c.endpoint_id).scalar_subquery()
    again = {"state": "pending", "attempts": 0, "next_at": tx.now, "lease_until": None}
    return tx.run(
        deliveries.update().where(*which).values(url=sa.func.coalesce(now_at, deliveries.c.url), **again)
    )


def backlog(tx: Tx) -> tuple[int, float]:
    """For those who watch the service: how many deliveries are due and not under way, and for how long the oldest."""
    d = deliveries.c
    due = (
        d.state == "pending",
        d.next_at <= tx.now,
        sa.or_(d.lease_until.is_(None), d.lease_until <= tx.now),
    )
    count = int(tx.scalar(sa.select(sa.func.count()).select_from(deliveries).where(*due)) or 0)
    oldest = tx.scalar(sa.select(sa.func.min(d.next_at)).where(*due))
    return count, tx.now - oldest if count else 0.0


def prune(tx: Tx, before: float) -> int:
    """Forget deliveries that ended and were made before a time."""
    return tx.run(
        deliveries.delete().where(deliveries.c.state != "pending", deliveries.c.created_at < before)
    )


def from_row(row: Row[Any]) -> Delivery:
    return Delivery(**row._mapping)


def _endpoints(tx: Tx, account_id: str, event: str) -> list[Row[Any]]:
    e = webhook_endpoints.c
    rows = tx.all(sa.select(e.id, e.url, e.events).where(e.account_id == account_id, e.disabled_at.is_(None)))
    on_request = event in endpoints.ON_REQUEST
    return [row for row in rows if event in row.events or not (row.events or on_request)]


def _recent_progress(tx: Tx, job_id: str) -> bool:
    last = tx.scalar(
        sa.select(sa.func.max(deliveries.c.created_at)).where(
            deliveries.c.job_id == job_id, deliveries.c.event == "job.progress"
        )
    )
    return last is not None and tx.now - last < PROGRESS_EVERY_S


def _body(tx: Tx, event: str, data: Mapping[str, Any]) -> str:
    """The event as JSON, smaller than the limit: of what is too large, the largest fields go first."""
    at = datetime.fromtimestamp(tx.now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data, omitted = dict(data), list[str]()

    def text() -> str:
        return json.dumps({"type": event, "timestamp": at, "data": data}, separators=(",", ":"))

    sizes = {key: len(json.dumps(value)) for key, value in data.items()}
    for key in sorted((k for k in sizes if k not in _NEVER_OMITTED), key=lambda k: -sizes[k]):
        if len(text()) < MAX_BODY_BYTES:
            break
        del data[key]
        omitted.append(key)
        data["omitted"] = omitted
    return text()


def _insert(tx: Tx, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    made = [
        {"id": f"msg_{uuid.uuid4().hex}", "state": "pending", "attempts": 0, "next_at": tx.now,
         "created_at": tx.now, **row}
        for row in rows
    ]  # fmt: skip
    tx.conn.execute(deliveries.insert(), made)
    return [str(row["id"]) for row in made]
