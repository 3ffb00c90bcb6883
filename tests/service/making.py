"""Accounts and jobs with everything filled in, for tests that care about one field of them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from mutoscope.jobs import ledger, queue
from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import Account, Job, Output, Resolved
from mutoscope.jobs.queue import NewJob
from mutoscope.jobs.schema import accounts

MODELS = ("pocket",)


def make_account(
    tx: Tx, account_id: str = "acct", *, credits: int = 1000, plan: str = "unlimited", **values: Any
) -> str:
    """A row of `accounts` with credits that the ledger knows of. Returns its id."""
    row = {"id": account_id, "name": account_id, "plan": plan, "created_at": tx.now, **values}
    tx.run(sa.insert(accounts).values(row))
    if credits:
        ledger.grant(tx, account_id, credits, note="test")
    return account_id


def resolved(**changes: Any) -> Resolved:
    """A small clip."""
    values: dict[str, Any] = {
        "width": 64, "height": 64, "frames": 5, "fps": 16.0, "steps": 2, "passes": 1, "out_width": 64, "out_height": 64,
        "seed": 1, "tier": "draft", "seconds": 0.3,
    }  # fmt: skip
    return Resolved(**{**values, **changes})


def new_job(account_id: str = "acct", **changes: Any) -> NewJob:
    """A job that costs 4 credits and takes a second."""
    values: dict[str, Any] = {
        "account_id": account_id, "dialect": "api", "operation": "video", "model": "pocket",
        "spec": {"prompt": "a ball"}, "resolved": resolved(), "cost": 4, "estimate_s": 1.0, "time_limit_s": 60.0,
    }  # fmt: skip
    return NewJob(**{**values, **changes})


def add_job(tx: Tx, account_id: str = "acct", **changes: Any) -> Job:
    """A job with its credits reserved, as `service.submit` makes it."""
    job = queue.insert(tx, new_job(account_id, **changes))
    ledger.reserve(tx, job, overdraft=True)
    return job


def account_row(tx: Tx, account_id: str = "acct") -> Account:
    row = tx.first(sa.select(accounts).where(accounts.c.id == account_id))
    assert row is not None
    fields = Account.__dataclass_fields__
    return Account(**{k: v for k, v in row._mapping.items() if k in fields})


def output(job: Job) -> Output:
    """The file that a worker has written for this attempt."""
    return Output(
        role="video", path=f"outputs/{job.id}/{job.fence}/video.mp4", mime="video/mp4", size_bytes=1
    )
