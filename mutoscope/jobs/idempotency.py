"""One answer for one Idempotency-Key, stored in the transaction of its effect.

`begin` inserts the key's row; the effect and `keep` follow in the same transaction. So a crash in between leaves
neither, and a duplicate that comes while the first is under way waits for it: on SQLite for the write lock, on
PostgreSQL for the unique key. Then it finds the stored answer.

What is kept: answers of requests that were carried out. Refused ones are rolled back with their key, so that a
corrected request may use it again (as Stripe does for validation failures).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import IdempotencyMismatch, InvalidRequest
from mutoscope.jobs.schema import idempotency

MAX_KEY = 255


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The answer that the key got."""

    status: int
    headers: dict[str, str]
    body: str


def begin(tx: Tx, account_id: str, key: str, route: str, body_hash: str) -> Stored | None:
    """None: carry on, and call `keep`. Else: answer with this.

    Raises:
        InvalidRequest: an empty key, or one of more than 255 characters.
        IdempotencyMismatch: the key was used for another request.
    """
    if not 0 < len(key) <= MAX_KEY:
        raise InvalidRequest(
            f"Idempotency-Key has {len(key)} characters, expected 1 to {MAX_KEY}.", field="Idempotency-Key"
        )
    values: dict[str, Any] = {"account_id": account_id, "key": key, "route": route, "body_hash": body_hash}
    values |= {"created_at": tx.now, "status": 0, "headers": {}, "body": ""}
    insert = sqlite.insert if tx.is_sqlite else postgresql.insert
    mine = insert(idempotency).values(values).on_conflict_do_nothing().returning(idempotency.c.key)
    if tx.first(mine) is not None:
        return None
    row = tx.first(
        sa.select(idempotency).where(idempotency.c.account_id == account_id, idempotency.c.key == key)
    )
    if row is None or (row.route, row.body_hash) != (route, body_hash):
        raise IdempotencyMismatch(
            f"Idempotency-Key {key!r} was used before for another request.",
            hint="Use a new key for each request; repeat one only with the same body.",
        )
    return Stored(status=row.status, headers=row.headers, body=row.body)


def keep(tx: Tx, account_id: str, key: str, status: int, headers: Mapping[str, str], body: str) -> None:
    """Store the answer."""
    mine = (idempotency.c.account_id == account_id) & (idempotency.c.key == key)
    tx.run(sa.update(idempotency).where(mine).values(status=status, headers=dict(headers), body=body))


def prune(tx: Tx, before: float) -> int:
    """Forget keys that are older."""
    return tx.run(sa.delete(idempotency).where(idempotency.c.created_at < before))
