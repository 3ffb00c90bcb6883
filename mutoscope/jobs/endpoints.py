"""Webhook endpoints of an account and the secrets that sign what is sent to them.

Secrets are those of Standard Webhooks: `whsec_` and 32 random bytes in base64. After a rotation the old one signs too
for a day, so that a receiver can change over without losing an event. URLs that come with a single job or batch are
signed with the account's own secret.
"""

from __future__ import annotations

import base64
import json
import secrets as random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Row

from mutoscope.jobs import addresses
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, NotFound
from mutoscope.jobs.schema import deliveries, settings_kept, webhook_endpoints
from mutoscope.settings import Settings

EVENTS = (
    "job.created",
    "job.running",
    "job.progress",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "batch.finished",
)
ON_REQUEST = ("job.progress",)
"""Sent only to an endpoint that names them."""
PING = "ping"
ROTATION_S = 24 * 3600.0
"""How long the old secret signs after a rotation."""
MAX_ENDPOINTS = 50


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where events of an account go. `events` empty: all but those on request. `secrets`: newest first."""

    id: str
    account_id: str
    url: str
    events: tuple[str, ...]
    secrets: tuple[str, ...]
    created_at: float
    failing_since: float | None
    disabled_at: float | None
    disabled_why: str

    def wants(self, event: str) -> bool:
        return event in self.events or (not self.events and event not in ON_REQUEST)


def check_url(url: str, settings: Settings, *, field: str = "url") -> str:
    """The URL, if webhooks may go there as far as can be said without asking the network.

    Raises:
        InvalidRequest: it is not https, or private and not allowed by `allow_private_hosts`.
    """
    try:
        addresses.parse(url, addresses.webhook_policy(settings))
    except addresses.Refused as e:
        raise InvalidRequest(f"{field}: {url[:200]!r} {e.reason}.", field=field) from e
    return url


def create(tx: Tx, settings: Settings, account_id: str, url: str, events: Sequence[str] = ()) -> Endpoint:
    """A new endpoint with a secret of its own."""
    check_url(url, settings)
    _check_events(events)
    count = tx.scalar(sa.select(sa.func.count()).where(webhook_endpoints.c.account_id == account_id))
    if count >= MAX_ENDPOINTS:
        raise InvalidRequest(
            f"The account has {count} webhook endpoints, at most {MAX_ENDPOINTS} expected.",
            hint="Delete one.",
        )
    endpoint_id = str(uuid.uuid4())
    tx.run(
        webhook_endpoints.insert().values(
            id=endpoint_id,
            account_id=account_id,
            url=url,
            events=list(dict.fromkeys(events)),
            secrets=[_fresh()],
            created_at=tx.now,
        )
    )
    return get(tx, account_id, endpoint_id)


def get(tx: Tx, account_id: str, endpoint_id: str) -> Endpoint:
    """One endpoint.

    Raises:
        NotFound: the account has none of this id.
    """
    row = tx.first(
        sa.select(webhook_endpoints).where(
            webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.account_id == account_id
        )
    )
    if row is None:
        raise NotFound(f"No webhook endpoint {endpoint_id}.")
    return _endpoint(row, tx.now)


def listing(tx: Tx, account_id: str) -> list[Endpoint]:
    """All endpoints of an account, oldest first."""
    rows = tx.all(
        sa.select(webhook_endpoints)
        .where(webhook_endpoints.c.account_id == account_id)
        .order_by(webhook_endpoints.c.created_at, webhook_endpoints.c.id)
    )
    return [_endpoint(row, tx.now) for row in rows]


def update(
    tx: Tx,
    settings: Settings,
    account_id: str,
    endpoint_id: str,
    *,
    url: str | None = None,
    events: Sequence[str] | None = None,
    enabled: bool | None = None,
) -> Endpoint:
    """Change what is given. Enabling forgets past failures."""
    get(tx, account_id, endpoint_id)
    values: dict[str, Any] = {}
    if url is not None:
        values["url"] = check_url(url, settings)
        waiting = (deliveries.c.endpoint_id == endpoint_id, deliveries.c.state == "pending")
        tx.run(deliveries.update().where(*waiting).values(url=url))
    if events is not None:
        _check_events(events)
        values["events"] = list(dict.fromkeys(events))
    if enabled is True:
        values |= {"disabled_at": None, "disabled_why": "", "failing_since": None}
    elif enabled is False:
        values |= {"disabled_at": tx.now, "disabled_why": "disabled by its owner"}
    if values:
        tx.run(webhook_endpoints.update().where(webhook_endpoints.c.id == endpoint_id).values(**values))
    return get(tx, account_id, endpoint_id)


def delete(tx: Tx, account_id: str, endpoint_id: str) -> None:
    """Remove an endpoint; what is still on its way there is given up."""
    get(tx, account_id, endpoint_id)
    tx.run(webhook_endpoints.delete().where(webhook_endpoints.c.id == endpoint_id))


def rotate(tx: Tx, account_id: str, endpoint_id: str) -> str:
    """A new secret; the old ones sign beside it for a day."""
    row = tx.first(
        sa.select(webhook_endpoints.c.secrets)
        .where(webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.account_id == account_id)
        .with_for_update()
    )
    if row is None:
        raise NotFound(f"No webhook endpoint {endpoint_id}.")
    kept = _rotated(row.secrets, tx.now)
    tx.run(webhook_endpoints.update().where(webhook_endpoints.c.id == endpoint_id).values(secrets=kept))
    return str(kept[0]["value"])


def account_secrets(tx: Tx, account_id: str) -> tuple[str, ...]:
    """What signs webhooks to URLs of single jobs and batches, newest first; made when first asked for."""
    return _signing(_account_secrets(tx, account_id), tx.now)


def rotate_account(tx: Tx, account_id: str) -> str:
    """A new secret of the account; the old ones sign beside it for a day."""
    kept = _rotated(_account_secrets(tx, account_id), tx.now)
    name = _secret_name(account_id)
    tx.run(settings_kept.update().where(settings_kept.c.name == name).values(value=json.dumps(kept)))
    return str(kept[0]["value"])


def failed(tx: Tx, endpoint_id: str) -> float:
    """Note a failed attempt; the time since when they have been failing."""
    tx.run(
        webhook_endpoints.update()
        .where(webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.failing_since.is_(None))
        .values(failing_since=tx.now)
    )
    since = tx.scalar(
        sa.select(webhook_endpoints.c.failing_since).where(webhook_endpoints.c.id == endpoint_id)
    )
    return tx.now if since is None else float(since)


def worked(tx: Tx, endpoint_id: str) -> None:
    """Note a success."""
    tx.run(
        webhook_endpoints.update()
        .where(webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.failing_since.is_not(None))
        .values(failing_since=None)
    )


def disable(tx: Tx, endpoint_id: str, why: str) -> None:
    """Send nothing there any more, until its owner enables it."""
    tx.run(
        webhook_endpoints.update()
        .where(webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.disabled_at.is_(None))
        .values(disabled_at=tx.now, disabled_why=why)
    )


def _account_secrets(tx: Tx, account_id: str) -> list[dict[str, Any]]:
    name = _secret_name(account_id)
    query = sa.select(settings_kept.c.value).where(settings_kept.c.name == name)
    value = tx.scalar(query.with_for_update())
    if value is None:
        values = {"name": name, "value": json.dumps([_fresh()]), "locked": False}
        if tx.is_sqlite:
            tx.run(sqlite.insert(settings_kept).values(**values).on_conflict_do_nothing())
        else:
            tx.run(postgresql.insert(settings_kept).values(**values).on_conflict_do_nothing())
        value = tx.scalar(query)
    kept: list[dict[str, Any]] = json.loads(value)
    return kept


def _secret_name(account_id: str) -> str:
    return f"webhook_secrets:{account_id}"


def _fresh() -> dict[str, Any]:
    return {"value": "whsec_" + base64.b64encode(random.token_bytes(32)).decode(), "until": None}


def _rotated(kept: Sequence[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    old = [{**s, "until": min(s["until"] or now + ROTATION_S, now + ROTATION_S)} for s in kept]
    return [_fresh(), *(s for s in old if s["until"] > now)]


def _signing(kept: Sequence[dict[str, Any]], now: float) -> tuple[str, ...]:
    return tuple(s["value"] for s in kept if s["until"] is None or s["until"] > now)


def _check_events(events: Sequence[str]) -> None:
    for event in events:
        if event not in EVENTS:
            raise InvalidRequest(
                f"events: {event!r} is none of {', '.join(EVENTS)}.",
                field="events",
                hint="Leave it out for all.",
            )


def _endpoint(row: Row[Any], now: float) -> Endpoint:
    return Endpoint(
        id=row.id,
        account_id=row.account_id,
        url=row.url,
        events=tuple(row.events),
        secrets=_signing(row.secrets, now),
        created_at=row.created_at,
        failing_since=row.failing_since,
        disabled_at=row.disabled_at,
        disabled_why=row.disabled_why,
    )
