"""Things that happen at the same time: each job ends in exactly one way, and the ledger says the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mutoscope.jobs import batches, feed, housekeeping, ledger, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import TERMINAL, Failure, Job, State
from mutoscope.settings import Settings
from tests.service.databases import Clock
from tests.service.making import account_row, add_job, make_account, new_job, output

N = 40
"""Races of each kind and database."""


def together(*acts: Callable[[], object]) -> list[object]:
    """All at once, each in a thread of its own; what they return."""
    start = threading.Barrier(len(acts))

    def one(act: Callable[[], object]) -> object:
        start.wait()
        return act()

    with ThreadPoolExecutor(len(acts)) as threads:
        return list(threads.map(one, acts))


def claimed(db: Database, worker: str = "w") -> Job:
    with db.write() as tx:
        add_job(tx)
        job = queue.claim(tx, worker, ("pocket",), "cpu")
    assert job is not None
    return job


def succeed(db: Database, job: Job) -> Job | None:
    with db.write() as tx:
        return queue.succeed(tx, job.id, job.fence, [output(job)], {})


def fail(db: Database, job: Job) -> Job | None:
    with db.write() as tx:
        return queue.fail(tx, job.id, job.fence, Failure.INTERNAL, "no")


def lose(db: Database, job: Job) -> Job | None:
    with db.write() as tx:
        return queue.lose(tx, job.id, job.fence, "it died")


def cancel(db: Database, job: Job) -> Job:
    with db.write() as tx:
        return queue.cancel(tx, job.id)


def test_cancel_and_success(db: Database, account: str) -> None:
    """Whoever asks to cancel learns the truth: it succeeded already, or it will not."""
    outcomes: dict[State, int] = {}
    for i in range(N):
        job = claimed(db)
        acts = [lambda job=job: succeed(db, job), lambda job=job: cancel(db, job)]
        done, asked = together(*acts) if i % 2 else reversed(together(*reversed(acts)))
        assert isinstance(asked, Job)
        if done is None:
            assert asked.state is State.RUNNING
            with db.write() as tx:
                assert queue.cancelled(tx, job.id, job.fence) is not None
        else:
            assert asked.state in (State.SUCCEEDED, State.RUNNING)
        with db.read() as tx:
            after = queue.get(tx, job.id)
            told = [e.data["state"] for e in feed.after(tx, 0, job_id=job.id) if e.type == "state"]
        assert after.state is (State.SUCCEEDED if done else State.CANCELLED)
        assert after.cost_captured == (4 if done else 0)
        assert sum(state in TERMINAL for state in told) == 1
        outcomes[after.state] = outcomes.get(after.state, 0) + 1
    with db.read() as tx:
        assert ledger.check(tx) == []
        assert ledger.unsettled(tx) == []
        assert (account_row(tx).balance, account_row(tx).reserved) == (
            1000 - 4 * outcomes.get(State.SUCCEEDED, 0),
            0,
        )


def test_the_worker_the_supervisor_and_the_owner(db: Database, account: str) -> None:
    """Success, failure, a lost lease and a cancel at once: one of them is what happened."""
    rng = random.Random(2)
    for _ in range(N):
        job = claimed(db)
        acts = [lambda job=job: succeed(db, job), lambda job=job: fail(db, job), lambda job=job: lose(db, job),
                lambda job=job: cancel(db, job)]  # fmt: skip
        rng.shuffle(acts)
        together(*acts)
        with db.write() as tx:
            after = queue.get(tx, job.id)
            if after.state is State.RUNNING:  # only the cancel was heard
                after = queue.cancelled(tx, job.id, job.fence) or after
            if after.state is State.QUEUED:
                after = queue.cancel(tx, job.id)
            told = [e.data["state"] for e in feed.after(tx, 0, job_id=job.id) if e.type == "state"]
            assert after.is_terminal
            assert sum(state in TERMINAL for state in told) == 1
    with db.read() as tx:
        assert ledger.check(tx) == []
        assert ledger.unsettled(tx) == []
        assert account_row(tx).reserved == 0


def test_a_claim_and_a_cancel(db: Database, account: str) -> None:
    for _ in range(N):
        with db.write() as tx:
            made = add_job(tx)

        def take() -> Job | None:
            with db.write() as tx:
                return queue.claim(tx, "w", ("pocket",), "cpu")

        job, asked = together(take, lambda made=made: cancel(db, made))
        assert isinstance(asked, Job)
        if job is None:
            assert asked.state is State.CANCELLED
            continue
        assert isinstance(job, Job)
        assert asked.state is State.RUNNING
        with db.write() as tx:
            assert queue.beat(tx, "w", job.id, job.fence).cancel_asked
            assert queue.cancelled(tx, job.id, job.fence)
    with db.read() as tx:
        assert ledger.check(tx) == []


def test_the_last_jobs_of_a_batch_end_at_once(db: Database, account: str) -> None:
    """The batch ends once, and is told once."""
    import sqlalchemy as sa

    from mutoscope.jobs.schema import batches as table
    from mutoscope.jobs.schema import deliveries

    for i in range(N // 4):
        with db.write() as tx:
            tx.run(
                sa.insert(table).values(
                    id=f"b{i}", account_id="acct", state=batches.RUNNING, priority="normal", total=4, made=4,
                    estimate={}, items=[], created_at=tx.now, confirmed_at=tx.now, webhook_url="https://example.com/hook",
                )
            )  # fmt: skip
            queue.insert_many(tx, [new_job(cost=0, batch_id=f"b{i}", batch_index=n) for n in range(4)])
            taken = [queue.claim(tx, f"w{n}", ("pocket",), "cpu") for n in range(4)]
        together(*(lambda job=job: succeed(db, job) for job in taken if job is not None))  # type: ignore[misc]
        with db.read() as tx:
            assert batches.get(tx, "acct", f"b{i}").state == batches.FINISHED
            assert tx.scalar(sa.select(sa.func.count()).select_from(deliveries)) == i + 1


def test_slots_are_given_once(db: Database) -> None:
    """Several jobs of an account end at once: as many throttled ones come in, and no more."""
    with db.write() as tx:
        make_account(tx, plan="pro", limits={"concurrency": 3})
        for n in range(30):
            add_job(tx, admit=n < 3)
    for _ in range(9):
        with db.write() as tx:
            taken = [queue.claim(tx, f"w{n}", ("pocket",), "cpu") for n in range(3)]
        together(*(lambda job=job: succeed(db, job) for job in taken if job is not None))  # type: ignore[misc]
        with db.read() as tx:
            assert queue.depth(tx)[State.QUEUED] == 3
    with db.read() as tx:
        assert queue.depth(tx)[State.THROTTLED] == 0


# -- leases, by the clock ------------------------------------------------------------------------------------


def test_a_silent_worker_loses_its_job_within_forty_seconds(db: Database, account: str, clock: Clock) -> None:
    """A beat every 10 s, a lease of 30 s, a sweep every 5 s; two sweepers, which do not count it twice."""
    settings = Settings(heartbeat_s=10, lease_s=30)
    job = claimed(db)
    clock.forward(10)
    with db.write() as tx:
        assert queue.beat(tx, "w", job.id, job.fence).valid
    died_at = clock.now
    while True:
        clock.forward(5)
        swept = together(
            lambda: housekeeping.sweep(db, settings).lost, lambda: housekeeping.sweep(db, settings).lost
        )
        with db.read() as tx:
            after = queue.get(tx, job.id)
        if after.state is State.QUEUED:
            break
    assert 30 < clock.now - died_at <= 40
    assert sorted(swept) == [0, 1]  # type: ignore[type-var]
    assert (after.crashes, after.attempt) == (1, 1)


def test_a_job_that_silences_three_workers_is_given_up(db: Database, account: str, clock: Clock) -> None:
    settings = Settings()
    with db.write() as tx:
        made = add_job(tx)
    for n in range(1, 4):
        with db.write() as tx:
            job = queue.claim(tx, f"w{n}", ("pocket",), "cpu")
        assert job is not None
        assert (job.id, job.fence) == (made.id, n)
        clock.forward(settings.lease_s + 1)
        assert housekeeping.sweep(db, settings).lost == 1
    with db.read() as tx:
        after = queue.get(tx, made.id)
        assert (after.state, after.failure, after.crashes) == (State.FAILED, Failure.WORKER_LOST, 3)
        assert after.message == "Given up after 3 attempts: its worker was not heard of for 31 s."
        assert account_row(tx).balance == 1000


@pytest.mark.parametrize("n", [1, 250])
def test_many_leases_that_run_out_at_once(db: Database, account: str, clock: Clock, n: int) -> None:
    """More than one sweep takes: none hides behind the others."""
    with db.write() as tx:
        queue.insert_many(tx, [new_job(cost=0) for _ in range(n)])
        for i in range(n):
            assert queue.claim(tx, f"w{i}", ("pocket",), "cpu")
    clock.forward(31)
    settings = Settings()
    lost = 0
    for _ in range(3):
        lost += housekeeping.sweep(db, settings).lost
    assert lost == n
