"""The whole domain against a model of it: random histories of everything that can happen, on both databases.

Clients submit, repeat, batch, cancel and delete; workers claim, report, end, crash, freeze and come back too late;
time passes and the house keeps order. After every step the invariants of docs/state-machine.md are looked at, and at
the end of each history everything that is left is worked off, in the order that was told.

`make test` runs a fixed set of histories; `make soak` runs new ones, as many steps as SOAK_STEPS says.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mutoscope.fleet.local import lose_jobs_of
from mutoscope.jobs import accounts, batches, batching, feed, housekeeping, idempotency, ledger, plans, queue
from mutoscope.jobs.batches import Batch
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import IdempotencyMismatch, JobsError, OutOfCredits
from mutoscope.jobs.model import TERMINAL, TRANSITIONS, WAITING, Failure, Job, Priority, State
from mutoscope.jobs.schema import batches as batch_table
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.schema import ledger as entries
from mutoscope.jobs.spec import JobSpec
from tests.service.databases import Clock, Postgres, Sqlite
from tests.service.making import caller_for, make_account, make_model, make_service, output

STEPS = 40
SOAK = int(os.environ.get("SOAK_STEPS", "0"))
EXAMPLES = {"sqlite": 60, "postgresql": 15}
"""Histories in `make test`."""

ACCOUNTS = ("rich", "poor", "paced")
WORKERS = ("w1", "w2", "w3")
MODELS = ("pocket", "large", "huge")


def _reached() -> set[tuple[State, State]]:
    """Pairs of states of which the second can come after the first, maybe with others in between."""
    pairs = {(a, b) for (a, _), b in TRANSITIONS.items()}
    for middle, start, end in itertools.product(State, State, State):
        if (start, middle) in pairs and (middle, end) in pairs:
            pairs.add((start, end))
    return pairs


REACHED = _reached()


@dataclass(frozen=True)
class Lease:
    """What a worker believes to hold."""

    worker: str
    job_id: str
    fence: int


class Domain(RuleBasedStateMachine):
    """See the module's text. `make` gives an empty database with this clock."""

    make: ClassVar[Callable[[Clock], Database]]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.db = type(self).make(self.clock)
        self.service = make_service(
            make_model("pocket", quality=0.1, max_queue=6),
            make_model("large", quality=0.5, price_factor=2, most_frames=81),
            make_model("huge", quality=0.9, price_factor=3, tasks=("text",)),
            max_crashes=3, data_dir=Path(tempfile.gettempdir()) / "mutoscope-no-outputs",
        )  # fmt: skip
        self.seen: dict[str, Job] = {}
        self.leases: dict[str, Lease] = {}  # by worker: the one that is its own
        self.stale: list[Lease] = []
        self.keys: dict[str, tuple[str, str]] = {}  # Idempotency-Key: hash of its body, its job
        self.priced: list[tuple[str, str]] = []
        self.batches: dict[str, Batch] = {}
        self.most = 0  # jobs that "paced" may have at once, for a while, after its slots became fewer

    @initialize()
    def accounts_are_there(self) -> None:
        with self.db.write() as tx:
            make_account(tx, "rich", credits=100_000)
            make_account(
                tx, "poor", credits=60, plan="plus", limits={"concurrency": None, "daily_jobs": None}
            )
            make_account(tx, "paced", credits=500, plan="pro", weight=3.0, limits={"concurrency": 2})

    def teardown(self) -> None:
        try:
            self._work_off()
            self.all_is_well()
        finally:
            self.db.close()

    # -- clients ---------------------------------------------------------------------------------------------

    @rule(
        account=st.sampled_from(ACCOUNTS), priority=st.sampled_from(["low", "normal", "normal", "high"]),
        model=st.sampled_from(["auto", "auto", *MODELS]), prefer=st.sampled_from(["quality", "cost", "latency"]),
        seconds=st.sampled_from([1.0, 4.0, 9.0]), key=st.sampled_from([None, None, "k1", "k2", "k3"]),
    )  # fmt: skip
    def submit(self, account: str, key: str | None, **asked: Any) -> None:
        """As the edge does it: idempotency, job, credits and decision in one transaction, or none of it."""
        asked = {"optimize_for": asked.pop("prefer"), **asked}
        spec = JobSpec(prompt="a ball", **asked)
        body = f"{account} {spec.model_dump_json()}"
        name = f"{account} {key}"
        before = self._count()
        try:
            with self.db.write() as tx:
                if key is not None:
                    stored = idempotency.begin(tx, account, key, "POST /jobs", body)
                    if stored is not None:
                        assert (body, stored.body) == self.keys[name]
                        return
                job = self.service.submit(tx, caller_for(tx, account), spec, dialect="api")
                if key is not None:
                    idempotency.keep(tx, account, key, 201, {}, job.id)
        except IdempotencyMismatch:
            assert self.keys[name][0] != body
        except JobsError:  # refused: nothing has happened, and the key is free
            assert self._count() == before
            assert name not in self.keys
            return
        else:
            if key is not None:
                assert name not in self.keys
                self.keys[name] = (body, job.id)
            assert job.state in WAITING
            self._note()

    @rule(account=st.sampled_from(ACCOUNTS), n=st.integers(1, 7), confirm=st.booleans(),
          priority=st.sampled_from(Priority))  # fmt: skip
    def submit_batch(self, account: str, n: int, confirm: bool, priority: Priority) -> None:
        specs = [
            JobSpec(prompt="a ball", model=MODELS[i % 2], seconds=1.0 + (i % 3), seed=i) for i in range(n)
        ]
        before = self._count()
        try:
            with self.db.write() as tx:
                made = batching.create(
                    tx, self.service, caller_for(tx, account), specs, confirm=confirm, priority=priority
                )
        except JobsError:
            assert self._count() == before
            return
        assert made.estimate["credits"] > 0
        if not confirm:
            assert self._count() == before  # priced only: no job, no credits
            self.priced.append((account, made.id))
        self._note()

    @precondition(lambda self: self.priced)
    @rule(data=st.data())
    def confirm_batch(self, data: st.DataObject) -> None:
        account, batch_id = self.priced[data.draw(st.integers(0, len(self.priced) - 1))]
        try:
            with self.db.write() as tx:
                made = batching.confirm(tx, self.service, caller_for(tx, account), batch_id)
        except OutOfCredits:
            return
        except JobsError:
            with self.db.read() as tx:
                state = batches.get(tx, account, batch_id).state
            assert state != batches.PRICED or account == "paced"  # its plan has a limit for a day
            return
        assert sum(made.counts.values()) == made.total
        self._note()

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel_batch(self, data: st.DataObject) -> None:
        batch_id = self._one(data, self.batches)
        with self.db.write() as tx:
            account = tx.scalar(sa.select(batch_table.c.account_id).where(batch_table.c.id == batch_id))
            after = batching.cancel(tx, caller_for(tx, account), batch_id)
            if self.batches[batch_id].state in (batches.FINISHED, batches.CANCELLED):
                assert after == self.batches[batch_id]
            else:
                assert after.state == batches.CANCELLED
                assert not any(after.counts[state] for state in WAITING)
        self._note()

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), delete=st.booleans())
    def cancel(self, data: st.DataObject, delete: bool) -> None:
        job = self.seen[self._one(data, self.seen)]
        if job.deleted_at is not None:
            return
        with self.db.write() as tx:
            after = queue.delete(tx, job.id) if delete else queue.cancel(tx, job.id)
        if job.is_terminal:
            assert after.state is job.state
        elif job.state is State.RUNNING:
            assert (after.state, after.cancel_asked_at is None) == (State.RUNNING, False)
        else:
            assert after.state is State.CANCELLED
        self._note()

    # -- workers ---------------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS), models=st.sets(st.sampled_from(MODELS), min_size=1))
    def claim(self, worker: str, models: set[str]) -> None:
        if worker in self.leases:
            return
        with self.db.write() as tx:
            first = next((j for j in self._in_order(tx) if j.model in models), None)
            job = queue.claim(tx, worker, tuple(models), "cpu")
        assert (job and job.id) == (first and first.id)
        if job is not None:
            assert (job.state, job.worker_id, job.progress) == (State.RUNNING, worker, 0.0)
            assert job.fence == self.seen[job.id].fence + 1
            self.leases[worker] = Lease(worker, job.id, job.fence)
        self._note()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), fraction=st.floats(-0.5, 1.5))
    def report(self, data: st.DataObject, fraction: float) -> None:
        lease = self._lease(data)
        with self.db.write() as tx:
            assert queue.beat(tx, lease.worker, lease.job_id, lease.fence).valid
            assert queue.progress(tx, lease.job_id, lease.fence, stage="denoise", step=1, steps=20,
                                  fraction=fraction, eta_at=tx.now + 5, preview="data:,")  # fmt: skip
        self._note()

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        how=st.sampled_from(["succeed", "succeed", "succeed", "fail", "obey", "reroute", "drain"]),
    )
    def end(self, data: st.DataObject, how: str) -> None:
        """What the worker writes last. A cancel that came before a success counts."""
        lease = self._lease(data)
        job = self.seen[lease.job_id]
        with self.db.write() as tx:
            after = self._write(tx, lease, how, job)
        if how == "succeed" and job.cancel_asked_at is not None:
            assert after is None
            with self.db.write() as tx:
                after = queue.cancelled(tx, lease.job_id, lease.fence)
        assert after is not None
        self._gave_up(lease)
        self._note()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """The process dies and the supervisor notices."""
        lease = self._lease(data)
        before = self.seen[lease.job_id]
        lose_jobs_of(self.db, lease.worker, "it died", max_crashes=3)
        with self.db.read() as tx:
            after = queue.get(tx, lease.job_id, deleted=True)
        if before.cancel_asked_at is not None:
            assert after.state is State.CANCELLED
        elif before.crashes < 2:
            assert (after.state, after.crashes) == (State.QUEUED, before.crashes + 1)
        elif before.candidates:
            assert (after.state, after.crashes, after.model) == (State.QUEUED, 0, before.candidates[0])
            assert after.cost <= before.cost
        else:
            assert (after.state, after.failure) == (State.FAILED, Failure.WORKER_LOST)
        self._gave_up(lease)
        self._note()

    @precondition(lambda self: self.stale)
    @rule(
        data=st.data(),
        how=st.sampled_from(["succeed", "fail", "obey", "lose", "reroute", "beat", "progress"]),
    )
    def come_back_too_late(self, data: st.DataObject, how: str) -> None:
        """A worker that was frozen writes with the fence of a lease that is not its own any more."""
        lease = self.stale[data.draw(st.integers(0, len(self.stale) - 1))]
        job = self.seen[lease.job_id]
        with self.db.write() as tx:
            told = feed.last_id(tx)
            if how == "beat":
                assert not queue.beat(tx, lease.worker, lease.job_id, lease.fence).valid
            elif how == "progress":
                assert not queue.progress(tx, lease.job_id, lease.fence, stage="x", step=9, steps=9, fraction=1.0,
                                          eta_at=None)  # fmt: skip
            else:
                assert self._write(tx, lease, how, job) is None
            assert queue.get(tx, lease.job_id, deleted=True) == job
            assert feed.last_id(tx) == told

    # -- the house -------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 5.0, 12.0, 31.0, 3600.0, 86_400.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.forward(seconds)

    @rule()
    def sweep(self) -> None:
        with self.db.read() as tx:
            expired = {job.id for job in queue.expired(tx)}
            now = tx.now
        swept = housekeeping.sweep(self.db, self.service.settings)
        assert swept.lost == len(expired)
        for lease in [lease for lease in self.leases.values() if lease.job_id in expired]:
            self._gave_up(lease)
        with self.db.read() as tx:  # answers are kept for 24 hours
            kept = {f"{row.account_id} {row.key}" for row in tx.all(sa.select(idempotency.idempotency))}
        for name in set(self.keys) - kept:
            job = self.seen[self.keys.pop(name)[1]]
            assert job.created_at < now - 24 * 3600
        self._note()

    @rule(amount=st.integers(1, 200), account=st.sampled_from(ACCOUNTS))
    def grant(self, amount: int, account: str) -> None:
        with self.db.write() as tx:
            ledger.grant(tx, account, amount)

    @rule(plan=st.sampled_from(["plus", "pro", "unlimited"]))
    def change_plan(self, plan: str) -> None:
        with self.db.write() as tx:
            accounts.change(tx, "poor", plan=plan)

    @rule(slots=st.sampled_from([0, 1, 2, 5, None]))
    def change_slots(self, slots: int | None) -> None:
        """What runs goes on; what waited for a slot gets it."""
        with self.db.write() as tx:
            accounts.change(tx, "paced", limits={"concurrency": slots})
            self.most = plans.active_jobs(tx, "paced")
        self._note()

    # -- what always holds -----------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        with self.db.read() as tx:
            assert ledger.check(tx) == []
            assert ledger.unsettled(tx) == []
            kinds = sa.select(entries.c.kind, sa.func.sum(entries.c.amount)).group_by(entries.c.kind)
            sums = {kind: int(total) for kind, total in tx.all(kinds)}
            every = [queue.from_row(row) for row in tx.all(sa.select(jobs))]
            taken = sum(job.cost_captured for job in every)
            assert sums.get("capture", 0) == taken
            for job in every:
                assert job.cost_captured == (job.cost if job.state is State.SUCCEEDED else 0)
            running = {job.worker_id: (job.id, job.fence) for job in every if job.state is State.RUNNING}
            assert len(running) == sum(job.state is State.RUNNING for job in every)
            assert running == {w: (lease.job_id, lease.fence) for w, lease in self.leases.items()}
            for account in accounts.listing(tx):
                slots = plans.plan_of(account).concurrency
                mine = [job.state for job in every if job.account_id == account.id]
                active = sum(state in (State.QUEUED, State.RUNNING) for state in mine)
                assert slots is None or active <= slots or active <= self.most
                self.most = min(self.most, active) if account.id == "paced" else self.most
                # nobody waits for a slot that is free
                assert State.THROTTLED not in mine or (slots is not None and active >= slots)
                open_ = [j.cost for j in every if j.account_id == account.id and not j.is_terminal]
                assert account.reserved >= sum(open_)
                assert plans.plan_of(account).overdraft or account.id == "poor" or account.balance >= 0

    def _note(self) -> None:
        """Look at all jobs: what was allowed to change since the last time?"""
        with self.db.read() as tx:
            now = {row.id: queue.from_row(row) for row in tx.all(sa.select(jobs).order_by(jobs.c.seq))}
            known = {
                row.id: row.account_id
                for row in tx.all(sa.select(batch_table.c.id, batch_table.c.account_id))
            }
            for batch_id, owner in known.items():
                self.batches[batch_id] = batches.get(tx, owner, batch_id)
            finished = {b.id for b in self.batches.values() if b.finished_at is not None}
        for job in now.values():
            before = self.seen.get(job.id)
            if before is None:
                assert job.attempt == 0 or job.state is State.RUNNING
                continue
            if before.is_terminal:  # never changes, but that it may be hidden and its files removed
                assert (job.state, job.failure, job.cost_captured, job.fence, job.finished_at, job.message) == (
                    before.state, before.failure, before.cost_captured, before.fence, before.finished_at,
                    before.message,
                )  # fmt: skip
            elif before.state is not job.state:
                assert (before.state, job.state) in REACHED
            assert job.fence >= before.fence
            if job.fence == before.fence and before.state is job.state is State.RUNNING:
                assert job.progress >= before.progress
            if job.batch_id is not None and job.batch_id in finished:
                assert job.is_terminal
        assert set(self.seen) <= set(now)  # nothing is lost
        self.seen = now
        for batch in self.batches.values():
            assert 0.0 <= batch.progress <= 1.0
            if batch.confirmed_at is not None:
                ended = all(n == 0 or state in TERMINAL for state, n in batch.counts.items())
                assert (batch.finished_at is not None) == ended

    # -- helpers ---------------------------------------------------------------------------------------------

    @staticmethod
    def _one(data: st.DataObject, of: Mapping[str, object]) -> str:
        """One of the keys by its number: ids are random, and a history has to come out the same again."""
        return list(of)[data.draw(st.integers(0, len(of) - 1))]

    def _lease(self, data: st.DataObject) -> Lease:
        return self.leases[data.draw(st.sampled_from(sorted(self.leases)))]

    def _gave_up(self, lease: Lease) -> None:
        del self.leases[lease.worker]
        self.stale.append(lease)

    def _write(self, tx: Tx, lease: Lease, how: str, job: Job) -> Job | None:
        job_id, fence = lease.job_id, lease.fence
        if how == "succeed":
            return queue.succeed(tx, job_id, fence, [output(job)], {})
        if how == "obey":
            return queue.cancelled(tx, job_id, fence)
        if how == "lose" or how == "drain":
            return queue.lose(tx, job_id, fence, how, crashed=how == "lose")
        if how == "reroute" and (job.candidates or job.fence != fence or job.state is not State.RUNNING):
            return queue.reroute(tx, job_id, fence, "cannot load")
        return queue.fail(tx, job_id, fence, Failure.INTERNAL, "no")

    def _in_order(self, tx: Tx) -> list[Job]:
        """Queued jobs in the order that their positions tell."""
        rows = tx.all(sa.select(jobs).where(jobs.c.state == State.QUEUED))
        waiting = [queue.from_row(row) for row in rows]
        places = {job.id: queue.position(tx, job) for job in waiting}
        assert sorted(places.values()) == list(range(len(waiting)))
        return sorted(waiting, key=lambda job: places[job.id] or 0)

    def _count(self) -> tuple[int, int]:
        with self.db.read() as tx:
            return (
                int(tx.scalar(sa.select(sa.func.count()).select_from(jobs))),
                int(tx.scalar(sa.select(sa.func.count()).select_from(entries))),
            )

    def _work_off(self) -> None:
        """No new work comes: everything ends, in the order that was told, and nothing is held any more."""
        self.change_slots(1)
        for lease in list(self.leases.values()):
            with self.db.write() as tx:
                queue.lose(tx, lease.job_id, lease.fence, "shutdown", crashed=False)
            self._gave_up(lease)
        for _ in range(1000):
            with self.db.write() as tx:
                order = self._in_order(tx)
                job = queue.claim(tx, "last", MODELS, "cpu")
                if job is None:
                    break
                assert job.id == order[0].id
                assert queue.succeed(tx, job.id, job.fence, [output(job)], {})
        self._note()
        assert all(job.is_terminal for job in self.seen.values())
        assert all(b.finished_at is not None for b in self.batches.values() if b.state != batches.PRICED)
        with self.db.read() as tx:
            assert [a.reserved for a in accounts.listing(tx)] == [0] * len(ACCOUNTS)


def run(kind: str, make: Callable[[Clock], Database]) -> None:
    machine = type("Domain", (Domain,), {"make": staticmethod(make)})
    found = settings(
        max_examples=max(1, SOAK // STEPS) if SOAK else EXAMPLES[kind],
        stateful_step_count=STEPS, deadline=None, database=None, derandomize=not SOAK,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if SOAK else [Phase.generate],
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=found)


@pytest.mark.timeout(0 if SOAK else 300)
def test_random_histories_on_sqlite(sqlite: Sqlite, tmp_path: Path) -> None:
    numbers = itertools.count()

    def make(clock: Clock) -> Database:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        db = sqlite.make(folder, clock)
        sa.event.listen(db.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF"))
        return db

    run("sqlite", make)


@pytest.mark.timeout(0 if SOAK else 300)
def test_random_histories_on_postgresql(postgres: Postgres) -> None:
    run("postgresql", postgres.make)
