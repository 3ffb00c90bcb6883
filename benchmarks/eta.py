"""How good the told times are: estimates at submit against what the runs then took, with the real engine.

    python -m benchmarks.eta                  # a table, and JSON in the last line

The starter model, several shapes in random order, on a fresh database: nothing is known at first. Each job's estimate
(seconds and the range for nine of ten) is taken when it is submitted and compared with the seconds from its claim to
its end. "first": before the first run of the shape (a guess, or scaled from other shapes); "learning": runs 2 to 20 of
a shape; "after 20": the runs after that, which is what counts. In the end a queue of all shapes is submitted at
once, and each job's expected end is compared with when it ended, relative to its wait and run.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutoscope.jobs import accounts, eta, migrations, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Caller, Job, State
from mutoscope.jobs.service import Service
from mutoscope.jobs.spec import JobSpec
from mutoscope.runner import find_runner
from mutoscope.settings import Settings
from mutoscope.worker import Worker

SHAPES: dict[str, dict[str, Any]] = {
    "64x64x17, 50 steps": {"frames": 17, "steps": 50},
    "64x64x33, 40 steps": {"frames": 33, "steps": 40},
    "112x64x17, 40 steps": {"width": 112, "height": 64, "frames": 17, "steps": 40},
}
LEARN = 20


@dataclass(frozen=True)
class Run:
    """One job: what was told at submit, and what came."""

    shape: str
    before: int  # runs of the shape that were known
    told: eta.Estimate
    took_s: float

    @property
    def error(self) -> float:
        return abs(self.told.seconds / self.took_s - 1)

    @property
    def covered(self) -> bool:
        return self.told.low <= self.took_s <= self.told.high


class House:
    """A database, the service and a worker with the real engine."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.settings = Settings(data_dir=folder, preload="pocket", threads=threads)
        self.db = Database(self.settings.database)
        migrations.upgrade(self.db)
        self.service = Service.make(self.settings)
        with self.db.write() as tx:
            self.caller = Caller(account=accounts.create(tx, "bench"), key_id="", scopes=("jobs",))
        runner = find_runner(self.settings.engine)("cpu", self.settings)
        self.worker = Worker(self.db, self.settings, runner, device="cpu")

    def submit(self, shape: str, seed: int) -> tuple[Job, eta.Estimate]:
        spec = JobSpec(prompt="a large red ball falls and bounces", seed=seed, **SHAPES[shape])
        with self.db.write() as tx:
            job = self.service.submit(tx, self.caller, spec, dialect="api")
            return job, eta.estimate(tx, job.model, None, job.resolved)

    def make(self) -> None:
        assert self.worker.turn(), "nothing waits"

    def get(self, job_id: str) -> Job:
        with self.db.read() as tx:
            job = queue.get(tx, job_id)
        assert job.state is State.SUCCEEDED, job
        return job


def learn(house: House, per_shape: int, rng: random.Random) -> list[Run]:
    """Runs of all shapes in random order."""
    order = [shape for shape in SHAPES for _ in range(per_shape)]
    rng.shuffle(order)
    known, runs = dict.fromkeys(SHAPES, 0), []
    for seed, shape in enumerate(order):
        job, told = house.submit(shape, seed)
        house.make()
        done = house.get(job.id)
        assert done.finished_at is not None
        assert done.started_at is not None
        runs.append(Run(shape, known[shape], told, done.finished_at - done.started_at))
        known[shape] += 1
    return runs


def line_up(house: House, n: int, rng: random.Random) -> list[float]:
    """A queue of `n` jobs: the error of each job's expected end, relative to how far off it was."""
    jobs = [house.submit(rng.choice(list(SHAPES)), 1000 + i)[0] for i in range(n)]
    with house.db.read() as tx:
        now, told = tx.now, {job.id: eta.finish_at(tx, job) for job in jobs}
    for _ in jobs:
        house.make()
    errors = []
    for job in jobs:
        ended, expected = house.get(job.id).finished_at, told[job.id]
        assert ended is not None
        assert expected is not None
        errors.append(abs((expected - now) / (ended - now) - 1))
    return errors


def row(name: str, runs: list[Run]) -> dict[str, Any]:
    return {
        "runs": name, "n": len(runs), "median_error": statistics.median(r.error for r in runs),
        "in_range": sum(r.covered for r in runs) / len(runs), "median_s": statistics.median(r.took_s for r in runs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", type=int, default=10, help="runs of each shape after the first 20")
    parser.add_argument("--queue", type=int, default=20, help="jobs of the queue at the end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    rng, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder), given.threads)
        runs = learn(house, LEARN + given.judge, rng)
        queued = line_up(house, given.queue, rng)
        house.db.close()
    late = [r for r in runs if r.before >= LEARN]
    rows = [row("first", [r for r in runs if r.before == 0])]
    rows.append(row("learning", [r for r in runs if 0 < r.before < LEARN]))
    rows += [row(f"after 20: {shape}", [r for r in late if r.shape == shape]) for shape in SHAPES]
    rows.append(row("after 20: all", late))
    print(f"{'runs':<32} {'n':>4} {'took':>7} {'median error':>13} {'in the range':>13}")
    for r in rows:
        print(
            f"{r['runs']:<32} {r['n']:>4} {r['median_s']:>6.2f}s {r['median_error']:>13.1%} {r['in_range']:>13.0%}"
        )
    print(f"expected end in a queue of {len(queued)}: median error {statistics.median(queued):.1%}")
    print(json.dumps({"rows": rows, "queue_median_error": statistics.median(queued), "seed": given.seed,
                      "seconds": round(time.monotonic() - began, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
