"""The state machine: every state with every event, and what a transition takes with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mutoscope.jobs import feed, ledger, queue
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import Conflict, NotFound
from mutoscope.jobs.model import TERMINAL, TRANSITIONS, WAITING, Failure, Job, JobEvent, State
from mutoscope.jobs.schema import jobs
from mutoscope.settings import Settings
from tests.service.databases import Clock
from tests.service.making import account_row, add_job, make_account, new_job, output

DOC = Path(__file__).parents[3] / "docs" / "state-machine.md"


def claimed(tx: Tx, worker: str = "w1") -> Job:
    job = queue.claim(tx, worker, ("pocket", "other"), "cpu")
    assert job is not None
    return job


def job_in(tx: Tx, state: State) -> Job:
    """A job of the account in this state, with another model to go to."""
    made = add_job(tx, admit=state is not State.THROTTLED, candidates=("other",))
    if state not in (State.THROTTLED, State.QUEUED):
        made = claimed(tx)
    if state is State.SUCCEEDED:
        queue.succeed(tx, made.id, made.fence, [output(made)], {})
    elif state is State.FAILED:
        queue.fail(tx, made.id, made.fence, Failure.INTERNAL, "no")
    elif state is State.CANCELLED:
        queue.cancelled(tx, made.id, made.fence)
    assert queue.get(tx, made.id).state is state
    return queue.get(tx, made.id)


def fence_of(job: Job) -> int | None:
    """What fails a waiting job is the house, which names no lease."""
    return None if job.state in WAITING else job.fence


EVENTS: dict[JobEvent, Callable[[Tx, Job], object]] = {
    JobEvent.ADMIT: lambda tx, job: queue.admit(tx, job.account_id),
    JobEvent.CLAIM: lambda tx, job: queue.claim(tx, "w2", ("pocket", "other"), "cpu"),
    JobEvent.SUCCEED: lambda tx, job: queue.succeed(tx, job.id, job.fence, [output(job)], {}),
    JobEvent.FAIL: lambda tx, job: queue.fail(tx, job.id, fence_of(job), Failure.OUT_OF_MEMORY, "too large"),
    JobEvent.LOSE: lambda tx, job: queue.lose(tx, job.id, job.fence, "gone"),
    JobEvent.REROUTE: lambda tx, job: queue.reroute(tx, job.id, job.fence, "cannot load"),
    JobEvent.CANCEL: lambda tx, job: (
        queue.cancel(tx, job.id) if job.state in WAITING else queue.cancelled(tx, job.id, job.fence)
    ),
}


@pytest.mark.parametrize("event", JobEvent)
@pytest.mark.parametrize("state", State)
def test_every_state_with_every_event(db: Database, account: str, state: State, event: JobEvent) -> None:
    with db.write() as tx:
        before = job_in(tx, state)
        n_events, n_ledger = feed.last_id(tx), tx.scalar(sa.text("SELECT count(*) FROM ledger"))
        EVENTS[event](tx, before)
        after = queue.get(tx, before.id)
        if (state, event) in TRANSITIONS:
            assert after.state is TRANSITIONS[state, event]
            assert feed.after(tx, n_events, job_id=before.id)[-1].data["state"] == after.state
        else:
            assert after == before
            assert feed.last_id(tx) == n_events
            assert tx.scalar(sa.text("SELECT count(*) FROM ledger")) == n_ledger
        assert ledger.check(tx) == []
        assert account_row(tx).reserved == (0 if after.is_terminal else after.cost)


@pytest.mark.parametrize("state", State)
def test_what_the_owner_can_ask_for(db: Database, account: str, state: State) -> None:
    with db.write() as tx:
        job = job_in(tx, state)
        after = queue.cancel(tx, job.id)
        if state in TERMINAL:
            assert after == job
        elif state is State.RUNNING:
            assert (after.state, after.cancel_asked_at) == (State.RUNNING, tx.now)
        else:
            assert after.state is State.CANCELLED
        gone = queue.delete(tx, job.id)
        assert gone.deleted_at == tx.now
        with pytest.raises(NotFound):
            queue.get(tx, job.id)
        assert queue.listing(tx, "acct").total == 0
        assert queue.get(tx, job.id, deleted=True).state is after.state


def test_every_event_leads_to_one_state() -> None:
    assert set(EVENTS) == set(JobEvent)
    for event in JobEvent:
        assert {state for (_, e), state in TRANSITIONS.items() if e is event} == {queue.TARGET[event]}
    assert not {state for state, _ in TRANSITIONS} & set(TERMINAL)


def test_the_drawing_is_true() -> None:
    text = DOC.read_text("utf-8")
    drawn = {
        tuple(line.strip().replace(" --> ", " ").replace(" : ", " ").split())
        for line in text.split("```mermaid")[1].split("```")[0].splitlines()
        if "-->" in line and "[*]" not in line
    }
    assert drawn == {(a.value, b.value, e.value) for (a, e), b in TRANSITIONS.items()}
    for state in State:
        assert f"`{state}`" in text
    for failure in Failure:
        assert f"`{failure}`" in text


# -- leases --------------------------------------------------------------------------------------------------


def test_a_claim_counts_attempts_and_fences(db: Database, account: str, clock: Clock) -> None:
    with db.write() as tx:
        add_job(tx)
        first = claimed(tx)
        assert (first.fence, first.attempt, first.worker_id) == (1, 1, "w1")
        assert first.lease_until == clock.now + queue.LEASE_S
        assert queue.claim(tx, "w2", ("pocket",), "cpu") is None
        queue.lose(tx, first.id, first.fence, "gone")
        second = claimed(tx, "w2")
        assert (second.fence, second.attempt, second.crashes) == (2, 2, 1)


def test_a_claim_takes_only_models_that_the_worker_has(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx, model="big")
        wanted = add_job(tx, model="pocket")
        assert queue.claim(tx, "w1", (), "cpu") is None
        assert queue.claim(tx, "w1", ("pocket",), "cpu") == queue.get(tx, wanted.id)
        assert queue.claim(tx, "w1", ("pocket",), "cpu") is None


def test_writes_of_an_old_lease_change_nothing(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx)
        old = claimed(tx)
        queue.lose(tx, old.id, old.fence, "gone")
        new = claimed(tx, "w2")
        told = feed.last_id(tx)
        assert not queue.beat(tx, "w1", old.id, old.fence).valid
        assert not queue.beat(tx, "w1", new.id, new.fence).valid
        shown = {"stage": "denoise", "step": 1, "steps": 2, "fraction": 0.5, "eta_at": None}
        assert not queue.progress(tx, old.id, old.fence, **shown)
        assert queue.succeed(tx, old.id, old.fence, [output(old)], {}) is None
        assert queue.fail(tx, old.id, old.fence, Failure.INTERNAL, "") is None
        assert queue.cancelled(tx, old.id, old.fence) is None
        assert queue.lose(tx, old.id, old.fence, "again") is None
        assert queue.reroute(tx, old.id, old.fence, "again") is None
        assert queue.get(tx, new.id) == new
        assert feed.last_id(tx) == told


def test_a_worker_that_lost_its_job_to_the_queue_cannot_end_it(db: Database, account: str) -> None:
    """Until the next claim the job has the fence of the lost lease."""
    with db.write() as tx:
        add_job(tx)
        old = claimed(tx)
        waiting = queue.lose(tx, old.id, old.fence, "it froze")
        assert waiting is not None
        assert (waiting.state, waiting.fence) == (State.QUEUED, old.fence)
        assert queue.fail(tx, old.id, old.fence, Failure.INTERNAL, "") is None
        assert queue.cancelled(tx, old.id, old.fence) is None
        assert queue.succeed(tx, old.id, old.fence, [output(old)], {}) is None
        assert queue.lose(tx, old.id, old.fence, "again") is None
        assert not queue.beat(tx, "w1", old.id, old.fence).valid
        assert queue.get(tx, old.id) == waiting


def test_beats_prolong_a_lease_and_bring_cancels(db: Database, account: str, clock: Clock) -> None:
    with db.write() as tx:
        add_job(tx)
        job = claimed(tx)
    clock.forward(20)
    with db.write() as tx:
        assert queue.beat(tx, "w1", job.id, job.fence, lease_s=30) == queue.Beat(
            valid=True, cancel_asked=False
        )
        queue.cancel(tx, job.id)
    clock.forward(20)
    with db.write() as tx:
        assert queue.expired(tx) == []
        assert queue.beat(tx, "w1", job.id, job.fence).cancel_asked
    clock.forward(31)
    with db.write() as tx:
        assert [j.id for j in queue.expired(tx)] == [job.id]
        ended = queue.lose(tx, job.id, job.fence, "gone")
        assert ended is not None
        assert ended.state is State.CANCELLED


def test_a_lost_job_keeps_its_place_and_starts_anew(db: Database, account: str) -> None:
    with db.write() as tx:
        first, second = add_job(tx), add_job(tx)
        job = claimed(tx)
        queue.progress(
            tx, job.id, job.fence, stage="denoise", step=3, steps=9, fraction=0.4, eta_at=tx.now + 9
        )
        lost = queue.lose(tx, job.id, job.fence, "gone")
        assert lost is not None
        assert (lost.progress, lost.step, lost.stage, lost.worker_id, lost.started_at) == (
            0.0,
            0,
            "",
            None,
            None,
        )
        assert (queue.position(tx, lost), queue.position(tx, second)) == (0, 1)
        assert claimed(tx).id == first.id


def test_crashes_are_counted_to_a_limit(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx)
        for _ in range(2):
            job = claimed(tx)
            queue.lose(tx, job.id, job.fence, "stopped", crashed=False)
        for n in range(1, 4):
            job = claimed(tx)
            after = queue.lose(tx, job.id, job.fence, "it died", max_crashes=3)
            assert after is not None
            assert after.crashes == n
        assert (after.state, after.failure) == (State.FAILED, Failure.WORKER_LOST)
        assert after.message == "Given up after 3 attempts: it died."
        assert account_row(tx).balance == 1000


def test_crashes_lead_to_the_next_model_first(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx, candidates=("other",))
        job = claimed(tx)
        after = queue.lose(tx, job.id, job.fence, "it died", max_crashes=1)
        assert after is not None
        assert (after.state, after.model, after.candidates, after.crashes) == (State.QUEUED, "other", (), 0)
        job = claimed(tx)
        with pytest.raises(Conflict, match="no other model"):
            queue.reroute(tx, job.id, job.fence, "cannot load")
        after = queue.lose(tx, job.id, job.fence, "it died", max_crashes=1)
        assert after is not None
        assert after.failure is Failure.WORKER_LOST


def test_progress_never_falls_within_an_attempt(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx)
        job = claimed(tx)
        seen = []
        for fraction in (0.1, 0.5, 0.3, -1.0, 2.0, 0.9):
            queue.progress(tx, job.id, job.fence, stage="denoise", step=1, steps=2, fraction=fraction, eta_at=None,
                           preview="data:," if fraction == 0.5 else None)  # fmt: skip
            seen.append(queue.get(tx, job.id).progress)
        assert seen == [0.1, 0.5, 0.5, 0.5, 1.0, 1.0]
        kinds = [event.type for event in feed.after(tx, 0, job_id=job.id)]
        assert kinds == ["state", "state", "progress", "progress", "preview", *["progress"] * 4]


def test_overdue(db: Database, account: str, clock: Clock) -> None:
    settings = Settings(cancel_grace_s=10)
    with db.write() as tx:
        add_job(tx, time_limit_s=100)
        slow = claimed(tx)
        add_job(tx, time_limit_s=1000)
        deaf = claimed(tx, "w2")
        queue.cancel(tx, deaf.id)
    clock.forward(9)
    with db.read() as tx:
        assert queue.overdue(tx, settings) == []
    clock.forward(2)
    with db.read() as tx:
        assert [(o.job.id, o.kind) for o in queue.overdue(tx, settings)] == [(deaf.id, "cancel")]
    clock.forward(90)
    with db.read() as tx:
        assert {(o.job.id, o.kind) for o in queue.overdue(tx, settings)} == {
            (deaf.id, "cancel"),
            (slow.id, "time"),
        }


# -- credits, slots, lists -----------------------------------------------------------------------------------


def test_cancel_and_success_end_in_one_state(db: Database, account: str) -> None:
    """Whichever comes first counts: and the ledger says the same."""
    with db.write() as tx:
        add_job(tx), add_job(tx)
        first, second = claimed(tx), claimed(tx)
        queue.cancel(tx, first.id)
        assert queue.succeed(tx, first.id, first.fence, [output(first)], {}) is None
        assert queue.cancelled(tx, first.id, first.fence) is not None
        done = queue.succeed(tx, second.id, second.fence, [output(second)], {"seed": 1})
        assert done is not None
        assert queue.cancel(tx, second.id) == done
        assert (done.cost_captured, done.outputs, done.progress) == (4, (output(second),), 1.0)
        assert queue.get(tx, first.id).outputs == ()
        assert (account_row(tx).balance, account_row(tx).reserved) == (996, 0)
        assert ledger.check(tx) == []


def test_throttled_jobs_come_in_when_a_slot_is_free(db: Database) -> None:
    with db.write() as tx:
        make_account(tx, plan="free")  # one at a time
        first = add_job(tx)
        second, third = add_job(tx, admit=False), add_job(tx, admit=False)
        assert [queue.position(tx, j) for j in (first, second, third)] == [0, 1, 2]
        assert queue.admit(tx, "acct") == 0
        job = claimed(tx)
        assert queue.claim(tx, "w2", ("pocket",), "cpu") is None
        queue.succeed(tx, job.id, job.fence, [], {})
        assert [queue.get(tx, j.id).state for j in (second, third)] == [State.QUEUED, State.THROTTLED]
        queue.cancel(tx, second.id)
        assert queue.get(tx, third.id).state is State.QUEUED


def test_listing_pages(db: Database, account: str, clock: Clock) -> None:
    with db.write() as tx:
        make_account(tx, "else")
        add_job(tx, "else")
        ids = [add_job(tx, dialect="luma" if i % 2 else "api").id for i in range(7)]
        assert [j.id for j in queue.listing(tx, "acct", limit=3).jobs] == ids[:3:-1]
        page = queue.listing(tx, "acct", limit=3, order="asc", after=ids[1])
        assert ([j.id for j in page.jobs], page.has_more, page.total) == (ids[2:5], True, 7)
        page = queue.listing(tx, "acct", order="asc", after=ids[1], before=ids[4])
        assert [j.id for j in page.jobs] == ids[2:4]
        assert [j.id for j in queue.listing(tx, "acct", dialects=["luma"], offset=1).jobs] == [ids[3], ids[1]]
        assert queue.listing(tx, "acct", states=[State.RUNNING]).total == 0
        assert queue.listing(tx, None).total == 8
        with pytest.raises(NotFound):
            queue.get(tx, ids[0], account_id="else")
        assert queue.depth(tx) == {**dict.fromkeys(State, 0), State.QUEUED: 8}


def test_many_at_once_keep_their_order(db: Database, account: str) -> None:
    with db.write() as tx:
        news = [new_job(model=("a", "b")[i % 2], batch_id="b1", batch_index=i) for i in range(1001)]
        made = queue.insert_many(tx, news)
        assert [j.id for j in made] == [n.id for n in news]
        assert [j.seq for j in made] == sorted(j.seq for j in made)
        assert len(feed.after(tx, 0, limit=5000)) == 1001
        models = [row.model for row in tx.all(sa.select(jobs.c.model).order_by(*queue.ORDER))]
        assert sum(a != b for a, b in itertools.pairwise(models)) <= 20  # one after the other: 1,000
        assert queue.insert_many(tx, []) == []
