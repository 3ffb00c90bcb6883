"""The order of dispatch against first come, first served: shares of accounts, changes of model, longest wait.

    python -m benchmarks.scheduling                 # a table, and JSON in the last line

Three accounts of weights 1, 2 and 5 send jobs of four kinds (two models, two shapes each) in random order, so that
all of them always have something waiting; one worker makes a thousand. The queue is the real one, on SQLite; the time
is simulated. The same arrivals in the order of arrival are the comparison. "Error" is how far an account's part of
the device's time is from its weight's part, relative to that; the worst of three accounts, at the end and at every
hundredth job from the 200th on. Changes of model are counted for a hundred jobs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs import accounts, migrations, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Priority, Resolved
from mutoscope.jobs.queue import NewJob

WEIGHTS = {"one": 1.0, "two": 2.0, "five": 5.0}
MODELS = {"pocket": 1.0, "large": 3.0}
"""Models, and how much longer their jobs take."""
FRAMES = (17, 33)
KINDS = [(model, frames) for model in MODELS for frames in FRAMES]
AHEAD = 40
"""Jobs that every account has waiting."""
RESOLVED = Resolved(
    width=64, height=64, frames=17, fps=8, steps=20, passes=1, out_width=64, out_height=64, seed=1, tier="draft",
    seconds=2.0,
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """One job, in the order of dispatch. Seconds of simulated time."""

    account: str
    model: str
    frames: int
    work_s: float
    arrived: int
    waited: int  # jobs that were dispatched between its arrival and its turn


@dataclass(frozen=True)
class Result:
    """Of one order."""

    error_end: float
    error_worst: float
    switches_per_100: float
    shape_changes_per_100: float
    longest_wait_jobs: int


def new_job(account: str, model: str, frames: int, unit_s: float, **changes: Any) -> NewJob:
    """A job of a kind; `unit_s` is how long the shortest one takes."""
    work_s = unit_s * MODELS[model] * frames / FRAMES[0]
    values: dict[str, Any] = {"priority": Priority.NORMAL, **changes}
    return NewJob(account_id=account, dialect="api", operation="video", model=model, spec={},
                  resolved=replace(RESOLVED, frames=frames), cost=0, estimate_s=work_s, time_limit_s=1e6,
                  **values)  # fmt: skip


def arrivals(rng: random.Random, weights: dict[str, float]) -> Iterator[tuple[str, str, int]]:
    """Account, model and frames of one job after the other, for ever, each account as often as the others."""
    while True:
        yield (rng.choice(list(weights)), *rng.choice(KINDS))


def serve(
    db: Database, n: int, unit_s: float, weights: dict[str, float], *, seed: int = 0, ahead: int = AHEAD
) -> list[Served]:
    """`n` jobs in the order of the queue, while every account always has `ahead` or more waiting."""
    rng = random.Random(seed)
    kinds = {name: rng.sample(KINDS * n, n * len(KINDS)) for name in weights}
    waiting, served, arrived = dict.fromkeys(weights, 0), [], {}
    with db.write() as tx:
        for name, weight in weights.items():
            accounts.create(tx, name, weight=weight, account_id=name)
    while len(served) < n:
        with db.write() as tx:
            news = []
            for name in weights:
                while waiting[name] < ahead:
                    model, frames = kinds[name].pop()
                    news.append(new_job(name, model, frames, unit_s))
                    waiting[name] += 1
            rng.shuffle(news)
            for new in news:
                arrived[queue.insert(tx, new).id] = len(served)
            job = queue.claim(tx, "w", tuple(MODELS), "cpu")
            assert job is not None
            assert queue.succeed(tx, job.id, job.fence, [], {}) is not None
        waiting[job.account_id] -= 1
        came = arrived[job.id]
        served.append(
            Served(job.account_id, job.model, job.resolved.frames, job.estimate_s, came, len(served) - came)
        )
    return served


def first_come(n: int, unit_s: float, weights: dict[str, float], *, seed: int = 0) -> list[Served]:
    """As many jobs of the same kinds in the order of arrival."""
    rng, served = random.Random(seed), []
    for (name, model, frames), i in zip(arrivals(rng, weights), range(n), strict=False):
        work_s = unit_s * MODELS[model] * frames / FRAMES[0]
        served.append(Served(name, model, frames, work_s, i, AHEAD * len(weights)))
    return served


def share_error(served: Sequence[Served], weights: dict[str, float]) -> float:
    """The worst of the accounts, relative to its share."""
    total = sum(s.work_s for s in served)
    parts = {name: sum(s.work_s for s in served if s.account == name) / total for name in weights}
    whole = sum(weights.values())
    return max(abs(parts[name] / (weight / whole) - 1) for name, weight in weights.items())


def judge(served: Sequence[Served], weights: dict[str, float]) -> Result:
    """The figures of an order."""
    n = len(served)
    changes = sum(a.model != b.model for a, b in pairwise(served))
    shapes = sum((a.model, a.frames) != (b.model, b.frames) for a, b in pairwise(served))
    return Result(
        error_end=share_error(served, weights),
        error_worst=max(share_error(served[:i], weights) for i in range(min(200, n), n + 1, 100)),
        switches_per_100=100 * changes / n,
        shape_changes_per_100=100 * shapes / n,
        longest_wait_jobs=max(s.waited for s in served),
    )


def fresh(folder: Path) -> Database:
    """An empty database; what survives a power cut does not matter here."""
    db = Database(f"sqlite:///{folder / 'scheduling.db'}", clock=lambda: 1e9)
    sa.event.listen(db.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF"))
    migrations.upgrade(db)
    return db


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--unit", type=float, nargs="*", default=[1.0, 5.0, 30.0, 300.0],
                        help="seconds of the shortest kind of job")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for unit_s in given.unit:
        with tempfile.TemporaryDirectory() as folder:
            db = fresh(Path(folder))
            ours = judge(serve(db, given.jobs, unit_s, WEIGHTS, seed=given.seed), WEIGHTS)
            db.close()
        fifo = judge(first_come(given.jobs, unit_s, WEIGHTS, seed=given.seed), WEIGHTS)
        rows += [
            {"order": name, "unit_s": unit_s, **vars(r)} for name, r in (("queue", ours), ("fifo", fifo))
        ]
    print("order  shortest job  error at end  worst  model changes / 100  shape changes / 100  longest wait")
    for r in rows:
        print(
            f"{r['order']:<6} {r['unit_s']:>10g} s  {r['error_end']:>11.1%} {r['error_worst']:>6.1%}"
            f"  {r['switches_per_100']:>19.1f}  {r['shape_changes_per_100']:>19.1f}  {r['longest_wait_jobs']:>7} jobs"
        )
    print(json.dumps({"jobs": given.jobs, "weights": WEIGHTS, "seed": given.seed, "rows": rows}))


if __name__ == "__main__":
    main()
