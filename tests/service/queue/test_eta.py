"""Learned times: medians of what was measured, kept across restarts, scaled for shapes that are new, calibrated."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from mutoscope.jobs import eta, queue, workers
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.model import Resolved
from mutoscope.jobs.schema import timings
from tests.service.databases import Clock, Sqlite
from tests.service.making import add_job, resolved

SHAPE = resolved(frames=17, steps=20, passes=2)


def record(tx: Tx, step_s: float, rest_s: float = 0.0, *, model: str = "pocket", device: str = "cpu",
           shape: Resolved = SHAPE) -> None:  # fmt: skip
    eta.record(tx, model=model, device=device, resolved=shape, step_s=step_s, rest_s=rest_s)


def test_the_median_of_the_last_twenty(db: Database) -> None:
    with db.write() as tx:
        guess = eta.estimate(tx, "pocket", "cpu", SHAPE)
        assert (guess.seconds, guess.samples) == (eta.GUESS_S, 0)
        for _ in range(30):
            record(tx, 9.0)  # long ago the machine was slower
        for _ in range(19):
            record(tx, 0.5, 2.0)
        record(tx, 5.0)  # once
        found = eta.estimate(tx, "pocket", "cpu", SHAPE)
        assert (found.seconds, found.samples) == (12.0, 20)
        assert found.low <= 0.9 * 12.0 < 1.1 * 12.0 <= found.high


def test_a_machine_that_becomes_faster_is_noticed(db: Database) -> None:
    with db.write() as tx:
        for _ in range(20):
            record(tx, 1.0)
        for n in range(1, 6):
            record(tx, 0.4)
            seconds = eta.estimate(tx, "pocket", "cpu", SHAPE).seconds
            assert seconds == (20.0 if n < 5 else 8.0), n
        assert eta.estimate(tx, "pocket", "cpu", SHAPE).high >= 20.0  # it may become slow again


def test_models_devices_and_shapes_do_not_mix(db: Database) -> None:
    with db.write() as tx:
        record(tx, 1.0)
        record(tx, 3.0, device="cuda:0")
        record(tx, 7.0, model="other")
        assert eta.estimate(tx, "pocket", "cpu", SHAPE).seconds == 20.0
        assert eta.estimate(tx, "pocket", "cuda:0", SHAPE).seconds == 60.0
        assert eta.estimate(tx, "other", "cpu", SHAPE).seconds == 140.0
        assert eta.estimate(tx, "nobody", "cpu", SHAPE).samples == 0


def test_a_new_shape_is_scaled_by_its_work(db: Database) -> None:
    larger = resolved(frames=33, width=128, height=64, steps=40, passes=2)
    with db.write() as tx:
        record(tx, 1.0)
        found = eta.estimate(tx, "pocket", "cpu", larger)
        assert found.seconds == pytest.approx(20.0 * 2 * 2 * 9 / 5)  # steps, width, latent frames
        assert (found.samples, found.low < found.seconds / 1.9, found.high > found.seconds * 1.9) == (
            0,
            True,
            True,
        )


def test_restarts_forget_nothing(sqlite: Sqlite, tmp_path: Path, clock: Clock) -> None:
    first = sqlite.make(tmp_path, clock)
    with first.write() as tx:
        record(tx, 0.25)
    first.close()
    second = Database(first.url, clock=clock)
    with second.read() as tx:
        assert eta.estimate(tx, "pocket", "cpu", SHAPE).seconds == 5.0
    second.close()


def test_only_so_many_samples_are_kept(db: Database) -> None:
    with db.write() as tx:
        for i in range(eta.KEPT + 5):
            record(tx, float(i))
        record(tx, 1.0, model="other")
        assert eta.prune(tx) == 5
        assert min(row.step_s for row in tx.all(timings.select().where(timings.c.model == "pocket"))) == 5.0
        assert eta.prune(tx) == 0


def test_when_a_job_starts_and_ends(db: Database, account: str, clock: Clock) -> None:
    with db.write() as tx:
        jobs = [add_job(tx, estimate_s=10.0) for _ in range(4)]
        assert [eta.wait(tx, job) for job in jobs] == [0.0, 10.0, 20.0, 30.0]
        assert eta.backlog(tx) == 40.0
        running = queue.claim(tx, "w", ("pocket",), "cpu")
        assert running is not None
        assert eta.finish_at(tx, running) == clock.now + 10.0
        assert [eta.wait(tx, job) for job in jobs[1:]] == [10.0, 20.0, 30.0]
        queue.progress(
            tx,
            running.id,
            running.fence,
            stage="denoise",
            step=1,
            steps=2,
            fraction=0.5,
            eta_at=clock.now + 4,
        )
    clock.forward(1)
    with db.write() as tx:
        assert eta.wait(tx, jobs[1]) == 3.0  # what the worker itself expects
        assert eta.finish_at(tx, jobs[3]) == pytest.approx(clock.now + 3 + 20 + 10)
        for name in ("a", "b"):
            workers.register(tx, worker_id=name, device="cpu", host="h", pid=1)
        assert eta.wait(tx, jobs[3]) == 10.0  # two share the work, one of them is free
    clock.forward(eta.ALIVE_S + 1)
    with db.write() as tx:
        assert eta.live_workers(tx) == 1
        late = queue.get(tx, running.id)
        assert eta.finish_at(tx, late) == clock.now  # never in the past
        done = queue.succeed(tx, running.id, running.fence, [], {})
        assert done is not None
        assert eta.finish_at(tx, done) is None


@pytest.mark.parametrize("noise", [0.05, 0.15])
def test_calibration_on_recorded_noise(sqlite_db: Database, noise: float) -> None:
    """Runs that vary, with a slow one now and then: after 20 samples the median error is at most 15 %, and the range
    holds what it says. benchmarks/eta.py does it with the real engine."""
    rng, errors, held = random.Random(1), [], []
    with sqlite_db.write() as tx:
        for n in range(120):
            run = rng.lognormvariate(0, noise) * (2.5 if rng.random() < 0.03 else 1.0)
            told = eta.estimate(tx, "pocket", "cpu", SHAPE)
            if n >= 20:
                errors.append(abs(told.seconds / (20 * run) - 1))
                held.append(told.low <= 20 * run <= told.high)
            record(tx, run)
    assert statistics.median(errors) <= 0.15
    assert 0.8 <= sum(held) / len(held) <= 0.99
