"""Credits: an append-only double-entry ledger.

Every entry moves an amount from one book account to another:

    grant     grants      -> wallet:A    credits given or bought
    plan      grants      -> wallet:A    a plan's credits of a month
    lapse     wallet:A    -> grants      what is left of them a month later
    reserve   wallet:A    -> held:A      at submit, what the job may cost
    capture   held:A      -> income      at success, what it costs
    release   held:A      -> wallet:A    the rest; all of it at failure and at cancel

A large batch holds what its jobs may cost before it makes them: a reserve without a job, given back piece by piece as
the jobs reserve for themselves.

`accounts.balance` is the wallet and `accounts.reserved` is what is held, changed in the same transaction. A job has
at most one entry of each kind (a unique key), so nothing is charged twice. A job that is cancelled costs nothing, even
if it ran: it is one's own machine.

Whoever submits holds the account's row first (`accounts.get(..., hold=True)`), so that two requests of one account
cannot both spend the last credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, OutOfCredits
from mutoscope.jobs.model import TERMINAL, Job, State
from mutoscope.jobs.schema import accounts, jobs, ledger

INCOME = "income"
GRANTS = "grants"


def wallet(account_id: str) -> str:
    return f"wallet:{account_id}"


def held(account_id: str) -> str:
    return f"held:{account_id}"


def grant(tx: Tx, account_id: str, amount: int, note: str = "") -> None:
    """Give credits. `amount` above 0."""
    if amount <= 0:
        raise InvalidRequest(f"amount = {amount}, expected a whole number above 0.", field="amount")
    _enter(tx, account_id, "grant", GRANTS, wallet(account_id), amount, note=note)
    tx.run(sa.update(accounts).where(accounts.c.id == account_id).values(balance=accounts.c.balance + amount))


def renew(tx: Tx, account_id: str, amount: int, note: str) -> None:
    """A month of a plan begins: what is left of the last one's credits lapses, `amount` is given. Plan credits are
    spent before bought ones, and what is held counts as spent."""
    c = ledger.c
    last = sa.select(c.at, c.amount, c.id).where(c.account_id == account_id, c.kind == "plan")
    row = tx.first(last.order_by(c.id.desc()).limit(1))
    left = 0
    if row is not None:
        captured = (c.account_id == account_id, c.kind == "capture", c.id > row.id)
        spent = int(tx.scalar(sa.select(sa.func.sum(c.amount)).where(*captured)) or 0)
        mine = tx.first(sa.select(accounts.c.balance, accounts.c.reserved).where(accounts.c.id == account_id))
        assert mine is not None
        left = max(0, min(int(row.amount) - spent - mine.reserved, mine.balance))
    if left:
        _enter(tx, account_id, "lapse", wallet(account_id), GRANTS, left, note=note)
    if amount:
        _enter(tx, account_id, "plan", GRANTS, wallet(account_id), amount, note=note)
    change = {"balance": accounts.c.balance + amount - left}
    tx.run(sa.update(accounts).where(accounts.c.id == account_id).values(change))


def cover(balance: int, cost: int, *, jobs: int = 1) -> None:
    """Raises OutOfCredits unless the balance covers the cost."""
    if balance < cost:
        what = "This job" if jobs == 1 else f"These {jobs} jobs"
        raise OutOfCredits(
            f"{what} may cost {cost} credits and the balance is {balance}.",
            hint="Add credits, or choose a shorter or smaller video, or a draft.",
        )


def reserve(tx: Tx, job: Job, *, overdraft: bool = False) -> None:
    """Hold what the job may cost; see `reserve_many`."""
    reserve_many(tx, [job], overdraft=overdraft)


def reserve_many(tx: Tx, made: Sequence[Job], *, overdraft: bool = False) -> None:
    """Hold what jobs of one account may cost, all or nothing.

    Raises:
        OutOfCredits: the balance does not cover it (never with `overdraft`).
    """
    account_id, total = made[0].account_id, sum(job.cost for job in made)
    change = sa.update(accounts).where(accounts.c.id == account_id)
    if not overdraft:
        change = change.where(accounts.c.balance >= total)
    moved = {"balance": accounts.c.balance - total, "reserved": accounts.c.reserved + total}
    if not tx.run(change.values(moved)):
        balance = tx.scalar(sa.select(accounts.c.balance).where(accounts.c.id == account_id))
        cover(int(balance), total, jobs=len(made))
    books = {"debit": wallet(account_id), "credit": held(account_id)}
    common = {"at": tx.now, "account_id": account_id, "kind": "reserve", "note": "", **books}
    rows = [{**common, "job_id": j.id, "key_id": j.key_id, "model": j.model, "amount": j.cost} for j in made]
    tx.conn.execute(sa.insert(ledger), rows)


def hold(tx: Tx, account_id: str, amount: int, note: str, *, overdraft: bool = False) -> None:
    """Hold credits for jobs that will be made. `note` names what for; below 0: give them back.

    Raises:
        OutOfCredits: the balance does not cover it (never with `overdraft`).
    """
    if not amount:
        return
    change = sa.update(accounts).where(accounts.c.id == account_id)
    if not overdraft:
        change = change.where(accounts.c.balance >= amount)
    moved = {"balance": accounts.c.balance - amount, "reserved": accounts.c.reserved + amount}
    if not tx.run(change.values(moved)):
        cover(int(tx.scalar(sa.select(accounts.c.balance).where(accounts.c.id == account_id))), amount)
    books = (wallet(account_id), held(account_id))
    kind, (debit, credit) = ("reserve", books) if amount > 0 else ("release", books[::-1])
    _enter(tx, account_id, kind, debit, credit, abs(amount), note=note)


def settle(tx: Tx, ended: Sequence[Job]) -> dict[str, int]:
    """Jobs have ended: take what each costs, give the rest back. Returns what was taken, by job.

    A job that a cheaper model took over costs less than was reserved (`job.cost` fell), never more.
    """
    c = ledger.c
    held_for: dict[str, int] = {}
    for start in range(0, len(ended), 500):
        ids = [job.id for job in ended[start : start + 500]]
        query = sa.select(c.job_id, c.amount).where(c.job_id.in_(ids), c.kind == "reserve")
        held_for |= {row.job_id: int(row.amount) for row in tx.all(query)}
    taken = dict.fromkeys((job.id for job in ended), 0)
    rows: list[dict[str, Any]] = []
    moved: dict[str, tuple[int, int]] = {}
    for job in (job for job in ended if job.id in held_for):
        reserved, mine = held_for[job.id], held(job.account_id)
        cost = taken[job.id] = min(job.cost, reserved) if job.state is State.SUCCEEDED else 0
        back = reserved - cost
        if cost:
            rows.append(_entry(tx, job.account_id, "capture", mine, INCOME, cost, job=job))
            tx.run(sa.update(jobs).where(jobs.c.id == job.id).values(cost_captured=cost))
        if back or not cost:
            rows.append(_entry(tx, job.account_id, "release", mine, wallet(job.account_id), back, job=job))
        before = moved.get(job.account_id, (0, 0))
        moved[job.account_id] = before[0] + back, before[1] + reserved
    if rows:
        tx.conn.execute(sa.insert(ledger), rows)
    for account_id, (back, reserved) in moved.items():
        values = {"balance": accounts.c.balance + back, "reserved": accounts.c.reserved - reserved}
        tx.run(sa.update(accounts).where(accounts.c.id == account_id).values(values))
    return taken


def entries(tx: Tx, account_id: str, *, before: int | None = None, limit: int = 100) -> list[Entry]:
    """What happened to an account's credits, newest first; `before` is the `id` of the last entry seen."""
    query = sa.select(ledger).where(ledger.c.account_id == account_id)
    if before is not None:
        query = query.where(ledger.c.id < before)
    names = tuple(Entry.__dataclass_fields__)
    rows = tx.all(query.order_by(ledger.c.id.desc()).limit(limit))
    return [Entry(**{name: row._mapping[name] for name in names}) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger: `amount` moved from the book `debit` to the book `credit`."""

    id: int
    at: float
    account_id: str
    job_id: str | None
    key_id: str | None
    model: str
    kind: str
    debit: str
    credit: str
    amount: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """An account whose sums do not agree with the ledger."""

    account_id: str
    balance: int
    balance_by_ledger: int
    reserved: int
    reserved_by_ledger: int


def check(tx: Tx) -> list[Imbalance]:
    """Accounts whose balance or reserve is not what the ledger says. Empty: all is well."""
    sums: dict[str, int] = {}
    for side, sign in ((ledger.c.credit, 1), (ledger.c.debit, -1)):
        for book, total in tx.all(sa.select(side, sa.func.sum(ledger.c.amount)).group_by(side)):
            sums[book] = sums.get(book, 0) + sign * int(total)
    wrong = []
    for row in tx.all(sa.select(accounts.c.id, accounts.c.balance, accounts.c.reserved)):
        by_ledger = sums.get(wallet(row.id), 0), sums.get(held(row.id), 0)
        if (row.balance, row.reserved) != by_ledger:
            wrong.append(
                Imbalance(account_id=row.id, balance=row.balance, balance_by_ledger=by_ledger[0],
                          reserved=row.reserved, reserved_by_ledger=by_ledger[1])
            )  # fmt: skip
    return wrong


def unsettled(tx: Tx) -> list[str]:
    """Ids of jobs whose entries do not fit their state: ended and still held, or open and not held."""
    by_kind = {
        kind: sa.func.sum(sa.case((ledger.c.kind == kind, ledger.c.amount), else_=0))
        for kind in ("reserve", "capture", "release")
    }
    left = (by_kind["reserve"] - by_kind["capture"] - by_kind["release"]).label("left")
    n = sa.func.count().label("n")
    held_now = (
        sa.select(ledger.c.job_id, left, n).where(ledger.c.job_id.is_not(None)).group_by(ledger.c.job_id)
    )
    sums = held_now.subquery()
    query = sa.select(jobs.c.id, jobs.c.state, sums.c.left, sums.c.n)
    wrong = []
    for row in tx.all(query.join_from(jobs, sums, sums.c.job_id == jobs.c.id, isouter=True)):
        ended = State(row.state) in TERMINAL
        settled = row.n is not None and (row.left == 0 and row.n > 1 if ended else row.n == 1)
        if not settled:
            wrong.append(row.id)
    return wrong


def _enter(
    tx: Tx, account_id: str, kind: str, debit: str, credit: str, amount: int, *, note: str = ""
) -> None:
    tx.run(sa.insert(ledger).values(_entry(tx, account_id, kind, debit, credit, amount, note=note)))


def _entry(
    tx: Tx,
    account_id: str,
    kind: str,
    debit: str,
    credit: str,
    amount: int,
    *,
    job: Job | None = None,
    note: str = "",
) -> dict[str, Any]:
    return {
        "at": tx.now, "account_id": account_id, "job_id": job and job.id, "key_id": job and job.key_id,
        "model": job.model if job else "", "kind": kind, "debit": debit, "credit": credit,
        "amount": amount, "note": note,
    }  # fmt: skip
