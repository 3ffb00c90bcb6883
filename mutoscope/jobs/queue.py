"""Jobs move here. `_move_all` is the only place where a state changes.

Whoever changes a running job names its fence, the number of its current lease. A worker that lost its lease has an old
one: its writes find no row, and the functions return None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import batches, eta, feed, ledger, outbox, plans, router
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, NotFound
from mutoscope.jobs.model import (
    TERMINAL,
    TRANSITIONS,
    WAITING,
    Failure,
    Job,
    JobEvent,
    Output,
    Priority,
    Resolved,
    State,
    new_id,
)
from mutoscope.jobs.scheduling import (
    ORDER,
    QUEUED,
    RUNNING,
    Tagger,
    Tags,
    affinity,
    give_back,
    in_state,
    round_length,
    tags_at,
    virtual_time,
)
from mutoscope.jobs.schema import accounts, jobs
from mutoscope.settings import Settings

LEASE_S = 30.0
MAX_CRASHES = 3

SOURCES: dict[JobEvent, tuple[State, ...]] = {
    event: tuple(state for state, e in TRANSITIONS if e is event) for event in JobEvent
}
TARGET: dict[JobEvent, State] = {event: state for (_, event), state in TRANSITIONS.items()}
TOLD = {
    State.RUNNING: "job.running", State.SUCCEEDED: "job.succeeded", State.FAILED: "job.failed",
    State.CANCELLED: "job.cancelled",
}  # fmt: skip
_START = {"stage": "", "step": 0, "steps": 0, "progress": 0.0}
_WAIT = {**_START, "worker_id": None, "lease_until": None, "eta_at": None, "started_at": None}


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a job begins with. `admit` False: it waits for a slot of its account (THROTTLED)."""

    account_id: str
    dialect: str
    operation: str
    model: str
    spec: Mapping[str, Any]
    resolved: Resolved
    cost: int
    estimate_s: float
    time_limit_s: float
    id: str = field(default_factory=new_id)
    key_id: str | None = None
    model_asked: str = "auto"
    candidates: tuple[str, ...] = ()
    vendor: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    priority: Priority = Priority.NORMAL
    admit: bool = True
    webhook_url: str | None = None
    dedupe: str | None = None
    batch_id: str | None = None
    batch_index: int | None = None
    parent_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some of an account's jobs. `total` counts all that match."""

    jobs: tuple[Job, ...]
    has_more: bool
    total: int


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a worker learns when it says that it lives."""

    valid: bool  # the lease is still its own
    cancel_asked: bool


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """A running job whose worker has to be killed."""

    job: Job
    kind: str  # "cancel": it was asked to stop and did not; "time": it runs for too long
    why: str


# -- in and out ----------------------------------------------------------------------------------------------


def insert(tx: Tx, new: NewJob) -> Job:
    """A new job; see `insert_many`."""
    return insert_many(tx, [new])[0]


def insert_many(tx: Tx, news: Sequence[NewJob]) -> list[Job]:
    """New jobs, numbered in this order; among each other they are dispatched like next to like. Credits are not
    touched: `service.submit` reserves them."""
    if not news:
        return []
    kinds = [affinity(new.model, new.resolved) for new in news]
    places: dict[int, Tags] = {}
    taggers: dict[str, Tagger] = {}
    for i in sorted(range(len(news)), key=lambda i: (kinds[i], i)):
        new = news[i]
        if new.account_id not in taggers:
            taggers[new.account_id] = Tagger(tx, new.account_id)
        places[i] = taggers[new.account_id].place(new.priority, new.estimate_s, kinds[i])
    for tagger in taggers.values():
        tagger.save()
    tx.conn.execute(sa.insert(jobs), [_row(new, places[i], tx.now) for i, new in enumerate(news)])
    made = _by_ids(tx, [new.id for new in news])
    feed.write_many(tx, ((job, "state", _seen(job)) for job in made))
    for account_id in taggers:
        if outbox.listens(tx, account_id, "job.created"):
            for job in made:
                if job.account_id == account_id:
                    outbox.enqueue(tx, job, "job.created")
    return made


def _row(new: NewJob, place: Tags, now: float) -> dict[str, Any]:
    row = {**vars(new), "resolved": asdict(new.resolved), "candidates": list(new.candidates)}
    row |= {"spec": dict(new.spec), "vendor": dict(new.vendor), "metadata": dict(new.metadata)}
    del row["admit"]
    state = State.QUEUED if new.admit else State.THROTTLED
    return {**row, **vars(place), "state": state, "created_at": now, "outputs": [], "result": {}}


def _by_ids(tx: Tx, ids: Sequence[str]) -> list[Job]:
    found: dict[str, Job] = {}
    for start in range(0, len(ids), 500):
        part = sa.select(jobs).where(jobs.c.id.in_(ids[start : start + 500]))
        found |= {row.id: from_row(row) for row in tx.all(part)}
    return [found[i] for i in ids]


def get(tx: Tx, job_id: str, *, account_id: str | None = None, deleted: bool = False) -> Job:
    """One job.

    Raises:
        NotFound: there is none of this id, for this account, or it was deleted.
    """
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if account_id is not None:
        query = query.where(jobs.c.account_id == account_id)
    if not deleted:
        query = query.where(jobs.c.deleted_at.is_(None))
    row = tx.first(query)
    if row is None:
        raise NotFound(f"No job {job_id}.")
    return from_row(row)


def listing(
    tx: Tx,
    account_id: str | None,
    *,
    limit: int = 20,
    after: str | None = None,
    before: str | None = None,
    order: str = "desc",
    states: Collection[State] = (),
    dialects: Collection[str] = (),
    operations: Collection[str] = (),
    batch_id: str | None = None,
    offset: int = 0,
) -> Page:
    """Jobs of an account (None: of all), newest first unless `order` is "asc". `after` and `before` are ids of jobs:
    the page begins behind the one and ends ahead of the other in this order."""
    chosen: list[sa.ColumnElement[bool]] = [jobs.c.deleted_at.is_(None)]
    if account_id is not None:
        chosen.append(jobs.c.account_id == account_id)
    for column, values in (
        (jobs.c.state, states),
        (jobs.c.dialect, dialects),
        (jobs.c.operation, operations),
    ):
        if values:
            chosen.append(column.in_(list(values)))
    if batch_id is not None:
        chosen.append(jobs.c.batch_id == batch_id)
    total = int(tx.scalar(sa.select(sa.func.count()).select_from(jobs).where(*chosen)) or 0)
    down = order == "desc"
    for cursor, behind in ((after, True), (before, False)):
        if cursor is not None:
            seq = get(tx, cursor, account_id=account_id, deleted=True).seq
            chosen.append(jobs.c.seq < seq if down == behind else jobs.c.seq > seq)
    query = sa.select(jobs).where(*chosen).order_by(jobs.c.seq.desc() if down else jobs.c.seq)
    rows = tx.all(query.limit(limit + 1).offset(offset))
    return Page(jobs=tuple(from_row(r) for r in rows[:limit]), has_more=len(rows) > limit, total=total)


def depth(tx: Tx) -> dict[State, int]:
    """How many jobs are in each state, deleted ones left out."""
    counts = (
        sa.select(jobs.c.state, sa.func.count()).where(jobs.c.deleted_at.is_(None)).group_by(jobs.c.state)
    )
    return dict.fromkeys(State, 0) | {State(state): int(n) for state, n in tx.all(counts)}


def position(tx: Tx, job: Job) -> int | None:
    """How many jobs are dispatched before this one; None if it does not wait. Throttled: behind all that is queued,
    and behind its account's older throttled ones."""
    if job.state is State.QUEUED:
        mine = sa.select(*ORDER).where(jobs.c.id == job.id)
        row = tx.first(mine)
        if row is None:
            return None
        place = sa.tuple_(*(sa.literal(v) for v in row))
        ahead = (QUEUED, sa.tuple_(*ORDER) < place)
        return int(tx.scalar(sa.select(sa.func.count()).select_from(jobs).where(*ahead)) or 0)
    if job.state is State.THROTTLED:
        older = (jobs.c.state == State.THROTTLED, jobs.c.account_id == job.account_id, jobs.c.seq < job.seq)
        throttled = tx.scalar(sa.select(sa.func.count()).select_from(jobs).where(*older)) or 0
        queued = tx.scalar(sa.select(sa.func.count()).select_from(jobs).where(QUEUED))
        return int(throttled) + int(queued or 0)
    return None


