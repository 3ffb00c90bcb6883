"""Accounts and their API keys. Keys are shown once and kept as SHA-256: they are long and random, so that is enough."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import ledger, plans, queue
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthorized
from mutoscope.jobs.model import Account, Caller, new_id, new_secret
from mutoscope.jobs.schema import accounts, api_keys
from mutoscope.jobs.schema import ledger as ledger_table

SCOPES = ("jobs", "read", "admin")
"""jobs: all of one's own account; read: GET only; admin: all accounts, keys and credits too."""
PREFIX = "mk_"
DEFAULT = "default"
SEEN_EVERY_S = 60.0
_FIELDS = ("id", "name", "plan", "weight", "balance", "reserved", "created_at", "disabled_at", "limits")


@dataclass(frozen=True, kw_only=True)
class Key:
    """An API key without its secret."""

    id: str
    account_id: str
    name: str
    hint: str
    scopes: tuple[str, ...]
    created_at: float
    last_used_at: float | None
    revoked_at: float | None


def create(
    tx: Tx,
    name: str,
    *,
    plan: str = "unlimited",
    weight: float = 1.0,
    limits: Mapping[str, Any] | None = None,
    account_id: str | None = None,
) -> Account:
    """A new account; its plan's monthly credits are granted at once."""
    if plan not in plans.PLANS:
        raise InvalidRequest(f"plan = {plan!r}, expected one of {', '.join(plans.PLANS)}.", field="plan")
    _weight(weight)
    account_id = account_id or new_id()
    row = {"id": account_id, "name": name, "plan": plan, "weight": weight, "created_at": tx.now}
    tx.run(sa.insert(accounts).values(**row, limits=plans.check_limits(limits or {})))
    if credits := plans.PLANS[plan].credits_per_month:
        ledger.renew(tx, account_id, credits, f"plan {plan}")
    return get(tx, account_id)


def get(tx: Tx, account_id: str, *, hold: bool = False) -> Account:
    """One account. `hold`: nobody else changes it before this transaction ends.

    Raises:
        NotFound: there is none of this id.
    """
    query = sa.select(*(accounts.c[f] for f in _FIELDS)).where(accounts.c.id == account_id)
    row = tx.first(query.with_for_update(key_share=True) if hold else query)
    if row is None:
        raise NotFound(f"No account {account_id!r}.")
    return Account(**row._mapping)


def named(tx: Tx, name: str) -> Account:
    """The account with this name or id.

    Raises:
        NotFound: there is none.
    """
    found = sa.select(accounts.c.id).where((accounts.c.name == name) | (accounts.c.id == name))
    row = tx.first(found.order_by(accounts.c.created_at).limit(1))
    if row is None:
        raise NotFound(f"No account {name!r}.")
    return get(tx, row.id)


def listing(tx: Tx) -> list[Account]:
    """All accounts, oldest first."""
    rows = tx.all(sa.select(*(accounts.c[f] for f in _FIELDS)).order_by(accounts.c.created_at, accounts.c.id))
    return [Account(**row._mapping) for row in rows]


def change(
    tx: Tx,
    account_id: str,
    *,
    plan: str | None = None,
    weight: float | None = None,
    limits: Mapping[str, Any] | None = None,
    disabled: bool | None = None,
) -> Account:
    """Change what is given, leave the rest."""
    account = get(tx, account_id, hold=True)
    values: dict[str, Any] = {}
    if plan is not None:
        if plan not in plans.PLANS:
            raise InvalidRequest(f"plan = {plan!r}, expected one of {', '.join(plans.PLANS)}.", field="plan")
        values["plan"] = plan
        if plan != account.plan:
            ledger.renew(tx, account_id, plans.PLANS[plan].credits_per_month, f"plan {plan}")
    if weight is not None:
        values["weight"] = _weight(weight)
    if limits is not None:
        values["limits"] = plans.check_limits(limits)
    if disabled is not None:
        values["disabled_at"] = (account.disabled_at or tx.now) if disabled else None
    if values:
        tx.run(sa.update(accounts).where(accounts.c.id == account_id).values(values))
        queue.admit(tx, account_id)  # there may be more slots now
    return get(tx, account_id)


def renew_due(tx: Tx) -> int:
    """Give the plans' credits to accounts whose last ones are a month old. Returns to how many."""
    paying = [plan.name for plan in plans.PLANS.values() if plan.credits_per_month]
    given = sa.select(sa.func.max(ledger_table.c.at)).where(
        ledger_table.c.account_id == accounts.c.id, ledger_table.c.kind == "plan"
    )
    due = sa.select(accounts.c.id, accounts.c.plan).where(
        accounts.c.plan.in_(paying), accounts.c.disabled_at.is_(None),
        sa.func.coalesce(given.scalar_subquery(), 0.0) <= tx.now - plans.MONTH_S,
    )  # fmt: skip
    rows = tx.all(due.order_by(accounts.c.id))
    for row in rows:
        get(tx, row.id, hold=True)
        ledger.renew(tx, row.id, plans.PLANS[row.plan].credits_per_month, f"plan {row.plan}")
    return len(rows)


