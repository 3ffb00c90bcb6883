"""Short words for what the tests of webhooks do again and again."""

from __future__ import annotations

from typing import Any

from mutoscope.jobs import endpoints, outbox
from mutoscope.jobs.database import Database
from mutoscope.jobs.outbox import Delivery
from mutoscope.jobs.webhooks import deliver_due
from mutoscope.settings import Settings
from tests.service.webhooks.conftest import make_job

URL = "https://example.com/hook"


def no_jitter() -> float:
    return 0.0


def deliver(db: Database, settings: Settings, send: Any = None, **options: Any) -> int:
    return deliver_due(db, settings, send, **{"jitter": no_jitter, **options})


def endpoint(
    db: Database, settings: Settings, url: str = URL, events: tuple[str, ...] = ()
) -> endpoints.Endpoint:
    with db.write() as tx:
        return endpoints.create(tx, settings, "acct", url, events)


def tell(db: Database, event: str = "job.running", **job: Any) -> None:
    with db.write() as tx:
        outbox.enqueue(tx, make_job(**job), event)


def rows(db: Database) -> list[Delivery]:
    """Oldest first."""
    with db.read() as tx:
        return outbox.listing(tx, "acct")[::-1]


def only(db: Database) -> Delivery:
    (row,) = rows(db)
    return row