# -- the worker's side ---------------------------------------------------------------------------------------


def claim(
    tx: Tx, worker_id: str, models: Collection[str], device: str, *, lease_s: float = LEASE_S
) -> Job | None:
    """Lease the next job that one of these models makes: one statement."""
    head = sa.select(jobs.c.seq).where(QUEUED, jobs.c.model.in_(list(models)))
    head = head.order_by(*ORDER).limit(1)
    if not tx.is_sqlite:
        head = head.with_for_update(skip_locked=True)
    values = {
        **_START, "worker_id": worker_id, "lease_until": tx.now + lease_s, "fence": jobs.c.fence + 1,
        "attempt": jobs.c.attempt + 1, "started_at": tx.now, "eta_at": tx.now + jobs.c.estimate_s,
    }  # fmt: skip
    return _move(tx, JobEvent.CLAIM, values, jobs.c.seq == head.scalar_subquery())


def beat(tx: Tx, worker_id: str, job_id: str, fence: int, *, lease_s: float = LEASE_S) -> Beat:
    """The worker lives: its lease is prolonged, if it still has one."""
    mine = (jobs.c.id == job_id, RUNNING, jobs.c.fence == fence)
    prolong = sa.update(jobs).where(*mine, jobs.c.worker_id == worker_id)
    row = tx.first(prolong.values(lease_until=tx.now + lease_s).returning(jobs.c.cancel_asked_at))
    return Beat(valid=row is not None, cancel_asked=row is not None and row.cancel_asked_at is not None)


