"""Making batches: all items are checked and priced before the first job exists, or none is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from mutoscope.jobs import accounts, assets, batches, endpoints, ledger, plainjson, plans, queue
from mutoscope.jobs import router as routing
from mutoscope.jobs.batches import Batch
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, JobsError
from mutoscope.jobs.model import Caller, Priority, State, new_id
from mutoscope.jobs.schema import batches as table
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.service import Prepared, Service, check_metadata, need_scope
from mutoscope.jobs.spec import JobSpec
from mutoscope.jobs.view import Link, public

MAX_ITEMS = 10_000
DIALECT = "api"


def create(
    tx: Tx,
    service: Service,
    caller: Caller,
    specs: Sequence[JobSpec],
    *,
    confirm: bool = True,
    name: str = "",
    priority: Priority = Priority.NORMAL,
    webhook_url: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Batch:
    """A batch: started at once, or only priced and kept until `confirm`. `priority` is of items that have none.

    Raises:
        InvalidRequest: no items, too many, or one that cannot be run; named by its number from 1.
    """
    need_scope(caller, "jobs")
    accounts.get(tx, caller.account.id, hold=True)
    if not 1 <= len(specs) <= MAX_ITEMS:
        raise InvalidRequest(f"{len(specs)} items, expected 1 to {MAX_ITEMS}.", field="items")
    if webhook_url is not None:
        endpoints.check_url(webhook_url, service.settings, field="webhook_url")
    specs = [
        spec if "priority" in spec.model_fields_set else spec.model_copy(update={"priority": priority.value})
        for spec in specs
    ]
    prepared = _prepare(tx, service, caller, specs)
    row: dict[str, Any] = {
        "id": new_id(), "account_id": caller.account.id, "key_id": caller.key_id, "name": name,
        "state": batches.PRICED, "priority": priority.value, "total": len(specs), "webhook_url": webhook_url,
        "estimate": _estimate(service, prepared), "items": [spec.dump() for spec in specs],
        "metadata": dict(metadata or {}), "created_at": tx.now,
    }  # fmt: skip
    tx.run(sa.insert(table).values(row))
    if confirm:
        _start(tx, service, caller, row["id"], prepared)
    return batches.get(tx, caller.account.id, row["id"])


def confirm(tx: Tx, service: Service, caller: Caller, batch_id: str) -> Batch:
    """Start a batch that was only priced. It is priced again, by today's list.

    Raises:
        Conflict: it was started or cancelled before.
    """
    need_scope(caller, "jobs")
    accounts.get(tx, caller.account.id, hold=True)
    batch = batches.get(tx, caller.account.id, batch_id)
    if batch.state != batches.PRICED:
        raise Conflict(f"Batch {batch_id} is {batch.state}; only a priced one can be confirmed.")
    items = tx.scalar(sa.select(table.c["items"]).where(table.c.id == batch_id))
    specs = [JobSpec.model_validate(item) for item in items]
    prepared = _prepare(tx, service, caller, specs)
    mine = sa.update(table).where(table.c.id == batch_id)
    tx.run(mine.values(estimate=_estimate(service, prepared)))
    _start(tx, service, caller, batch_id, prepared)
    return batches.get(tx, caller.account.id, batch_id)


def cancel(tx: Tx, caller: Caller, batch_id: str) -> Batch:
    """What waits ends now, what runs is asked to stop, what is done stays."""
    need_scope(caller, "jobs")
    accounts.get(tx, caller.account.id, hold=True)
    batch = batches.get(tx, caller.account.id, batch_id)
    if batch.state in (batches.FINISHED, batches.CANCELLED):
        return batch
    change = sa.update(table).where(table.c.id == batch_id)
    ended = {"finished_at": tx.now} if batch.state == batches.PRICED else {}
    tx.run(change.values(state=batches.CANCELLED, items=[], **ended))
    queue.cancel_waiting(tx, batch_id)
    runs = sa.select(jobs.c.id).where(jobs.c.batch_id == batch_id, jobs.c.state == State.RUNNING)
    for row in tx.all(runs.order_by(jobs.c.seq)):
        queue.cancel(tx, row.id)
    return batches.get(tx, caller.account.id, batch_id)


def parse(text: str) -> list[JobSpec]:
    """JSON Lines: one job a line, as for `POST /api/v1/jobs`. Empty lines are passed over.

    Raises:
        InvalidRequest: names the line and the field.
    """
    specs: list[JobSpec] = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # and nothing else: texts may have other line breaks in them
        if not line.strip():
            continue
        if len(specs) == MAX_ITEMS:
            raise InvalidRequest(f"Line {number}: more than {MAX_ITEMS} items.", field="items")
        try:
            value = plainjson.loads(line)
        except ValueError as e:
            raise InvalidRequest(f"Line {number} is not JSON: {e}.", field=f"items[{len(specs)}]") from e
        specs.append(item(value, len(specs), f"Line {number}"))
    return specs


def item(value: Any, index: int, where: str = "") -> JobSpec:
    """One job of a batch, `index` from 0.

    Raises:
        InvalidRequest: names the item and the field.
    """
    where = where or f"Item {index + 1}"
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where}: a JSON object expected.", field=f"items[{index}]")
    try:
        return JobSpec.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        said = "is not a field here" if first["type"] == "extra_forbidden" else first["msg"]
        message = f"{where}, {name}: {said}." if name else f"{where}: {said}."
        raise InvalidRequest(
            message.replace("Value error, ", ""), field=f"items[{index}].{name}".rstrip(".")
        ) from e


def results(tx: Tx, account_id: str, batch_id: str, link: Link | None = None) -> Iterator[str]:
    """The jobs of a batch as JSONL, in the order in which they were given."""
    batches.get(tx, account_id, batch_id)
    for job_id in batches.job_ids(tx, batch_id):
        yield json.dumps(public(tx, queue.get(tx, job_id, deleted=True), link, live=False)) + "\n"


def _prepare(tx: Tx, service: Service, caller: Caller, specs: Sequence[JobSpec]) -> list[Prepared]:
    """Each item checked and priced, then all of them together. Items that differ only in their words and their seed are
    decided once."""
    made: list[Prepared] = []
    known: dict[str, Prepared] = {}
    for number, spec in enumerate(specs, 1):
        plain: dict[str, Any] = {
            "prompt": spec.prompt[:1],
            "negative_prompt": None,
            "seed": 0,
            "metadata": {},
        }
        like = spec.model_copy(update=plain).model_dump_json()
        try:
            check_metadata(spec)
            first = known.get(like)
            if first is None:
                first = known[like] = service.prepare(tx, caller, spec, dialect=DIALECT)
        except JobsError as e:
            e.message = f"Item {number}: {e.message}"
            if isinstance(e, InvalidRequest):
                e.field = f"items[{number - 1}].{e.field}".rstrip(".")
            raise
        resolved = replace(first.new.resolved, seed=service.seed(spec.seed))
        new = replace(first.new, id=new_id(), spec=spec.dump(), metadata=spec.metadata, resolved=resolved)
        made.append(replace(first, new=new))
    return made


def _start(tx: Tx, service: Service, caller: Caller, batch_id: str, prepared: Sequence[Prepared]) -> None:
    account = accounts.get(tx, caller.account.id)
    plan, cost = plans.plan_of(account), sum(p.new.cost for p in prepared)
    plans.check_quota(tx, account, cost=cost, jobs_asked=len(prepared))
    if not plan.overdraft:
        ledger.cover(account.balance, cost, jobs=len(prepared))
    room = plans.room(tx, account.id)
    numbered = sorted(enumerate(prepared), key=lambda p: (p[1].new.model, p[1].new.resolved.shape, p[0]))
    news = [
        replace(p.new, batch_id=batch_id, batch_index=index, admit=place < room)
        for place, (index, p) in enumerate(numbered)
    ]
    made = queue.insert_many(tx, news)
    ledger.reserve_many(tx, made, overdraft=plan.overdraft)
    routing.keep_many(tx, account.id, [(p.decision, p.new.id) for p in prepared])
    named = {m.asset for p in prepared for m in JobSpec.model_validate(p.new.spec).media() if m.asset}
    assets.used(tx, sorted(named), hours=service.settings.upload_hours)
    mine = sa.update(table).where(table.c.id == batch_id)
    tx.run(mine.values(state=batches.RUNNING, items=[], confirmed_at=tx.now))


def _estimate(service: Service, prepared: Sequence[Prepared]) -> dict[str, Any]:
    credits = sum(p.new.cost for p in prepared)
    models: dict[str, int] = {}
    for p in prepared:
        models[p.new.model] = models.get(p.new.model, 0) + 1
    seconds = round(sum(p.new.estimate_s for p in prepared), 1)
    return {
        "credits": credits,
        "usd": service.prices.usd(credits),
        "device_seconds": seconds,
        "models": models,
    }
