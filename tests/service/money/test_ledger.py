"""The ledger: double entry, never changed, and in agreement with balances and jobs whatever happens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from mutoscope.jobs import accounts, ledger, plans, queue
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import InvalidRequest, OutOfCredits
from mutoscope.jobs.model import Failure, Job, State
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.schema import ledger as table
from mutoscope.jobs.spec import JobSpec
from tests.service.databases import Clock
from tests.service.making import account_row, add_job, caller_for, make_account, make_service, new_job, output

MONTH_S = plans.MONTH_S


def kinds(tx: Tx, job: Job) -> list[tuple[str, str, str, int]]:
    rows = tx.all(sa.select(table).where(table.c.job_id == job.id).order_by(table.c.id))
    return [(r.kind, r.debit, r.credit, r.amount) for r in rows]


def claimed(tx: Tx) -> Job:
    job = queue.claim(tx, "w", ("pocket",), "cpu")
    assert job is not None
    return job


def sums(tx: Tx) -> dict[str, int]:
    """What is in each book."""
    books: dict[str, int] = {}
    for row in tx.all(sa.select(table)):
        books[row.debit] = books.get(row.debit, 0) - row.amount
        books[row.credit] = books.get(row.credit, 0) + row.amount
    return books


def test_success_takes_what_was_held(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx, cost=7)
        assert (account_row(tx).balance, account_row(tx).reserved) == (993, 7)
        job = claimed(tx)
        done = queue.succeed(tx, job.id, job.fence, [output(job)], {})
        assert done is not None
        assert done.cost_captured == 7
        assert kinds(tx, job) == [
            ("reserve", "wallet:acct", "held:acct", 7),
            ("capture", "held:acct", "income", 7),
        ]
        assert sums(tx) == {"grants": -1000, "wallet:acct": 993, "held:acct": 0, "income": 7}
        assert sum(sums(tx).values()) == 0  # every entry has two sides
        assert ledger.check(tx) == []


@pytest.mark.parametrize("how", ["fail", "cancel waiting", "cancel running", "lose for good"])
def test_all_else_gives_it_back(db: Database, account: str, how: str) -> None:
    with db.write() as tx:
        made = add_job(tx, cost=7)
        if how == "cancel waiting":
            queue.cancel(tx, made.id)
        else:
            job = claimed(tx)
            if how == "fail":
                queue.fail(tx, job.id, job.fence, Failure.INTERNAL, "no")
            elif how == "lose for good":
                queue.lose(tx, job.id, job.fence, "it died", max_crashes=1)
            else:
                queue.cancel(tx, job.id)
                queue.cancelled(tx, job.id, job.fence)
        assert kinds(tx, made)[1:] == [("release", "held:acct", "wallet:acct", 7)]
        assert (account_row(tx).balance, account_row(tx).reserved) == (1000, 0)
        assert queue.get(tx, made.id).cost_captured == 0
        assert ledger.check(tx) == []
        assert ledger.unsettled(tx) == []


def test_a_job_that_became_cheaper_gets_the_rest_back(db: Database, account: str) -> None:
    with db.write() as tx:
        made = add_job(tx, cost=9)
        tx.run(sa.update(jobs).where(jobs.c.id == made.id).values(cost=4))
        job = claimed(tx)
        queue.succeed(tx, job.id, job.fence, [output(job)], {})
        assert [(kind, amount) for kind, _, _, amount in kinds(tx, job)] == [
            ("reserve", 9), ("capture", 4), ("release", 5),
        ]  # fmt: skip
        assert account_row(tx).balance == 996


def test_a_free_job_has_its_entries_too(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx, cost=0)
        job = claimed(tx)
        queue.succeed(tx, job.id, job.fence, [output(job)], {})
        assert [kind for kind, *_ in kinds(tx, job)] == ["reserve", "release"]
        assert ledger.unsettled(tx) == []


def test_entries_never_change(db: Database, account: str) -> None:
    """The database itself refuses."""
    for change in (sa.update(table).values(amount=1), sa.delete(table)):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), db.write() as tx:
            tx.run(change)
    with db.read() as tx:
        assert ledger.check(tx) == []


def test_nothing_is_held_or_taken_twice(db: Database, account: str) -> None:
    with db.write() as tx:
        add_job(tx)
        job = claimed(tx)
        queue.succeed(tx, job.id, job.fence, [output(job)], {})
    for again in (ledger.reserve, lambda tx, job: ledger.settle(tx, [job])):
        with pytest.raises(sa.exc.IntegrityError), db.write() as tx:
            again(tx, queue.get(tx, job.id))
    with db.read() as tx:
        assert account_row(tx).balance == 996
        assert ledger.check(tx) == []


def test_what_cannot_be_paid_is_refused_and_leaves_nothing(db: Database) -> None:
    service = make_service()
    with db.write() as tx:
        make_account(tx, credits=3, plan="pro")
    for spec in (JobSpec(prompt="x", quality="draft"), JobSpec(prompt="x", resolution="1080p")):
        with pytest.raises(OutOfCredits, match="balance is 3"), db.write() as tx:
            service.submit(tx, caller_for(tx), spec, dialect="api")
    with db.read() as tx:
        assert queue.listing(tx, "acct").total == 0
        assert (account_row(tx).balance, account_row(tx).reserved) == (3, 0)
        assert ledger.check(tx) == []


def test_two_requests_cannot_spend_the_last_credit(db: Database) -> None:
    service = make_service()
    with db.write() as tx:
        make_account(tx, credits=10, plan="pro", limits={"concurrency": None})

    def submit(_: int) -> bool:
        try:
            with db.write() as tx:
                service.submit(tx, caller_for(tx), JobSpec(prompt="x", quality="draft"), dialect="api")
        except OutOfCredits:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(submit, range(6))) == 2  # of 4 credits each
    with db.read() as tx:
        assert (account_row(tx).balance, account_row(tx).reserved) == (2, 8)
        assert ledger.check(tx) == []


def test_overdraft_is_for_ones_own_machine(db: Database) -> None:
    service = make_service()
    with db.write() as tx:
        make_account(tx, credits=0)
        service.submit(tx, caller_for(tx), JobSpec(prompt="x", quality="draft"), dialect="api")
        assert account_row(tx).balance == -4
        assert plans.shown_balance(account_row(tx)) == plans.UNLIMITED_BALANCE
        assert ledger.check(tx) == []


def test_grants_and_pages_of_entries(db: Database, account: str) -> None:
    with db.write() as tx:
        for amount in (0, -5):
            with pytest.raises(InvalidRequest, match="amount"):
                ledger.grant(tx, "acct", amount)
        for n in range(1, 6):
            ledger.grant(tx, "acct", n, note=f"n{n}")
        first = ledger.entries(tx, "acct", limit=2)
        assert [e.note for e in first] == ["n5", "n4"]
        rest = ledger.entries(tx, "acct", before=first[-1].id, limit=10)
        assert [e.amount for e in rest] == [3, 2, 1, 1000]
        assert ledger.entries(tx, "else") == []


def test_what_does_not_fit_is_found(db: Database, account: str) -> None:
    """`check` and `unsettled` can fail."""
    with db.write() as tx:
        tx.run(sa.update(ledger.accounts).values(balance=999))
        (wrong,) = ledger.check(tx)
        assert (wrong.account_id, wrong.balance, wrong.balance_by_ledger) == ("acct", 999, 1000)
        unpaid = queue.insert(tx, new_job())
        assert ledger.unsettled(tx) == [unpaid.id]
        held = add_job(tx)
        tx.run(sa.update(jobs).where(jobs.c.id == held.id).values(state=State.SUCCEEDED))
        assert set(ledger.unsettled(tx)) == {unpaid.id, held.id}


# -- plans' credits ------------------------------------------------------------------------------------------


def test_plan_credits_come_monthly_and_lapse(db: Database, clock: Clock) -> None:
    """Those of the plan are spent before those that were bought, and what is left of them lapses."""
    with db.write() as tx:
        account = accounts.create(tx, "team", plan="plus", account_id="acct")
        assert account.balance == 10_000
        ledger.grant(tx, "acct", 500)
        add_job(tx, cost=3000)
        job = claimed(tx)
        queue.succeed(tx, job.id, job.fence, [output(job)], {})
        assert accounts.renew_due(tx) == 0
    clock.forward(MONTH_S - 1)
    with db.write() as tx:
        assert accounts.renew_due(tx) == 0
    clock.forward(1)
    with db.write() as tx:
        add_job(tx, cost=2000)  # held over the turn: counts as spent
        assert accounts.renew_due(tx) == 1
        assert accounts.renew_due(tx) == 0
        assert account_row(tx).balance == 10_000 + 500
        newest = [(e.kind, e.amount) for e in ledger.entries(tx, "acct", limit=2)]
        assert newest == [("plan", 10_000), ("lapse", 5000)]
        assert ledger.check(tx) == []


def test_bought_credits_do_not_lapse(db: Database, clock: Clock) -> None:
    with db.write() as tx:
        accounts.create(tx, "team", plan="free", account_id="acct")
        ledger.grant(tx, "acct", 1000)
        add_job(tx, cost=900)  # all 400 of the plan, and 500 of the bought ones
        job = claimed(tx)
        queue.succeed(tx, job.id, job.fence, [output(job)], {})
    clock.forward(MONTH_S)
    with db.write() as tx:
        assert accounts.renew_due(tx) == 1
        assert account_row(tx).balance == 500 + 400
        assert [e.kind for e in ledger.entries(tx, "acct", limit=2)] == ["plan", "capture"]


def test_another_plan_begins_its_own_month(db: Database, clock: Clock) -> None:
    with db.write() as tx:
        accounts.create(tx, "team", plan="plus", account_id="acct")
    clock.forward(10 * plans.DAY_S)
    with db.write() as tx:
        assert accounts.change(tx, "acct", plan="pro").balance == 40_000
        assert accounts.change(tx, "acct", plan="pro").balance == 40_000  # once
    clock.forward(25 * plans.DAY_S)
    with db.write() as tx:
        assert accounts.renew_due(tx) == 0
        assert accounts.change(tx, "acct", plan="unlimited").balance == 0
        assert ledger.check(tx) == []


def test_disabled_accounts_get_nothing(db: Database, clock: Clock) -> None:
    with db.write() as tx:
        accounts.create(tx, "team", plan="plus", account_id="acct")
        accounts.change(tx, "acct", disabled=True)
    clock.forward(3 * MONTH_S)
    with db.write() as tx:
        assert accounts.renew_due(tx) == 0
        accounts.change(tx, "acct", disabled=False)
        assert accounts.renew_due(tx) == 1  # one month, not three
        assert account_row(tx).balance == 10_000
