"""Accounts and jobs with everything filled in, for tests that care about one field of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs import accounts as book
from mutoscope.jobs import ledger, queue
from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import Account, Caller, Job, Output, Resolved
from mutoscope.jobs.pricing import Prices
from mutoscope.jobs.queue import NewJob
from mutoscope.jobs.registry import Model, Registry
from mutoscope.jobs.schema import accounts
from mutoscope.jobs.service import Service
from mutoscope.manifest import Defaults, Limits, ModelFile, ModelFiles, ModelManifest, Serving
from mutoscope.settings import Settings

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


class FixedRegistry(Registry):
    """These models and no others, whatever is installed."""

    def __init__(self, *models: Model, aliases: dict[str, str] | None = None) -> None:
        super().__init__(Path("/nowhere"), aliases)
        self.fixed = models

    def models(self) -> tuple[Model, ...]:
        return self.fixed


def make_model(name: str = "pocket", *, defaults: dict[str, Any] | None = None, most_frames: int = 161,
               sizes: tuple[tuple[int, int], ...] = ((64, 64), (112, 64)), max_pixels: int = 0,
               **service: Any) -> Model:  # fmt: skip
    """A model that nobody can load, with what the router has to know of it."""
    file = ModelFile(path=Path("/nowhere/file.gguf"))
    numbers: dict[str, Any] = {
        "steps": 20, "guidance": 2.0, "shift": 2.0, "sampler": "unipc", "width": 64, "height": 64, "frames": 17,
        "fps": 8.0,
    }  # fmt: skip
    return Model(
        ModelManifest(
            name=name, files=ModelFiles(dit=file, text_encoder=file, vae=file), sizes=sizes,
            defaults=Defaults(**numbers | (defaults or {})), service=Serving(**service),
            limits=Limits(max_frames=most_frames, max_pixels=max_pixels),
        )
    )  # fmt: skip


def make_service(*models: Model, data_dir: Path = Path("/nowhere"), **settings: Any) -> Service:
    """The service with models of one's own (a single "pocket" unless given) and the shipped price list."""
    registry = FixedRegistry(*(models or (make_model(),)))
    return Service(Settings(data_dir=data_dir, **settings), registry, Prices.load())


def caller_for(tx: Tx, account_id: str = "acct", *scopes: str) -> Caller:
    """Whoever speaks for the account, as it is now."""
    return Caller(account=book.get(tx, account_id), key_id=f"key-{account_id}", scopes=scopes or ("jobs",))


def cheaper(model: Model, factor: float) -> Model:
    """The same model at another price."""
    served = replace(model.manifest.service, price_factor=factor)
    return Model(replace(model.manifest, service=served))
