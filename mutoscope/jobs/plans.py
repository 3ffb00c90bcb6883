"""Plans: what an account may do at once, in a day, and with which features.

"unlimited" is the default of one's own machine. Plus, Pro and Ultra are the shipped examples, with the prices,
multipliers and gates of the product that the price list follows (commercial use from Plus on, agents from Pro on); a
year costs a fifth less. All other limits are ours. An account's `limits` override its plan's, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs.batches import RUNNING
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Forbidden, InvalidRequest, LimitExceeded, NotFound
from mutoscope.jobs.model import Account, State
from mutoscope.jobs.schema import accounts, batches, jobs, ledger
from mutoscope.jobs.spec import JobSpec

DAY_S = 24 * 3600.0
MONTH_S = 30 * DAY_S
ANNUAL_DISCOUNT = 0.2
ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Limits; None means none. Money in US dollars, credits a month."""

    name: str
    usd_per_month: float = 0.0
    credits_per_month: int = 0
    multiplier: int = 1
    concurrency: int | None = None  # jobs queued or running; more are throttled
    daily_jobs: int | None = None  # in any 24 hours
    monthly_credits: int | None = None  # spent in any 30 days
    overdraft: bool = False  # the balance may fall below zero
    commercial: bool = True  # told, not enforced
    agents: bool = True  # the Luma Agents API
    hdr: bool = True
    tiers: tuple[str, ...] = ("draft", "360p", "540p", "720p", "1080p", "4k")
    priorities: tuple[str, ...] = ("low", "normal", "high")

    @property
    def usd_per_year(self) -> float:
        return round(12 * self.usd_per_month * (1 - ANNUAL_DISCOUNT), 2)


BASE_CREDITS = 10_000
PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(name="unlimited", overdraft=True),
        Plan(name="free", credits_per_month=400, concurrency=1, daily_jobs=20, commercial=False,
             agents=False, hdr=False, tiers=("draft", "360p", "540p", "720p"), priorities=("low", "normal")),
        Plan(name="plus", usd_per_month=30, credits_per_month=BASE_CREDITS, concurrency=3, daily_jobs=500,
             agents=False, hdr=False, priorities=("low", "normal")),
        Plan(name="pro", usd_per_month=90, credits_per_month=4 * BASE_CREDITS, multiplier=4, concurrency=5,
             daily_jobs=2000),
        Plan(name="ultra", usd_per_month=300, credits_per_month=15 * BASE_CREDITS, multiplier=15, concurrency=20,
             daily_jobs=10_000),
    )
}  # fmt: skip
OVERRIDES = ("concurrency", "daily_jobs", "monthly_credits", "overdraft", "agents", "hdr")
AGENTS = "luma_agents"
"""The dialect that plans may leave out."""


UNLIMITED_BALANCE = 10**9
"""What is said to ask for the balance of an account that needs none; vendors' SDKs expect a number."""


def shown_balance(account: Account) -> int:
    """Credits that the account can spend."""
    return UNLIMITED_BALANCE if plan_of(account).overdraft else account.balance


def plan_of(account: Account) -> Plan:
    """The account's plan with its own limits.

    Raises:
        NotFound: the plan is not known.
    """
    return _with(account.plan, account.limits)


def _with(name: str, limits: Mapping[str, Any]) -> Plan:
    if name not in PLANS:
        raise NotFound(f"No plan {name!r}; known: {', '.join(PLANS)}.")
    return replace(PLANS[name], **{k: v for k, v in limits.items() if k in OVERRIDES})


