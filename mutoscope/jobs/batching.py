"""Making batches: all items are checked and priced before the first job exists, or none is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs import batches, endpoints, ledger, plans, queue
from mutoscope.jobs.batches import Batch
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, JobsError
from mutoscope.jobs.model import WAITING, Caller, Priority, State, new_id
from mutoscope.jobs.schema import batches as table
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.service import Prepared, Service, need_scope
from mutoscope.jobs.spec import JobSpec

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
    """A batch: started at once, or only priced and kept until `confirm`.

    Raises:
        InvalidRequest: no items, too many, or one that cannot be run; named by its number from 1.
    """
    need_scope(caller, "jobs")
    if not 1 <= len(specs) <= MAX_ITEMS:
        raise InvalidRequest(f"{len(specs)} items, expected 1 to {MAX_ITEMS}.", field="items")
    if webhook_url is not None:
        endpoints.check_url(webhook_url, service.settings, field="webhook_url")
    specs = [spec.model_copy(update={"priority": priority.value}) for spec in specs]
    prepared = _prepare(tx, service, caller, specs)
    row = {
        "id": new_id(), "account_id": caller.account.id, "key_id": caller.key_id, "name": name,
        "state": batches.PRICED, "priority": priority.value, "total": len(specs), "webhook_url": webhook_url,
        "estimate": _estimate(service, prepared), "items": [spec.dump() for spec in specs],
        "metadata": dict(metadata or {}), "created_at": tx.now,
    }  # fmt: skip
    tx.run(sa.insert(table).values(row))
    if confirm:
        _start(tx, caller, row["id"], prepared)
    return batches.get(tx, caller.account.id, row["id"])


def confirm(tx: Tx, service: Service, caller: Caller, batch_id: str) -> Batch:
    """Start a batch that was only priced. It is priced again, by today's list.

    Raises:
        Conflict: it was started or cancelled before.
    """
    need_scope(caller, "jobs")
    batch = batches.get(tx, caller.account.id, batch_id)
    if batch.state != batches.PRICED:
        raise Conflict(f"Batch {batch_id} is {batch.state}; only a priced one can be confirmed.")
    items = tx.scalar(sa.select(table.c.items).where(table.c.id == batch_id))
    specs = [JobSpec.model_validate(item) for item in items]
    prepared = _prepare(tx, service, caller, specs)
    mine = sa.update(table).where(table.c.id == batch_id)
    tx.run(mine.values(estimate=_estimate(service, prepared)))
    _start(tx, caller, batch_id, prepared)
    return batches.get(tx, caller.account.id, batch_id)


def cancel(tx: Tx, caller: Caller, batch_id: str) -> Batch:
    """What waits ends now, what runs is asked to stop, what is done stays."""
    need_scope(caller, "jobs")
    batch = batches.get(tx, caller.account.id, batch_id)
    if batch.state == batches.FINISHED:
        return batch
    change = sa.update(table).where(table.c.id == batch_id)
    ended = {"finished_at": tx.now} if batch.state == batches.PRICED else {}
    tx.run(change.values(state=batches.CANCELLED, items=[], **ended))
    open_ = sa.select(jobs.c.id).where(
        jobs.c.batch_id == batch_id, jobs.c.state.in_([*WAITING, State.RUNNING])
    )
    waiting_first = sa.case((jobs.c.state == State.THROTTLED, 0), (jobs.c.state == State.QUEUED, 1), else_=2)
    for row in tx.all(open_.order_by(waiting_first, jobs.c.seq)):
        queue.cancel(tx, row.id)
    return batches.get(tx, caller.account.id, batch_id)


def _prepare(tx: Tx, service: Service, caller: Caller, specs: Sequence[JobSpec]) -> list[Prepared]:
    """Each item checked and priced. Items that differ only in what matters to nobody here are decided once."""
    made: list[Prepared] = []
    known: dict[str, Prepared] = {}
    for number, spec in enumerate(specs, 1):
        plain = {"prompt": spec.prompt[:1], "negative_prompt": None, "seed": 0, "metadata": {}}
        like = spec.model_copy(update=plain).model_dump_json()
        try:
            first = known.get(like)
            if first is None:
                first = known[like] = service.prepare(tx, caller, spec, dialect=DIALECT)
                plans.check(tx, caller.account, spec, tier=first.new.resolved.tier, cost=first.new.cost,
                            jobs_asked=len(specs))  # fmt: skip
        except JobsError as e:
            e.message = f"Item {number}: {e.message}"
            raise
        resolved = replace(first.new.resolved, seed=service.seed(spec.seed))
        own = {"id": new_id(), "spec": spec.dump(), "metadata": spec.metadata, "resolved": resolved}
        made.append(Prepared(new=replace(first.new, **own), decision=first.decision))
    return made


def _start(tx: Tx, caller: Caller, batch_id: str, prepared: Sequence[Prepared]) -> None:
    account = caller.account
    free = plans.free_slots(tx, account.id)
    numbered = sorted(enumerate(prepared), key=lambda p: (p[1].new.model, p[1].new.resolved.shape, p[0]))
    news = [
        replace(p.new, batch_id=batch_id, batch_index=index, admit=place < free)
        for place, (index, p) in enumerate(numbered)
    ]
    made = queue.insert_many(tx, news)
    ledger.reserve_many(tx, made, overdraft=plans.plan_of(account).overdraft)
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
