"""Which model makes a job: filter by what it can do, by capacity, then rank. Every decision is kept and can be read.

    filter     follows all tasks of the spec, can do its size and length, within the price ceiling, allowed by the router
    capacity   a model with `max_queue` waiting jobs is full; with fallback the next one is taken
    rank       quality: the better model; cost: the cheaper one; latency: the one that is done first

A decision also names candidates: the models, in order, that get the job if the chosen one cannot be loaded or crashes.
A model that is asked for by its own name has none: whoever names a model wants that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import eta
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, LimitExceeded, NotFound, Unsupported
from mutoscope.jobs.model import Resolved, State, new_id
from mutoscope.jobs.pricing import Prices, table_of
from mutoscope.jobs.registry import AUTO, Model, Registry, tasks_of
from mutoscope.jobs.resolve import resolve
from mutoscope.jobs.schema import jobs, routers, routing_decisions, timings, workers
from mutoscope.jobs.spec import JobSpec

OPTIMIZE = ("quality", "cost", "latency")
REASONS = {"quality": "best_quality", "cost": "lowest_cost", "latency": "best_latency"}
SLUG = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
LOAD_GUESS_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a router decides by. Models in `ids` are those left out, or the only ones allowed."""

    optimize_for: str = "quality"
    mode: str = "allow_new_except"  # or "allowlist_only"
    ids: tuple[str, ...] = ()
    max_credits: dict[str, int] = field(default_factory=dict)  # by "video", "image"
    on_capacity: bool = True  # take the next model when the best one is full
    shown: dict[str, Any] = field(default_factory=dict)  # whatever a dialect wants back

    def allows(self, model: str) -> bool:
        return (model in self.ids) == (self.mode == "allowlist_only")


