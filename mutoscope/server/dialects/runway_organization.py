"""Credits, limits and usage of the account, as Runway reports them for an organization."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

from mutoscope.jobs.plans import Plan
from mutoscope.jobs.usage import UsageRow
from mutoscope.server.dialects.runway_rules import BodyRefused, Issue, table

DEFAULT_DAYS = 30
MOST_DAYS = 90
NO_LIMIT = 2**31 - 1
"""Said for a monthly limit that does not exist: Runway's field is a whole number, never null."""

REPORTED_AS: dict[str, str] = {
    "video": "gen4.5",
    "image": "gen4_image",
    "upscale": "magnific_video_upscaler_creative",
    "reframe_rate": "enhance_frame_rate",
    "hdr": "ruby",
}
"""Jobs that were not asked for with a name of Runway's, by operation: its list of models is closed."""


def reported_as(model_asked: str, operation: str) -> str:
    """The name that a job is reported under."""
    return model_asked if model_asked in table()["usage_models"] else REPORTED_AS[operation]


def window(body: Any, today: date) -> tuple[date, date]:
    """First day and the day after the last one of a usage request.

    Raises:
        BodyRefused: not dates, or not a span of 1 to 90 days.
    """
    if body is None:
        body = {}
    if not isinstance(body, dict):
        raise BodyRefused([Issue((), "expected a JSON object with startDate and beforeDate.")])
    issues = [Issue((name,), "is not a field here; known: startDate, beforeDate.") for name in body
              if name not in ("startDate", "beforeDate")]  # fmt: skip
    days: dict[str, date] = {}
    for name in ("startDate", "beforeDate"):
        if name in body:
            try:
                days[name] = date.fromisoformat(body[name])
            except (TypeError, ValueError):
                issues.append(Issue((name,), f"got {body[name]!r}, expected a day as YYYY-MM-DD."))
    if issues:
        raise BodyRefused(issues)
    start = days.get("startDate", today - timedelta(days=DEFAULT_DAYS))
    try:
        before = days.get("beforeDate", start + timedelta(days=DEFAULT_DAYS))
    except OverflowError:
        before = date.max
    if not timedelta(0) < before - start <= timedelta(days=MOST_DAYS):
        span = (before - start).days
        why = f"is {span} days after startDate, expected 1 to {MOST_DAYS}."
        raise BodyRefused([Issue(("beforeDate",), why)])
    return start, before


def day_of(at: float) -> date:
    """The day in UTC."""
    return datetime.fromtimestamp(at, UTC).date()


def report(rows: Iterable[UsageRow]) -> dict[str, Any]:
    """Usage in Runway's form; days without use are left out."""
    book: dict[date, dict[str, int]] = {}
    for row in rows:
        models = book.setdefault(row.day, {})
        model = reported_as(row.model_asked, row.operation)
        models[model] = models.get(model, 0) + row.credits
    results = [
        {
            "date": day.isoformat(),
            "usedCredits": [{"model": model, "amount": amount} for model, amount in sorted(models.items())],
        }
        for day, models in sorted(book.items())
    ]
    return {"results": results, "models": sorted({model for models in book.values() for model in models})}


def organization(balance: int, plan: Plan, today: Iterable[tuple[str, str, int]]) -> dict[str, Any]:
    """Credits, limits and the day's jobs from (model asked, operation, jobs). Plans here limit the account as a whole:
    each of Runway's models shows the account's limits."""
    limits = {"maxConcurrentGenerations": plan.concurrency, "maxDailyGenerations": plan.daily_jobs}
    models = {model for models in table()["endpoints"].values() for model in models}
    used = dict.fromkeys(sorted(models), 0)
    for asked, operation, jobs in today:
        name = reported_as(asked, operation)
        used[name] = used.get(name, 0) + jobs
    return {
        "creditBalance": balance,
        "tier": {
            "maxMonthlyCreditSpend": NO_LIMIT if plan.monthly_credits is None else plan.monthly_credits,
            "models": {name: dict(limits) for name in used},
        },
        "usage": {"models": {name: {"dailyGenerations": jobs} for name, jobs in used.items()}},
    }
