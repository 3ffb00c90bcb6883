"""The order of dispatch: shares, priorities, positions, nobody starves, like next to like."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from benchmarks import scheduling as bench
from mutoscope.jobs import accounts, queue, scheduling
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.model import Job, Priority, State
from mutoscope.jobs.schema import accounts as table
from mutoscope.jobs.schema import jobs
from tests.service.databases import Clock
from tests.service.making import make_account, new_job, resolved


def insert(tx: Tx, account_id: str = "acct", *, n: int = 1, **changes: object) -> list[Job]:
    return [queue.insert(tx, new_job(account_id, cost=0, **changes)) for _ in range(n)]


def dispatch(db: Database, n: int = 10**6) -> list[Job]:
    """Jobs in the order in which one worker gets them; each succeeds before the next claim."""
    served: list[Job] = []
    while len(served) < n:
        with db.write() as tx:
            job = queue.claim(tx, "w", ("pocket", "large"), "cpu")
            if job is None:
                break
            assert queue.succeed(tx, job.id, job.fence, [], {})
        served.append(job)
    return served


def shares(served: Sequence[Job]) -> dict[str, float]:
    total = sum(job.estimate_s for job in served)
    return {
        name: sum(job.estimate_s for job in served if job.account_id == name) / total
        for name in {job.account_id for job in served}
    }


def test_shares_follow_weights_over_a_thousand_jobs(tmp_path: Path) -> None:
    """At most 5 % off, with fewer than a fifth of the changes of model that the order of arrival has."""
    db = bench.fresh(tmp_path)
    served = bench.serve(db, 1000, 5.0, bench.WEIGHTS)
    db.close()
    ours = bench.judge(served, bench.WEIGHTS)
    fifo = bench.judge(bench.first_come(1000, 5.0, bench.WEIGHTS), bench.WEIGHTS)
    assert ours.error_end <= 0.05
    assert fifo.error_end > 1.0
    assert ours.switches_per_100 < fifo.switches_per_100 / 5
    # nobody starves: whoever has the least weight waits for what the others may have meanwhile, and two rounds
    bound = bench.AHEAD * sum(bench.WEIGHTS.values()) / min(bench.WEIGHTS.values())
    assert ours.longest_wait_jobs <= bound + 2 * scheduling.PER_ROUND * sum(bench.WEIGHTS.values()) * 3


def test_one_that_floods_the_queue_does_not_keep_others_out(db: Database) -> None:
    """A has 300 jobs waiting when B comes with 20: B gets every second one."""
    with db.write() as tx:
        make_account(tx, "a"), make_account(tx, "b")
        queue.insert_many(tx, [new_job("a", cost=0) for _ in range(300)])
    first = dispatch(db, 30)
    with db.write() as tx:
        insert(tx, "b", n=20)
    rest = dispatch(db, 60)
    assert {job.account_id for job in first} == {"a"}
    assert sum(job.account_id == "b" for job in rest[:40]) >= 16
    assert sum(job.account_id == "b" for job in rest) == 20


def test_an_account_that_was_away_gets_no_credit_for_it(db: Database) -> None:
    with db.write() as tx:
        make_account(tx, "a"), make_account(tx, "b")
        queue.insert_many(tx, [new_job("a", cost=0) for _ in range(100)])
    dispatch(db, 60)
    with db.write() as tx:
        queue.insert_many(tx, [new_job("b", cost=0) for _ in range(40)])
    assert shares(dispatch(db, 40))["a"] >= 0.35


def test_work_counts_and_not_the_number_of_jobs(db: Database) -> None:
    with db.write() as tx:
        make_account(tx, "long"), make_account(tx, "short")
        queue.insert_many(tx, [new_job("long", cost=0, estimate_s=9.0) for _ in range(40)])
        queue.insert_many(tx, [new_job("short", cost=0, estimate_s=1.0) for _ in range(300)])
    assert shares(dispatch(db, 200))["long"] == pytest.approx(0.5, abs=0.05)


def test_high_goes_before_what_its_own_account_has_waiting(db: Database, account: str) -> None:
    with db.write() as tx:
        for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH):
            insert(tx, n=30, priority=priority)
    mine = [job.priority for job in dispatch(db, 90)]
    assert mine.index(Priority.HIGH) < 10
    assert sum(priority is Priority.HIGH for priority in mine[:45]) >= 15
    assert sum(priority is Priority.LOW for priority in mine[-45:]) >= 15


def test_priorities_win_nothing_from_other_accounts(sqlite_db: Database) -> None:
    """One account marks its jobs, the other does not: each gets its half."""
    rng, served = random.Random(3), []
    with sqlite_db.write() as tx:
        make_account(tx, "marks"), make_account(tx, "plain")
    for _ in range(400):
        with sqlite_db.write() as tx:
            for name in ("marks", "plain"):
                while queue.listing(tx, name, states=[State.QUEUED], limit=1).total < 15:
                    insert(
                        tx, name, priority=rng.choice(list(Priority)) if name == "marks" else Priority.NORMAL
                    )
            job = queue.claim(tx, "w", ("pocket",), "cpu")
            assert job is not None
            assert queue.succeed(tx, job.id, job.fence, [], {})
            served.append(job)
    assert shares(served)["marks"] == pytest.approx(0.5, abs=0.05)


def test_low_priority_is_served_in_the_end(db: Database, account: str, clock: Clock) -> None:
    """Normal jobs come without end: the low one moves back for an hour, and then it gets its turn."""
    with db.write() as tx:
        low = insert(tx, priority=Priority.LOW)[0]
        insert(tx, n=10)
    states = []
    for _ in range(72):
        clock.forward(100)
        with db.write() as tx:
            insert(tx)
        dispatch(db, 1)
        with db.read() as tx:
            states.append(queue.get(tx, low.id).state)
    assert states[30] is State.QUEUED
    assert states[-1] is State.SUCCEEDED


def test_what_moves_back_keeps_its_kind(db: Database, account: str) -> None:
    """The places that SQL gives to jobs that were overtaken are those that `tags_at` would."""
    with db.write() as tx:
        made = [insert(tx, priority=Priority.LOW, model=m, resolved=resolved(frames=f))[0]
                for m in ("pocket", "large") for f in (5, 9) for _ in range(5)]  # fmt: skip
        length = scheduling.round_length(tx, 1.0)
        insert(tx, n=7, priority=Priority.HIGH)
        for job in made:
            row = tx.first(sa.select(jobs).where(jobs.c.id == job.id))
            assert row is not None
            kind = scheduling.affinity(job.model, job.resolved)
            assert scheduling.tags_at(row.vtime, kind, length) == scheduling.Tags(
                row.round, row.affinity, row.vtime
            )


def test_position_is_the_number_dispatched_before(db: Database) -> None:
    rng = random.Random(5)
    with db.write() as tx:
        make_account(tx, "a", weight=3.0), make_account(tx, "b"), make_account(tx, "c", weight=0.5)
        for _ in range(60):
            insert(tx, rng.choice("abc"), priority=rng.choice(list(Priority)), estimate_s=rng.choice([0.2, 2.0, 30.0]),
                   model=rng.choice(["pocket", "large"]))  # fmt: skip
        rows = tx.all(sa.select(jobs))
        told = {row.id: queue.position(tx, queue.from_row(row)) for row in rows}
    assert [told[job.id] for job in dispatch(db)] == list(range(60))


def test_what_is_cancelled_before_it_ran_costs_no_share(db: Database) -> None:
    with db.write() as tx:
        make_account(tx, "a"), make_account(tx, "b")
        for job in insert(tx, "a", n=50):
            queue.cancel(tx, job.id)
        clocks = tx.first(sa.select(table.c.finish_high, table.c.finish_normal).where(table.c.id == "a"))
        assert clocks == (0.0, pytest.approx(0.0))
        insert(tx, "b", n=40), insert(tx, "a", n=40)
    assert shares(dispatch(db, 40))["a"] == pytest.approx(0.5, abs=0.15)


def test_a_lost_job_keeps_its_place_and_a_rerouted_one_its_time(db: Database, account: str) -> None:
    with db.write() as tx:
        insert(tx, n=3, candidates=("large",))
        job = queue.claim(tx, "w", ("pocket",), "cpu")
        assert job is not None
        vtime = tx.scalar(sa.select(jobs.c.vtime).where(jobs.c.id == job.id))
        queue.reroute(tx, job.id, job.fence, "cannot load")
        assert tx.scalar(sa.select(jobs.c.vtime).where(jobs.c.id == job.id)) == vtime
    assert {job.model for job in dispatch(db)} == {"pocket", "large"}


def test_a_heavier_account_is_served_more_from_then_on(db: Database) -> None:
    with db.write() as tx:
        make_account(tx, "a"), make_account(tx, "b")
        accounts.change(tx, "a", weight=4.0)
        for _ in range(100):
            insert(tx, "a"), insert(tx, "b")
    assert shares(dispatch(db, 80))["a"] == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("work_s", "length"), [(0.001, 1), (0.5, 2), (1.0, 4), (5.0, 16), (30.0, 128), (500.0, 2048)]
)
def test_rounds_hold_some_usual_jobs(db: Database, account: str, work_s: float, length: int) -> None:
    with db.write() as tx:
        assert scheduling.round_length(tx, work_s) == length
        insert(tx, n=3, estimate_s=1.0)
        assert scheduling.round_length(tx, work_s) == 4  # the queue says what is usual


def test_kinds_are_next_to_each_other_in_a_round_and_turn_around() -> None:
    kinds = [scheduling.affinity(model, resolved(frames=f)) for model in ("a", "b") for f in (5, 9)]
    assert len(set(kinds)) == 4
    assert abs(kinds[0] - kinds[1]) < abs(kinds[0] - kinds[2])
    even = sorted(kinds, key=lambda kind: scheduling.tags_at(0.0, kind, 4).affinity)
    odd = sorted(kinds, key=lambda kind: scheduling.tags_at(4.0, kind, 4).affinity)
    assert even == odd[::-1]
    assert [scheduling.tags_at(t, kinds[0], 4).round for t in (0.0, 3.9, 4.0, 9.0)] == [0, 0, 4, 8]