def progress(
    tx: Tx,
    job_id: str,
    fence: int,
    *,
    stage: str,
    step: int,
    steps: int,
    fraction: float,
    eta_at: float | None,
    preview: str | None = None,
) -> bool:
    """How far the worker is. False: the lease is not its own any more. The fraction never falls."""
    shown = sa.case((jobs.c.progress > fraction, jobs.c.progress), else_=min(max(fraction, 0.0), 1.0))
    mine = (jobs.c.id == job_id, RUNNING, jobs.c.fence == fence)
    values = {"stage": stage, "step": step, "steps": steps, "progress": shown, "eta_at": eta_at}
    row = tx.first(sa.update(jobs).where(*mine).values(values).returning(*jobs.c))
    if row is None:
        return False
    job = from_row(row)
    data = {"stage": stage, "step": step, "steps": steps, "progress": job.progress, "eta_at": eta_at}
    feed.write(tx, job, "progress", data)
    if preview is not None:
        feed.write(tx, job, "preview", {"image": preview, "step": step})
    outbox.enqueue(tx, job, "job.progress")
    return True


def succeed(
    tx: Tx, job_id: str, fence: int, outputs: Sequence[Output], result: Mapping[str, Any]
) -> Job | None:
    """The files are in place. None: the lease was lost, or a cancel was asked for first, which then counts."""
    steps = int(result.get("steps", 0))
    values = {"outputs": [asdict(o) for o in outputs], "result": dict(result), "progress": 1.0, "stage": "",
              "step": steps, "steps": steps}  # fmt: skip
    return _move(tx, JobEvent.SUCCEED, values, *_lease(tx, job_id, fence), jobs.c.cancel_asked_at.is_(None))


def fail(tx: Tx, job_id: str, fence: int | None, failure: Failure, message: str) -> Job | None:
    """For good. `fence` None: by the house itself, whoever holds the lease."""
    return _move(tx, JobEvent.FAIL, {"failure": failure, "message": message}, *_lease(tx, job_id, fence))


def cancelled(tx: Tx, job_id: str, fence: int) -> Job | None:
    """The worker has stopped as it was asked to."""
    return _move(tx, JobEvent.CANCEL, {"message": "Cancelled while running."}, *_lease(tx, job_id, fence))


def lose(
    tx: Tx, job_id: str, fence: int, why: str, *, crashed: bool = True, max_crashes: int = MAX_CRASHES
) -> Job | None:
    """The worker is gone, or gives the job back (`crashed` False). It keeps its place in the queue.

    After `max_crashes` the next candidate model gets it, or it fails with WORKER_LOST: what kills every worker must
    not go on for ever. A job that was asked to stop is cancelled instead.
    """
    mine = _lease(tx, job_id, fence)
    job = get(tx, job_id, deleted=True)
    if job.state is not State.RUNNING or job.fence != fence:
        return None
    if job.cancel_asked_at is not None:
        return cancelled(tx, job_id, fence)
    crashes = job.crashes + crashed
    if crashes >= max_crashes:
        if job.candidates:
            return reroute(tx, job_id, fence, why)
        times = f"{crashes} attempts" if crashes > 1 else "the only attempt"
        message = f"Given up after {times}: {why}."
        values = {"failure": Failure.WORKER_LOST, "crashes": crashes, "message": message}
        return _move(tx, JobEvent.FAIL, values, *mine)
    return _move(tx, JobEvent.LOSE, {"crashes": crashes, **_WAIT}, *mine, note=why)