def create_key(
    tx: Tx, account_id: str, name: str, *, scopes: Sequence[str] = ("jobs",), value: str | None = None
) -> tuple[Key, str]:
    """A new key and its secret, which is not kept. `value` imports an existing one: deployed clients keep theirs.

    Raises:
        InvalidRequest: no scope or an unknown one; a value that is empty or not printable ASCII.
        Conflict: the value is a key already.
    """
    get(tx, account_id)
    for scope in scopes or ("",):
        if scope not in SCOPES:
            raise InvalidRequest(f"scope {scope!r}, expected some of {', '.join(SCOPES)}.", field="scopes")
    secret = new_secret(PREFIX) if value is None else value.strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise InvalidRequest(
            "The key is empty, or has characters that no HTTP header carries.", field="value"
        )
    digest = hashed(secret)
    if tx.first(sa.select(api_keys.c.id).where(api_keys.c.hash == digest)) is not None:
        raise Conflict("This key is there already.", hint="`mutoscope keys list` shows whose it is.")
    row: dict[str, Any] = {
        "id": new_id(), "account_id": account_id, "name": name, "hash": digest, "scopes": list(scopes),
        "hint": secret[: min(8, len(secret) // 2)] + "...", "created_at": tx.now,
    }  # fmt: skip
    tx.run(sa.insert(api_keys).values(row))
    return key(tx, row["id"]), secret


def key(tx: Tx, key_id: str) -> Key:
    """One key.

    Raises:
        NotFound: there is none of this id.
    """
    row = tx.first(sa.select(api_keys).where(api_keys.c.id == key_id))
    if row is None:
        raise NotFound(f"No key {key_id!r}.")
    return _key(row)


def keys(tx: Tx, account_id: str | None = None) -> list[Key]:
    """Keys of one account, or of all."""
    query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
    if account_id is not None:
        query = query.where(api_keys.c.account_id == account_id)
    return [_key(row) for row in tx.all(query)]


def revoke(tx: Tx, key_id: str) -> Key:
    """The key opens nothing from now on. Its jobs go on."""
    key(tx, key_id)
    mine = sa.update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    tx.run(mine.values(revoked_at=tx.now))
    return key(tx, key_id)


def authenticate(tx: Tx, secret: str) -> Caller:
    """Who this key speaks for. Changes nothing; see `used`.

    Raises:
        Unauthorized: no such key, or a revoked one.
        Forbidden: the account is disabled.
    """
    columns = [accounts.c[f] for f in _FIELDS]
    query = sa.select(
        api_keys.c.id.label("key_id"), api_keys.c.scopes, api_keys.c.revoked_at, *columns
    ).join_from(api_keys, accounts)
    row = tx.first(query.where(api_keys.c.hash == hashed(secret)))
    if row is None or row.revoked_at is not None:
        what = "This API key was revoked." if row is not None else "This API key is not known here."
        raise Unauthorized(what, hint="`mutoscope keys create NAME` makes one.")
    account = Account(**{f: row._mapping[f] for f in _FIELDS})
    if account.disabled_at is not None:
        raise Forbidden(f"The account {account.name!r} is disabled.")
    return Caller(account=account, key_id=row.key_id, scopes=tuple(row.scopes))


def used(tx: Tx, key_id: str) -> None:
    """Note that a key was used, at most once a minute."""
    stale = api_keys.c.last_used_at.is_(None) | (api_keys.c.last_used_at < tx.now - SEEN_EVERY_S)
    tx.run(sa.update(api_keys).where(api_keys.c.id == key_id, stale).values(last_used_at=tx.now))


def first_run(tx: Tx, *, plan: str = "unlimited") -> str | None:
    """On an empty database: an account "default" and a key for everything, whose secret is returned. Else None."""
    if tx.first(sa.select(accounts.c.id).limit(1)) is not None:
        return None
    create(tx, DEFAULT, plan=plan, account_id=DEFAULT)
    _, secret = create_key(tx, DEFAULT, "first", scopes=("jobs", "admin"))
    return secret


def _weight(weight: float) -> float:
    if not 0.01 <= weight <= 1000:
        raise InvalidRequest(f"weight = {weight:g}, expected 0.01 to 1000.", field="weight")
    return weight


def hashed(secret: str) -> str:
    """As kept."""
    return hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).hexdigest()


def _key(row: Row[Any]) -> Key:
    values = {f: row._mapping[f] for f in Key.__dataclass_fields__}
    return Key(**values | {"scopes": tuple(row.scopes)})