@dataclass(frozen=True, kw_only=True)
class Router:
    """A named set of rules of an account."""

    id: str
    account_id: str
    slug: str
    name: str
    rules: Rules
    created_at: float
    updated_at: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, and why (`data`, JSON)."""

    model: Model
    resolved: Resolved
    cost: int
    candidates: tuple[str, ...]
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class KeptDecision:
    """A decision as it was recorded."""

    seq: int
    id: str
    router_id: str | None
    job_id: str | None
    at: float
    chosen: str
    data: dict[str, Any]


@dataclass(frozen=True)
class _Option:
    model: Model
    resolved: Resolved
    cost: int


def route(tx: Tx, registry: Registry, prices: Prices, spec: JobSpec, rules: Rules | None = None) -> Decision:
    """Decide. Changes nothing; `keep` records it.

    Raises:
        InvalidRequest, Unsupported: no model can do it; says why for the one that was asked for.
        LimitExceeded: every model that can is full.
    """
    named = registry.target(spec.model)
    asked = [registry.get(named)] if named != AUTO else list(registry.models())
    if not asked:
        raise Unsupported("No model is installed.", field="model", hint="`mutoscope pull` installs one.")
    rules = rules or Rules(optimize_for=spec.optimize_for, on_capacity=spec.fallback)
    options, filtered = _filter(asked, prices, spec, rules)
    data: dict[str, Any] = {"asked": spec.model, "optimizeFor": rules.optimize_for, "filter": filtered}
    if not options:
        first = filtered[0]
        kind = Unsupported if first["code"] == "capability" else InvalidRequest
        names = ", ".join(f["model"] for f in filtered)
        why = first["why"] if len(filtered) == 1 else "; ".join(f"{f['model']}: {f['why']}" for f in filtered)
        raise kind(f"No model can do this ({names}): {why}", field=first["field"])
    ranked = _rank(tx, options, rules.optimize_for)
    data["rank"] = [{"model": o.model.name, "credits": o.cost, "seconds": round(s, 3)} for o, s in ranked]
    free = [option for option, _ in ranked]
    full = [o for o in free if _is_full(tx, o.model)]
    data["capacity"] = {"full": [o.model.name for o in full]}
    chosen = free[0]
    if chosen in full and rules.on_capacity and len(full) < len(free):
        chosen = next(o for o in free if o not in full)
    elif chosen in full:
        raise LimitExceeded(
            f"{chosen.model.name} has {chosen.model.manifest.service.max_queue} jobs waiting already.",
            retry_after_s=max(1.0, ranked[0][1]), hint="Try again later, or allow another model.",
        )  # fmt: skip
    skipped = [o.model.name for o in free[: free.index(chosen)]]
    reason = "only_eligible_model" if len(options) == 1 else REASONS[rules.optimize_for]
    data |= {"chosen": chosen.model.name, "reasonCode": "filter_order_fallback" if skipped else reason}
    data["capacityFallback"] = {"allExhausted": False, "skipped": skipped} if skipped else None
    data["estimatedCost"] = chosen.cost
    rest = tuple(o.model.name for o in free if o is not chosen and o.cost <= chosen.cost)
    candidates = rest if spec.fallback and named == AUTO else ()
    return Decision(
        model=chosen.model, resolved=chosen.resolved, cost=chosen.cost, candidates=candidates, data=data
    )


def keep(
    tx: Tx, account_id: str, decision: Decision, *, job_id: str | None = None, router_id: str | None = None
) -> str:
    """Record a decision; its id."""
    row = {"id": new_id(), "account_id": account_id, "router_id": router_id, "job_id": job_id, "at": tx.now}
    tx.run(sa.insert(routing_decisions).values(**row, chosen=decision.model.name, data=decision.data))
    return str(row["id"])


def decisions(
    tx: Tx,
    account_id: str,
    *,
    router_id: str | None = None,
    job_id: str | None = None,
    before: int | None = None,
    limit: int = 50,
) -> list[KeptDecision]:
    """Recorded decisions, newest first; `before` is the `seq` of the last one seen."""
    c = routing_decisions.c
    query = sa.select(routing_decisions).where(c.account_id == account_id)
    if router_id is not None:
        query = query.where(c.router_id == router_id)
    if job_id is not None:
        query = query.where(c.job_id == job_id)
    if before is not None:
        query = query.where(c.seq < before)
    names = tuple(KeptDecision.__dataclass_fields__)
    rows = tx.all(query.order_by(c.seq.desc()).limit(limit))
    return [KeptDecision(**{name: row._mapping[name] for name in names}) for row in rows]


# -- the three stages ----------------------------------------------------------------------------------------


def _filter(
    asked: Sequence[Model], prices: Prices, spec: JobSpec, rules: Rules
) -> tuple[list[_Option], list[dict[str, Any]]]:
    options: list[_Option] = []
    told = []
    ceilings = [spec.max_credits, rules.max_credits.get("image" if spec.operation == "image" else "video")]
    ceiling = min((c for c in ceilings if c is not None), default=None)
    for model in asked:
        why = code = where = ""
        resolved, cost = None, 0
        missing = [task for task in tasks_of(spec) if task not in model.tasks]
        if not rules.allows(model.name):
            why, code, where = "the router leaves it out.", "rule", "model"
        elif missing:
            why = f"{model.name} does not follow {', '.join(missing)}."
            code, where = "capability", "model"
        else:
            try:
                resolved = resolve(spec, model)
                cost = prices.price(spec, resolved, model.manifest.service.price_factor)
            except InvalidRequest as e:
                why, code, where = str(e), "capability" if isinstance(e, Unsupported) else "limits", e.field
        if not why and ceiling is not None and cost > ceiling:
            why, code, where = f"costs {cost} credits, at most {ceiling} are allowed.", "price", "max_credits"
        entry = {"model": model.name, "kept": not why, "why": why, "code": code, "field": where}
        told.append(entry | {"credits": cost, "table": table_of(spec)})
        if not why and resolved is not None:
            options.append(_Option(model, resolved, cost))
    return options, told


def _is_full(tx: Tx, model: Model) -> bool:
    most = model.manifest.service.max_queue
    if not most:
        return False
    waiting = sa.select(sa.func.count()).select_from(jobs)
    return (
        int(tx.scalar(waiting.where(jobs.c.state == State.QUEUED, jobs.c.model == model.name)) or 0) >= most
    )


def _rank(tx: Tx, options: Sequence[_Option], optimize_for: str) -> list[tuple[_Option, float]]:
    """Best first, with the seconds until each would be done."""
    if len(options) == 1:
        return [(options[0], eta.estimate(tx, options[0].model.name, None, options[0].resolved).seconds)]
    loaded = {row.model for row in tx.all(sa.select(workers.c.model).where(workers.c.state != "gone"))}
    waits = sa.select(jobs.c.model, sa.func.sum(jobs.c.estimate_s)).where(jobs.c.state == State.QUEUED)
    ahead = {model: float(total) for model, total in tx.all(waits.group_by(jobs.c.model))}

    def done_after(option: _Option) -> float:
        name = option.model.name
        load = 0.0 if name in loaded else _load_s(tx, name)
        return eta.estimate(tx, name, None, option.resolved).seconds + load + ahead.get(name, 0.0)

    timed = [(option, done_after(option)) for option in options]
    keys = {
        "quality": lambda t: (-t[0].model.quality, t[1], t[0].model.name),
        "cost": lambda t: (t[0].cost, -t[0].model.quality, t[0].model.name),
        "latency": lambda t: (t[1], -t[0].model.quality, t[0].model.name),
    }
    return sorted(timed, key=keys[optimize_for])


def _load_s(tx: Tx, model: str) -> float:
    seen = tx.scalar(sa.select(sa.func.max(timings.c.load_s)).where(timings.c.model == model))
    return float(seen) if seen else LOAD_GUESS_S


# -- routers -------------------------------------------------------------------------------------------------


def create(tx: Tx, account_id: str, *, slug: str, name: str, rules: Rules) -> Router:
    """A new router.

    Raises:
        InvalidRequest: a slug that is not small letters, digits, - and _; rules that make no sense.
        Conflict: the account has this slug.
    """
    if not SLUG.match(slug):
        raise InvalidRequest(f"slug = {slug!r}, expected small letters, digits, - and _.", field="slug")
    _check(rules)
    if tx.first(_mine(account_id).where(routers.c.slug == slug)) is not None:
        raise Conflict(f"There is a router {slug!r} already.")
    row = {"id": new_id(), "account_id": account_id, "slug": slug, "name": name or slug}
    row |= {"settings": _json(rules), "created_at": tx.now, "updated_at": tx.now}
    tx.run(sa.insert(routers).values(row))
    return get(tx, account_id, row["id"])


def get(tx: Tx, account_id: str, id_or_slug: str) -> Router:
    """One router, by id or slug.

    Raises:
        NotFound: the account has none.
    """
    row = tx.first(_mine(account_id).where((routers.c.id == id_or_slug) | (routers.c.slug == id_or_slug)))
    if row is None:
        raise NotFound(f"No router {id_or_slug!r}.")
    return _router(row)


def listing(tx: Tx, account_id: str) -> list[Router]:
    """All routers of an account, oldest first."""
    return [_router(row) for row in tx.all(_mine(account_id).order_by(routers.c.created_at, routers.c.id))]


def change(
    tx: Tx, account_id: str, router_id: str, *, slug: str | None = None, name: str | None = None,
    rules: Rules | None = None,
) -> Router:  # fmt: skip
    """Change what is given."""
    router = get(tx, account_id, router_id)
    values: dict[str, Any] = {"updated_at": tx.now}
    if slug is not None and slug != router.slug:
        if not SLUG.match(slug):
            raise InvalidRequest(f"slug = {slug!r}, expected small letters, digits, - and _.", field="slug")
        if tx.first(_mine(account_id).where(routers.c.slug == slug)) is not None:
            raise Conflict(f"There is a router {slug!r} already.")
        values["slug"] = slug
    if name is not None:
        values["name"] = name
    if rules is not None:
        _check(rules)
        values["settings"] = _json(rules)
    tx.run(sa.update(routers).where(routers.c.id == router.id).values(values))
    return get(tx, account_id, router.id)


def delete(tx: Tx, account_id: str, router_id: str) -> None:
    """Its recorded decisions stay."""
    tx.run(sa.delete(routers).where(routers.c.id == get(tx, account_id, router_id).id))


def _mine(account_id: str) -> sa.Select[Any]:
    return sa.select(routers).where(routers.c.account_id == account_id)


def _check(rules: Rules) -> None:
    if rules.optimize_for not in OPTIMIZE:
        raise InvalidRequest(
            f"optimize_for = {rules.optimize_for!r}, expected one of {', '.join(OPTIMIZE)}.",
            field="optimize_for",
        )
    if rules.mode not in ("allow_new_except", "allowlist_only"):
        raise InvalidRequest(
            f"mode = {rules.mode!r}, expected allow_new_except or allowlist_only.", field="models.mode"
        )
    if any(v < 0 for v in rules.max_credits.values()):
        raise InvalidRequest("A price ceiling is below 0.", field="max_credits")


def _json(rules: Rules) -> Mapping[str, Any]:
    return {**vars(rules), "ids": list(rules.ids)}


def _router(row: Row[Any]) -> Router:
    m = row._mapping
    rules = Rules(**{**m["settings"], "ids": tuple(m["settings"]["ids"])})
    named = {f: m[f] for f in ("id", "account_id", "slug", "name", "created_at", "updated_at")}
    return Router(**named, rules=rules)