def reroute(tx: Tx, job_id: str, fence: int, why: str) -> Job | None:
    """The model cannot do it: the next candidate gets the job, with fresh attempts, and with the sizes and the price
    that the router's decision has for it.

    Raises:
        Conflict: there is no candidate left; `fail` it.
    """
    mine = _lease(tx, job_id, fence)
    job = get(tx, job_id, deleted=True)
    if job.state is not State.RUNNING or job.fence != fence:
        return None
    if not job.candidates:
        raise Conflict(f"Job {job_id} has no other model to go to.")
    model, *rest = job.candidates
    values: dict[str, Any] = {"model": model, "candidates": rest, "crashes": 0, **_WAIT}
    resolved, other = job.resolved, router.alternative(tx, job_id, model)
    if other is not None:  # its own sizes, steps and price; the seed stays, and it never costs more
        resolved = replace(other.resolved, seed=resolved.seed)
        values |= {"resolved": asdict(resolved), "cost": min(job.cost, other.cost)}
        values["estimate_s"] = eta.estimate(tx, model, None, resolved).seconds
    length = round_length(tx, values.get("estimate_s", job.estimate_s))
    values |= vars(tags_at(_vtime(tx, job), affinity(model, resolved), length))
    return _move(tx, JobEvent.REROUTE, values, *mine, note=f"{job.model}: {why}")


# -- the owner's side ----------------------------------------------------------------------------------------


def cancel(tx: Tx, job_id: str) -> Job:
    """What waits ends now; what runs is asked to stop. What has ended stays as it is."""
    mine = _lease(tx, job_id, None)
    message = {"message": "Cancelled before it ran."}
    moved = _move(tx, JobEvent.CANCEL, message, *mine, jobs.c.state.in_(WAITING))
    if moved is not None:
        return moved
    running = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.state == State.RUNNING)
    tx.run(running.where(jobs.c.cancel_asked_at.is_(None)).values(cancel_asked_at=tx.now))
    return get(tx, job_id)


def cancel_waiting(tx: Tx, batch_id: str, *, limit: int) -> int:
    """Jobs of a batch that wait end now, the last ones first, at most `limit` at once. Returns how many. The caller
    holds their account."""
    waits = sa.select(jobs.c.id).where(jobs.c.batch_id == batch_id, jobs.c.state.in_(WAITING))
    ids = [row.id for row in tx.all(waits.order_by(jobs.c.seq.desc()).limit(limit))]
    return len(_move_all(tx, JobEvent.CANCEL, {"message": "Cancelled before it ran."}, jobs.c.id.in_(ids)))


def delete(tx: Tx, job_id: str) -> Job:
    """The job is not shown any more; what waits or runs is cancelled first. Housekeeping removes its files."""
    cancel(tx, job_id)
    tx.run(sa.update(jobs).where(jobs.c.id == job_id, jobs.c.deleted_at.is_(None)).values(deleted_at=tx.now))
    return get(tx, job_id, deleted=True)


# -- the house's side ----------------------------------------------------------------------------------------


def expired(tx: Tx, *, limit: int = 100) -> list[Job]:
    """Running jobs whose worker has not been heard of for a lease."""
    late = sa.select(jobs).where(RUNNING, jobs.c.lease_until < tx.now)
    return [from_row(row) for row in tx.all(late.order_by(jobs.c.lease_until).limit(limit))]


def is_expired(tx: Tx, job: Job) -> bool:
    """Whether the lease that `job` was read with is still the current one, and has run out."""
    same = (jobs.c.id == job.id, RUNNING, jobs.c.fence == job.fence, jobs.c.lease_until < tx.now)
    return tx.first(sa.select(jobs.c.id).where(*same)) is not None


def overdue(tx: Tx, settings: Settings) -> list[Overdue]:
    """Running jobs that were asked to stop and did not within the grace, or that run longer than their limit."""
    c = jobs.c
    disobeys = c.cancel_asked_at < tx.now - settings.cancel_grace_s
    too_long = c.started_at + c.time_limit_s < tx.now
    late = []
    for row in tx.all(sa.select(jobs).where(RUNNING, disobeys | too_long)):
        job = from_row(row)
        if job.cancel_asked_at is not None and job.cancel_asked_at < tx.now - settings.cancel_grace_s:
            why = f"it was asked to stop {tx.now - job.cancel_asked_at:.0f} s ago"
            late.append(Overdue(job=job, kind="cancel", why=why))
        else:
            late.append(Overdue(job=job, kind="time", why=f"its limit is {job.time_limit_s:g} s"))
    return late


