"""Making batches: all items are checked and priced before the first job exists, or none is made.

What is accepted is written in one transaction: the batch, its credits, and its first jobs. If there are many, `go_on`
makes the others in pieces, so that nobody else waits for long; whoever looks counts them as queued already. If the
process dies in between, housekeeping goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from mutoscope.jobs import accounts, assets, batches, endpoints, ledger, plainjson, plans, queue
from mutoscope.jobs import router as routing
from mutoscope.jobs.batches import Batch
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, JobsError
from mutoscope.jobs.model import Account, Caller, Priority, State, new_id
from mutoscope.jobs.schema import batches as table
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.service import Prepared, Service, check_metadata, need_scope
from mutoscope.jobs.spec import JobSpec, first_mistake
from mutoscope.jobs.view import Link, public

log = logging.getLogger("mutoscope.jobs")

MAX_ITEMS = 10_000
PIECE = 250
"""Jobs that one transaction makes."""
MOST_PAUSE_S = 0.3
"""Between two pieces is a pause as long as a piece takes: SQLite lets in who asks, not who has waited longest."""
LEFT_S = 60.0
"""A batch that is not complete after that long was left by a process that died."""
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
    prepared: Sequence[Prepared] = (),
) -> Batch:
    """A batch: started at once, or only priced and kept until `confirm`. `priority` is of items that have none.
    `prepared`: what `prepare` made of them before, so that others need not wait for it.

    Raises:
        InvalidRequest: no items, too many, or one that cannot be run; named by its number from 1.
    """
    need_scope(caller, "jobs")
    accounts.get(tx, caller.account.id, hold=True)
    prepared = prepared or prepare(tx, service, caller, specs, priority)
    if webhook_url is not None:
        endpoints.check_url(webhook_url, service.settings, field="webhook_url")
    row: dict[str, Any] = {
        "id": new_id(), "account_id": caller.account.id, "key_id": caller.key_id, "name": name,
        "state": batches.PRICED, "priority": priority.value, "total": len(specs), "webhook_url": webhook_url,
        "estimate": _estimate(service, prepared), "items": [] if confirm else [p.new.spec for p in prepared],
        "metadata": dict(metadata or {}), "created_at": tx.now,
    }  # fmt: skip
    tx.run(sa.insert(table).values(row))
    if confirm:
        _start(tx, service, caller, row["id"], prepared)
    return batches.get(tx, caller.account.id, row["id"])


def prepare(
    tx: Tx, service: Service, caller: Caller, specs: Sequence[JobSpec], priority: Priority
) -> list[Prepared]:
    """Each item checked, routed and priced. Changes nothing.

    Raises:
        InvalidRequest: see `create`.
    """
    if not 1 <= len(specs) <= MAX_ITEMS:
        raise InvalidRequest(f"{len(specs)} items, expected 1 to {MAX_ITEMS}.", field="items")
    own = {"priority": priority.value}
    return _prepare(tx, service, caller,
                    [s if "priority" in s.model_fields_set else s.model_copy(update=own) for s in specs])  # fmt: skip


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
    """What waits ends now, what runs is asked to stop, what is done stays. Of a large batch a piece ends here and the
    others in `stop_rest`; whoever looks counts them as cancelled already."""
    need_scope(caller, "jobs")
    accounts.get(tx, caller.account.id, hold=True)
    batch = batches.get(tx, caller.account.id, batch_id)
    if batch.state in (batches.FINISHED, batches.CANCELLED):
        return batch
    mine = table.c.id == batch_id
    ledger.hold(
        tx, batch.account_id, -tx.scalar(sa.select(table.c.held).where(mine)), batch_id, overdraft=True
    )
    ended = {"finished_at": tx.now} if batch.state == batches.PRICED else {}
    tx.run(sa.update(table).where(mine).values(state=batches.CANCELLED, items=[], held=0, **ended))
    _stop_some(tx, batch_id)
    batches.on_end(tx, batch_id)  # what was made may have ended before
    return batches.get(tx, caller.account.id, batch_id)


def stop_rest(db: Database, batch_id: str) -> None:
    """End what still waits of a cancelled batch, piece by piece; what began to run meanwhile is asked to stop."""
    with db.read() as tx:
        batch = tx.first(sa.select(table.c.account_id, table.c.state).where(table.c.id == batch_id))
    more = batch is not None and batch.state == batches.CANCELLED
    while more:
        assert batch is not None
        began = time.monotonic()
        with db.write() as tx:
            accounts.get(tx, batch.account_id, hold=True)
            more = _stop_some(tx, batch_id)
        time.sleep(min(MOST_PAUSE_S, time.monotonic() - began) if more else 0)


def _stop_some(tx: Tx, batch_id: str) -> bool:
    """Whether there may be more that waits."""
    ended = queue.cancel_waiting(tx, batch_id, limit=PIECE)
    runs = sa.select(jobs.c.id).where(jobs.c.batch_id == batch_id, jobs.c.state == State.RUNNING)
    for row in tx.all(runs.order_by(jobs.c.seq)):
        queue.cancel(tx, row.id)
    return ended == PIECE


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
        name, said = first_mistake(e)
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


def go_on(db: Database, service: Service, batch_id: str) -> None:
    """Make the jobs of a started batch that are still to come. Two that do it at once take turns."""
    columns = (table.c.account_id, table.c.key_id, table.c.state, table.c["items"])
    try:
        with db.read() as tx:
            row = tx.first(sa.select(*columns).where(table.c.id == batch_id))
        if row is None or row.state != batches.RUNNING:
            return
        more = bool(row._mapping["items"])
        while more:
            began = time.monotonic()
            with db.write() as tx:
                more = _next_piece(tx, service, _owner(tx, row), batch_id, row._mapping["items"])
            time.sleep(min(MOST_PAUSE_S, time.monotonic() - began) if more else 0)
    except sa.exc.OperationalError as e:
        log.warning("batch %s: the database: %s; housekeeping goes on with it", batch_id, e.orig)
    except JobsError as e:  # a model or file is gone that was there when it was accepted
        log.warning("batch %s: the rest cannot be made and is cancelled: %s", batch_id, e)
        with db.write() as tx:
            cancel(tx, _owner(tx, row), batch_id)


def _owner(tx: Tx, row: Any) -> Caller:
    """Who the batch belongs to, held."""
    account = accounts.get(tx, row.account_id, hold=True)
    return Caller(account=account, key_id=row.key_id, scopes=("jobs",))


def go_on_with_left(db: Database, service: Service) -> int:
    """Batches that a process which died has left, half made or half cancelled; how many were half made."""
    with db.read() as tx:
        left = sa.select(table.c.id).where(table.c.state == batches.RUNNING, table.c.made < table.c.total)
        found = [row.id for row in tx.all(left.where(table.c.confirmed_at < tx.now - LEFT_S))]
        ends = sa.select(table.c.id).where(table.c.state == batches.CANCELLED, table.c.finished_at.is_(None))
        cancelled = [row.id for row in tx.all(ends)]
    for batch_id in found:
        go_on(db, service, batch_id)
    for batch_id in cancelled:
        stop_rest(db, batch_id)
    return len(found)


def _start(tx: Tx, service: Service, caller: Caller, batch_id: str, prepared: Sequence[Prepared]) -> None:
    account = accounts.get(tx, caller.account.id)
    plan, cost = plans.plan_of(account), sum(p.new.cost for p in prepared)
    plans.check_quota(tx, account, cost=cost, jobs_asked=len(prepared))
    if not plan.overdraft:
        ledger.cover(account.balance, cost, jobs=len(prepared))
    numbered = sorted(enumerate(prepared), key=lambda p: (p[1].new.model, p[1].new.resolved.shape, p[0]))
    rest = [{"index": i, "cost": p.new.cost, "spec": dict(p.new.spec)} for i, p in numbered[PIECE:]]
    held = sum(p.new.cost for _, p in numbered[PIECE:])
    ledger.hold(tx, account.id, held, batch_id, overdraft=plan.overdraft)
    _make(tx, account, batch_id, numbered[:PIECE], overdraft=plan.overdraft)
    named = {asset for p in prepared for asset in _assets({**p.new.spec, "metadata": {}})}
    assets.used(tx, sorted(named), hours=service.settings.upload_hours)
    mine = sa.update(table).where(table.c.id == batch_id)
    made = {"made": len(prepared) - len(rest), "held": held, "items": rest}
    tx.run(mine.values(state=batches.RUNNING, confirmed_at=tx.now, **made))


def _next_piece(
    tx: Tx, service: Service, caller: Caller, batch_id: str, items: Sequence[Mapping[str, Any]]
) -> bool:
    """Make some of what is to come; False: that was all. `items` are those that the batch began without."""
    mine = table.c.id == batch_id
    row = tx.first(sa.select(table.c.state, table.c.made, table.c.total, table.c.held).where(mine))
    if row is None or row.state != batches.RUNNING or row.made >= row.total:
        return False
    first = row.made - (row.total - len(items))
    part = items[first : first + PIECE]
    prepared = _prepare(tx, service, caller, [JobSpec.model_validate(item["spec"]) for item in part])
    numbered = [
        (
            item["index"],
            replace(p, new=replace(p.new, cost=min(p.new.cost, item["cost"]))),
        )  # as it was accepted
        for item, p in zip(part, prepared, strict=True)
    ]
    made, held = row.made + len(part), sum(item["cost"] for item in part)
    ledger.hold(tx, caller.account.id, -held, batch_id, overdraft=True)
    _make(tx, caller.account, batch_id, numbered, overdraft=True)  # it was covered when it was accepted
    tx.run(sa.update(table).where(mine).values(made=made, held=row.held - held))
    if made < row.total:
        return True
    tx.run(sa.update(table).where(mine).values(items=[]))
    batches.on_end(tx, batch_id)
    return False


def _make(
    tx: Tx, account: Account, batch_id: str, numbered: Sequence[tuple[int, Prepared]], *, overdraft: bool
) -> None:
    room = plans.room(tx, account.id)
    news = [
        replace(p.new, batch_id=batch_id, batch_index=index, admit=place < room)
        for place, (index, p) in enumerate(numbered)
    ]
    ledger.reserve_many(tx, queue.insert_many(tx, news), overdraft=overdraft)
    routing.keep_many(tx, account.id, [(p.decision, p.new.id) for _, p in numbered])


def _assets(spec: Any) -> Iterator[str]:
    """Ids of the files that a dumped spec names."""
    if isinstance(spec, dict):
        if isinstance(spec.get("asset"), str):
            yield spec["asset"]
        spec = list(spec.values())
    if isinstance(spec, list):
        for part in spec:
            yield from _assets(part)


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