def check_limits(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as given by an administrator.

    Raises:
        InvalidRequest: one that does not exist, or of the wrong kind.
    """
    for name, value in limits.items():
        kind = {f.name: f.type for f in fields(Plan)}.get(name, "")
        if name not in OVERRIDES:
            raise InvalidRequest(f"No limit {name!r}; known: {', '.join(OVERRIDES)}.", field=f"limits.{name}")
        right = isinstance(value, bool) if kind == "bool" else value is None or type(value) is int
        if not right or (type(value) is int and value < 0):
            raise InvalidRequest(f"limits.{name} = {value!r}, expected {kind}.", field=f"limits.{name}")
    return dict(limits)


def active_jobs(tx: Tx, account_id: str) -> int:
    """Jobs of an account that are queued or running."""
    busy = jobs.c.state.in_([State.QUEUED, State.RUNNING])
    count = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.account_id == account_id, busy)
    return int(tx.scalar(count) or 0)


def free_slots(tx: Tx, account_id: str) -> int:
    """How many more jobs of an account may be queued or running."""
    row = tx.first(sa.select(accounts.c.plan, accounts.c.limits).where(accounts.c.id == account_id))
    concurrency = _with(row.plan, row.limits).concurrency if row else None
    return ENDLESS if concurrency is None else max(0, concurrency - active_jobs(tx, account_id))


def room(tx: Tx, account_id: str) -> int:
    """How many new jobs of an account need not wait for a slot: older throttled ones go first."""
    free = free_slots(tx, account_id)
    if free == ENDLESS:
        return free
    waiting = sa.select(sa.func.count()).select_from(jobs)
    n = tx.scalar(waiting.where(jobs.c.account_id == account_id, jobs.c.state == State.THROTTLED))
    return max(0, free - int(n or 0))


def check_features(plan: Plan, spec: JobSpec, *, tier: str, dialect: str = "") -> None:
    """Raises Forbidden if the plan does not have what the job needs."""

    def need(has: bool, what: str, hint: str = "") -> None:
        if not has:
            raise Forbidden(f"{what} is not part of the plan {plan.name!r}.", hint=hint)

    need(plan.hdr or not (spec.hdr or spec.operation == "hdr"), "HDR", "Leave out hdr, or change the plan.")
    need(tier in plan.tiers, f"{tier}", f"It has {', '.join(plan.tiers)}.")
    need(spec.priority in plan.priorities, f"Priority {spec.priority}")
    need(plan.agents or dialect != AGENTS, "The Luma Agents API")


def check_quota(tx: Tx, account: Account, *, cost: int, jobs_asked: int = 1) -> None:
    """Whether the plan allows so many jobs now. Concurrency is no matter here: jobs above it wait.

    Raises:
        Forbidden: the spending limit is reached.
        InvalidRequest: more jobs at once than a whole day allows.
        LimitExceeded: too many jobs in 24 hours; says when the next one may come.
    """
    plan = plan_of(account)
    if plan.daily_jobs is not None:
        _check_day(tx, account.id, plan.daily_jobs, jobs_asked)
    if plan.monthly_credits is not None:
        spent = spent_since(tx, account.id, tx.now - MONTH_S) + account.reserved
        if spent + cost > plan.monthly_credits:
            raise Forbidden(
                f"This would bring the credits of 30 days to {spent + cost}, above the limit of "
                f"{plan.monthly_credits}.",
                hint="An administrator can raise monthly_credits.",
            )


def check(
    tx: Tx, account: Account, spec: JobSpec, *, tier: str, cost: int, jobs_asked: int = 1, dialect: str = ""
) -> None:
    """`check_features` and `check_quota`."""
    check_features(plan_of(account), spec, tier=tier, dialect=dialect)
    check_quota(tx, account, cost=cost, jobs_asked=jobs_asked)


def spent_since(tx: Tx, account_id: str, since: float) -> int:
    """Credits captured since a moment."""
    captured = (ledger.c.account_id == account_id, ledger.c.kind == "capture", ledger.c.at >= since)
    return int(tx.scalar(sa.select(sa.func.sum(ledger.c.amount)).where(*captured)) or 0)


def jobs_today(tx: Tx, account_id: str) -> int:
    """Jobs created in the last 24 hours, and those that started batches are still to make."""
    recent = (jobs.c.account_id == account_id, jobs.c.created_at > tx.now - DAY_S)
    made = tx.scalar(sa.select(sa.func.count()).select_from(jobs).where(*recent))
    started = (batches.c.account_id == account_id, batches.c.state == RUNNING)
    to_come = tx.scalar(sa.select(sa.func.sum(batches.c.total - batches.c.made)).where(*started))
    return int(made or 0) + int(to_come or 0)


def _check_day(tx: Tx, account_id: str, limit: int, asked: int) -> None:
    if asked > limit:
        raise InvalidRequest(f"{asked} jobs at once, but the plan allows {limit} in 24 hours.", field="items")
    made = jobs_today(tx, account_id)
    if made + asked <= limit:
        return
    recent = sa.select(jobs.c.created_at).where(jobs.c.account_id == account_id)
    recent = recent.where(jobs.c.created_at > tx.now - DAY_S).order_by(jobs.c.created_at)
    oldest = tx.scalar(recent.offset(made + asked - limit - 1).limit(1))
    retry = (tx.now if oldest is None else oldest) + DAY_S - tx.now  # None: one that is still to be made
    raise LimitExceeded(
        f"{made} jobs in the last 24 hours and {asked} asked; the plan allows {limit}.",
        retry_after_s=max(1.0, retry),
        hint=f"There is room again in {max(1, round(retry / 60))} minutes.",
    )