def admit(tx: Tx, account_id: str) -> int:
    """Let in as many throttled jobs of an account as it has slots, oldest first. Returns how many."""
    free = plans.free_slots(tx, account_id)
    waiting = sa.select(jobs).where(jobs.c.account_id == account_id, jobs.c.state == State.THROTTLED)
    rows = tx.all(waiting.order_by(jobs.c.seq).limit(min(free, 1000))) if free > 0 else ()
    now = virtual_time(tx) if rows else 0.0
    length = round_length(tx, rows[0].estimate_s) if rows else 1
    for row in rows:
        job = from_row(row)
        place = tags_at(max(row.vtime, now), affinity(job.model, job.resolved), length)
        _move(tx, JobEvent.ADMIT, vars(place), jobs.c.id == job.id)
    return len(rows)


def _vtime(tx: Tx, job: Job) -> float:
    return float(tx.scalar(sa.select(jobs.c.vtime).where(jobs.c.id == job.id)))


# -- the only way --------------------------------------------------------------------------------------------


def _lease(tx: Tx, job_id: str, fence: int | None) -> tuple[sa.ColumnElement[bool], ...]:
    """Conditions for a job that runs under this lease (None: whatever its state and lease). A job that went back to the
    queue still has the fence of the lease that it lost, until the next claim: that is why it has to be running.

    On PostgreSQL its account's row is held from here on. Everybody takes first the account, then jobs, then the batch:
    so nobody waits in a circle, and slots are counted by one at a time.
    """
    if not tx.is_sqlite:
        owner = sa.select(jobs.c.account_id).where(jobs.c.id == job_id).scalar_subquery()
        tx.first(sa.select(accounts.c.id).where(accounts.c.id == owner).with_for_update(key_share=True))
    mine = jobs.c.id == job_id
    return (mine,) if fence is None else (mine, RUNNING, jobs.c.fence == fence)


def _move(
    tx: Tx, event: JobEvent, values: Mapping[str, Any], *where: sa.ColumnElement[bool], note: str = ""
) -> Job | None:
    """`_move_all` for one job; None: it did not move."""
    moved = _move_all(tx, event, values, *where, note=note)
    return moved[0] if moved else None


def _move_all(
    tx: Tx, event: JobEvent, values: Mapping[str, Any], *where: sa.ColumnElement[bool], note: str = ""
) -> list[Job]:
    """Change the state of jobs by the table, or nothing at all. With it: the feed, credits, webhooks, slots, the batch.
    Returns those that moved, oldest first."""
    target = TARGET[event]
    ends = target in TERMINAL
    ending = {"finished_at": tx.now, "lease_until": None, "eta_at": None} if ends else {}
    change = sa.update(jobs).where(sa.or_(*map(in_state, SOURCES[event])), *where)
    rows = tx.all(change.values({"state": target, **ending, **values}).returning(*jobs.c))
    moved = sorted((from_row(row) for row in rows), key=lambda job: job.seq)
    if not moved:
        return []
    if ends:
        taken = ledger.settle(tx, moved)
        moved = [replace(job, cost_captured=taken[job.id]) for job in moved]
        for job in moved:
            if job.attempt:
                feed.drop_previews(tx, job.id)
        give_back(tx, (job for job in moved if not job.attempt))
    _told(tx, moved, note)
    if ends:
        for account_id in {job.account_id: None for job in moved}:
            admit(tx, account_id)
        for batch_id in {job.batch_id: None for job in moved if job.batch_id is not None}:
            batches.on_end(tx, batch_id)
    return moved


def _told(tx: Tx, moved: Sequence[Job], note: str = "") -> None:
    """Those who watch, and those who asked to be told."""
    feed.write_many(tx, ((job, "state", _seen(job) | ({"note": note} if note else {})) for job in moved))
    event = TOLD.get(moved[0].state)
    if event is None:
        return
    listens = {i: outbox.listens(tx, i, event) for i in {job.account_id for job in moved}}
    for job in moved:
        if listens[job.account_id] or job.spec.get("webhook_url"):
            outbox.enqueue(tx, job, event)


def _seen(job: Job) -> dict[str, Any]:
    seen: dict[str, Any] = {"state": job.state.value, "attempt": job.attempt, "model": job.model}
    if job.failure is not None:
        seen["failure"] = job.failure.value
    return seen | ({"message": job.message} if job.message else {})


_FIELDS = tuple(Job.__dataclass_fields__)


def from_row(row: Row[Any]) -> Job:
    """A row of `jobs` as a Job."""
    m = row._mapping
    values = {name: m[name] for name in _FIELDS}
    values |= {
        "state": State(m["state"]), "priority": Priority(m["priority"]), "resolved": Resolved(**m["resolved"]),
        "failure": Failure(m["failure"]) if m["failure"] else None, "candidates": tuple(m["candidates"]),
        "outputs": tuple(Output(**o) for o in m["outputs"]),
    }  # fmt: skip
    return Job(**values)
