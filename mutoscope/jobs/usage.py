"""What was spent, by day (UTC), model, key and LoRAs, from the ledger."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import sqlalchemy as sa

from mutoscope.jobs.database import Tx
from mutoscope.jobs.schema import jobs, ledger

COLUMNS = ("day", "model", "model_asked", "operation", "key_id", "jobs", "credits", "device_seconds", "loras")


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """The finished jobs of one day that have the rest in common."""

    day: date
    model: str
    model_asked: str
    operation: str
    key_id: str | None
    jobs: int
    credits: int
    device_seconds: float
    loras: str = ""  # names, with + between


def by_day(tx: Tx, account_id: str | None, start: date, before: date) -> list[UsageRow]:
    """From `start` to the day before `before`, oldest first. account_id None: all accounts."""
    begin, end = (datetime(d.year, d.month, d.day, tzinfo=UTC).timestamp() for d in (start, before))
    query = (
        sa.select(
            ledger.c.at, ledger.c.model, ledger.c.key_id, ledger.c.amount, jobs.c.model_asked, jobs.c.operation,
            jobs.c.started_at, jobs.c.finished_at, jobs.c.spec["loras"].label("loras"),
        )
        .join_from(ledger, jobs, jobs.c.id == ledger.c.job_id)
        .where(ledger.c.kind == "capture", ledger.c.at >= begin, ledger.c.at < end)
    )  # fmt: skip
    if account_id is not None:
        query = query.where(ledger.c.account_id == account_id)
    sums: dict[tuple[date, str, str, str, str | None, str], list[float]] = {}
    for row in tx.all(query):
        day = datetime.fromtimestamp(row.at, UTC).date()
        loras = "+".join(lora["name"] for lora in row.loras or ())
        total = sums.setdefault(
            (day, row.model, row.model_asked, row.operation, row.key_id, loras), [0, 0, 0.0]
        )
        total[0] += 1
        total[1] += row.amount
        total[2] += max(0.0, (row.finished_at or 0.0) - (row.started_at or row.finished_at or 0.0))
    rows = [
        UsageRow(day=day, model=model, model_asked=asked, operation=operation, key_id=key, jobs=int(n),
                 credits=int(credits), device_seconds=round(seconds, 3), loras=loras)
        for (day, model, asked, operation, key, loras), (n, credits, seconds) in sums.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda r: (r.day, r.model, r.model_asked, r.operation, r.key_id or "", r.loras))


def jobs_since(tx: Tx, account_id: str, since: float) -> list[tuple[str, str, int]]:
    """Jobs made after a time, whatever became of them: (model asked, operation, how many)."""
    kinds = (jobs.c.model_asked, jobs.c.operation)
    query = sa.select(*kinds, sa.func.count().label("n")).where(jobs.c.account_id == account_id)
    rows = tx.all(query.where(jobs.c.created_at > since).group_by(*kinds))
    return [(row.model_asked, row.operation, int(row.n)) for row in rows]


def days(rows: Sequence[UsageRow], start: date, before: date) -> dict[date, int]:
    """Credits of each day, days without use included."""
    totals = {start + timedelta(days=i): 0 for i in range((before - start).days)}
    for row in rows:
        totals[row.day] += row.credits
    return totals


def as_csv(rows: Sequence[UsageRow]) -> str:
    """A table for spreadsheets. Cells that a spreadsheet would run as a formula are quoted."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_plain(getattr(row, name)) for name in COLUMNS])
    return out.getvalue()


def _plain(value: object) -> object:
    text = "" if value is None else value
    return f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@") else text
