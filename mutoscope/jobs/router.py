"""Which model makes a job: filter by what it can do, by capacity, then rank. Every decision is kept and can be read.

    filter     follows all tasks of the spec, can do its size and length, costs little enough, is allowed by the router
    rank       quality: the better model; cost: the cheaper one; latency: the one that is done first
    capacity   a model with `max_queue` waiting jobs is full: with fallback the next one is taken, if it is not full too

A decision also names candidates: the models, in order, that get the job if the chosen one cannot be loaded or crashes.
None of them costs more. A model that is asked for by its own name has none: whoever names a model wants that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import eta
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, NotFound, Unsupported
from mutoscope.jobs.model import Resolved, new_id
from mutoscope.jobs.pricing import Prices, table_of
from mutoscope.jobs.registry import AUTO, Model, Registry, tasks_of
from mutoscope.jobs.resolve import resolve
from mutoscope.jobs.scheduling import QUEUED
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


def route(
    tx: Tx,
    registry: Registry,
    prices: Prices,
    spec: JobSpec,
    rules: Rules | None = None,
    *,
    prefer: str = "",
) -> Decision:
    """Decide. Changes nothing; `keep` records it. `prefer`: the model that "auto" takes if it can do the job.

    Raises:
        InvalidRequest, Unsupported: no model can do it; says why for each.
    """
    named = registry.target(spec.model)
    asked = [registry.get(named)] if named != AUTO else list(registry.models())
    if not asked:
        raise Unsupported("No model is installed.", field="model", hint="`mutoscope pull` installs one.")
    rules = rules or Rules(optimize_for=spec.optimize_for, on_capacity=spec.fallback)
    options, filtered = _filter(asked, prices, spec, rules)
    if not options:
        raise _none_can(filtered)
    ranked, reason = _rank(tx, options, rules.optimize_for)
    if prefer:
        ranked.sort(key=lambda pair: pair[0].model.name != prefer)  # stable: the rest stays in order
    best = [option for option, _ in ranked]
    full = [option for option in best if _is_full(tx, option.model)]
    exhausted = len(full) == len(best)
    chosen = best[0] if exhausted or not rules.on_capacity else next(o for o in best if o not in full)
    skipped = [o.model.name for o in best[: best.index(chosen)]]
    data: dict[str, Any] = {
        "asked": spec.model,
        "optimizeFor": rules.optimize_for,
        "filter": filtered,
        "capacity": {"full": [o.model.name for o in full]},
        "capacityFallback": {"allExhausted": exhausted, "skipped": skipped}
        if full and rules.on_capacity
        else None,
        "rank": [
            {"model": o.model.name, "credits": o.cost, "seconds": round(s, 3), "resolved": asdict(o.resolved)}
            for o, s in ranked
        ],
        "chosen": chosen.model.name,
        "reasonCode": "only_eligible_model" if len(options) == 1 else reason,
        "estimatedCost": chosen.cost,
    }
    rest = tuple(o.model.name for o in best if o is not chosen and o.cost <= chosen.cost)
    return Decision(
        model=chosen.model,
        resolved=chosen.resolved,
        cost=chosen.cost,
        candidates=rest if spec.fallback and named == AUTO else (),
        data=data,
    )


def _none_can(filtered: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    first = filtered[0]
    kind = Unsupported if all(f["code"] == "capability" for f in filtered) else InvalidRequest
    if len(filtered) == 1:
        return kind(f"{first['model']} cannot do this: {first['why']}", field=first["field"])
    each = "; ".join(f"{f['model']}: {f['why'].rstrip('.')}" for f in filtered)
    return kind(f"No model can do this. {each}.", field=first["field"])


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What a job comes to on another model of its decision."""

    resolved: Resolved
    cost: int


def alternative(tx: Tx, job_id: str, model: str) -> Alternative | None:
    """The numbers and the price of a job on a candidate, as its decision recorded them."""
    c = routing_decisions.c
    data = tx.scalar(sa.select(c.data).where(c.job_id == job_id).order_by(c.seq.desc()).limit(1))
    for entry in data["rank"] if data else ():
        if entry["model"] == model:
            return Alternative(resolved=Resolved(**entry["resolved"]), cost=int(entry["credits"]))
    return None


def keep(
    tx: Tx, account_id: str, decision: Decision, *, job_id: str | None = None, router_id: str | None = None
) -> str:
    """Record a decision; its id."""
    return keep_many(tx, account_id, [(decision, job_id)], router_id=router_id)[0]


def keep_many(
    tx: Tx, account_id: str, made: Sequence[tuple[Decision, str | None]], *, router_id: str | None = None
) -> list[str]:
    """Record decisions, each with the job that it is about."""
    common = {"account_id": account_id, "router_id": router_id, "at": tx.now}
    rows: list[dict[str, Any]] = [
        {"id": new_id(), "job_id": job_id, "chosen": d.model.name, "data": d.data, **common}
        for d, job_id in made
    ]
    tx.conn.execute(sa.insert(routing_decisions), rows)
    return [row["id"] for row in rows]


def prune(tx: Tx, before: float, *, limit: int = 10_000) -> int:
    """Forget decisions from before a time, at most `limit` at once. Returns how many."""
    c = routing_decisions.c
    first = tx.scalar(sa.select(sa.func.min(c.seq)))
    return tx.run(sa.delete(routing_decisions).where(c.seq < (first or 0) + limit, c.at < before))


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
    waiting = sa.select(jobs.c.seq).where(QUEUED, jobs.c.model == model.name).limit(most).subquery()
    return int(tx.scalar(sa.select(sa.func.count()).select_from(waiting)) or 0) >= most


def _rank(tx: Tx, options: Sequence[_Option], optimize_for: str) -> tuple[list[tuple[_Option, float]], str]:
    """Best first, each with the seconds until it would be done; and the reason of the order.

    By latency the times have to be known: as long as not every model was run once, the order is that of the filter.
    """
    times = {o.model.name: eta.estimate(tx, o.model.name, None, o.resolved) for o in options}
    if len(options) == 1:
        return [(options[0], times[options[0].model.name].seconds)], REASONS[optimize_for]
    alive = (workers.c.state != "gone", workers.c.beat_at > tx.now - eta.ALIVE_S)
    loaded = {row.model for row in tx.all(sa.select(workers.c.model).where(*alive))}
    waits = sa.select(jobs.c.model, sa.func.sum(jobs.c.estimate_s)).where(QUEUED)
    ahead = {model: float(total) for model, total in tx.all(waits.group_by(jobs.c.model))}
    n = eta.live_workers(tx)

    def done_after(option: _Option) -> float:
        name = option.model.name
        load = 0.0 if name in loaded else _load_s(tx, name)
        return times[name].seconds + load + ahead.get(name, 0.0) / n

    timed = [(option, done_after(option)) for option in options]
    if optimize_for == "latency" and any(not _was_run(tx, o.model.name) for o in options):
        return timed, "filter_order_fallback"
    keys = {
        "quality": lambda t: (-t[0].model.quality, t[1], t[0].model.name),
        "cost": lambda t: (t[0].cost, -t[0].model.quality, t[0].model.name),
        "latency": lambda t: (t[1], -t[0].model.quality, t[0].model.name),
    }
    return sorted(timed, key=keys[optimize_for]), REASONS[optimize_for]


def _was_run(tx: Tx, model: str) -> bool:
    return tx.first(sa.select(timings.c.id).where(timings.c.model == model).limit(1)) is not None


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
    row: dict[str, Any] = {"id": new_id(), "account_id": account_id, "slug": slug, "name": name or slug}
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
