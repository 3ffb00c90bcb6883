"""How long a job takes, learned from those that were made; and when a job will be done.

For a (model, device, shape): the median of the last SAMPLES runs, in which each counts FADE of the one after it, since
machines become faster and slower. A shape that was never made is scaled by its work, tokens x steps x passes, from
those of the model that were, with the same step cache and LoRAs or not if there are such, else from all, which for a
cache means too long; a model that was never run, by a first guess. Kept in the database, so a restart forgets
nothing.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import Job, Resolved, State
from mutoscope.jobs.scheduling import ORDER, QUEUED, RUNNING
from mutoscope.jobs.schema import jobs, timings, workers

SAMPLES = 20
FADE = 0.85
KEPT = 50
"""Samples kept of each (model, device, shape)."""
GUESS_S = 20.0
"""Of a model that nobody has run yet."""
ALIVE_S = 60.0
"""A worker that was heard of within this time counts."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds that a run takes; low to high holds nine of ten. `samples`: how many runs it rests on, 0 for a guess."""

    seconds: float
    low: float
    high: float
    samples: int


def work_of(resolved: Resolved) -> float:
    """Tokens x steps x passes: what denoising costs, up to a factor of the model and the device."""
    latent_frames = 1 + (resolved.frames - 1) / 4
    tokens = latent_frames * resolved.width * resolved.height / 256
    return tokens * resolved.steps * resolved.passes


def record(
    tx: Tx, *, model: str, device: str, resolved: Resolved, step_s: float, rest_s: float, load_s: float = 0.0
) -> None:
    """A job was made: seconds for a step, for all but the steps, and for loading the model."""
    tx.run(
        sa.insert(timings).values(
            model=model, device=device, shape=resolved.shape, work=work_of(resolved), step_s=step_s,
            rest_s=rest_s, load_s=load_s, at=tx.now,
        )
    )  # fmt: skip


def estimate(tx: Tx, model: str, device: str | None, resolved: Resolved) -> Estimate:
    """How long a run takes on a device, or on whichever has made the like (None)."""
    known = _samples(tx, model, device, resolved.shape)
    if known:
        totals = [row.step_s * resolved.steps + row.rest_s for row in known]
        return _spread(totals, len(known), 1.0)
    switched = timings.c.shape.like(f"%/%/{resolved.switches}") if resolved.switches else None
    alike = switched if switched is not None else timings.c.shape.not_like("%/%/%")
    like = _samples(tx, model, device, None, alike) or _samples(tx, model, device, None)
    if like:
        work = work_of(resolved)
        totals = [
            (row.step_s * _steps_of(row.shape) + row.rest_s) * work / max(row.work, 1e-9) for row in like
        ]
        return _spread(totals, 0, 2.0)
    return Estimate(seconds=GUESS_S, low=GUESS_S / 10, high=GUESS_S * 30, samples=0)


def wait(tx: Tx, job: Job) -> float:
    """Seconds until a waiting job starts: the estimates of all that comes before it, shared by the live workers."""
    if job.state not in (State.QUEUED, State.THROTTLED):
        return 0.0
    ahead = sa.select(sa.func.sum(jobs.c.estimate_s)).where(QUEUED)
    if job.state is State.QUEUED:
        mine = tx.first(sa.select(*ORDER).where(jobs.c.id == job.id))
        if mine is not None:
            ahead = ahead.where(sa.tuple_(*ORDER) < sa.tuple_(*(sa.literal(v) for v in mine)))
    left = sa.case((jobs.c.eta_at > tx.now, jobs.c.eta_at - tx.now), else_=0.0)
    running = tx.first(sa.select(sa.func.sum(left), sa.func.min(left), sa.func.count()).where(RUNNING))
    n = live_workers(tx)
    total = float(tx.scalar(ahead) or 0.0)
    if running is not None and running[2] >= n:
        total += float(running[0] or 0.0)
    return total / n


def backlog(tx: Tx) -> float:
    """Seconds until a job that is submitted now would start."""
    queued = sa.select(sa.func.sum(jobs.c.estimate_s)).where(QUEUED)
    total, n = float(tx.scalar(queued) or 0.0), live_workers(tx)
    left = sa.case((jobs.c.eta_at > tx.now, jobs.c.eta_at - tx.now), else_=0.0)
    running = tx.first(sa.select(sa.func.sum(left), sa.func.count()).where(RUNNING))
    busy = running is not None and running[1] >= n
    return (total + (float(running[0] or 0.0) if running is not None and busy else 0.0)) / n


def finish_at(tx: Tx, job: Job) -> float | None:
    """When a job is expected to end, unix seconds; None if it has ended."""
    if job.is_terminal:
        return None
    if job.state is State.RUNNING:
        return max(tx.now, job.eta_at) if job.eta_at is not None else tx.now + job.estimate_s
    return tx.now + wait(tx, job) + job.estimate_s


def live_workers(tx: Tx) -> int:
    """Workers that were heard of lately; at least one, as nothing can be said otherwise."""
    alive = (workers.c.state != "gone", workers.c.beat_at > tx.now - ALIVE_S)
    return max(1, int(tx.scalar(sa.select(sa.func.count()).select_from(workers).where(*alive)) or 0))


def prune(tx: Tx) -> int:
    """Forget all but the last KEPT samples of each kind."""
    rank = sa.func.row_number().over(
        partition_by=(timings.c.model, timings.c.device, timings.c.shape), order_by=timings.c.id.desc()
    )
    old = sa.select(timings.c.id, rank.label("rank")).subquery()
    return tx.run(sa.delete(timings).where(timings.c.id.in_(sa.select(old.c.id).where(old.c.rank > KEPT))))


def _samples(
    tx: Tx, model: str, device: str | None, shape: str | None, *alike: sa.ColumnElement[bool]
) -> Sequence[Row[*tuple[Any, ...]]]:
    query = sa.select(timings.c.shape, timings.c.work, timings.c.step_s, timings.c.rest_s)
    query = query.where(timings.c.model == model, *alike)
    if device is not None:
        query = query.where(timings.c.device == device)
    if shape is not None:
        query = query.where(timings.c.shape == shape)
    return tx.all(query.order_by(timings.c.id.desc()).limit(SAMPLES))


def _steps_of(shape: str) -> int:
    return int(shape.split("/")[1].split("x")[0])


def _middle(totals: Sequence[float]) -> float:
    """The median of runs, newest first, older ones weighing less."""
    weighted = sorted((total, FADE**age) for age, total in enumerate(totals))
    passed = list(accumulate(weight for _, weight in weighted))
    return weighted[bisect(passed, passed[-1] / 2)][0]


def _spread(totals: list[float], samples: int, doubt: float) -> Estimate:
    """The middle, and the range of nine tenths of what was seen, at least a tenth to either side."""
    middle = _middle(totals)
    ordered = sorted(totals)
    cut = len(ordered) // 20
    low, high = ordered[cut], ordered[-1 - cut]
    return Estimate(
        seconds=middle,
        low=min(low, 0.9 * middle) / doubt,
        high=max(high, 1.1 * middle) * doubt,
        samples=samples,
    )
