"""What has to happen without being asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutoscope.jobs import feed, housekeeping, idempotency, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Job, State
from mutoscope.settings import Settings
from tests.service.databases import Clock
from tests.service.making import add_job, output

DAY = 24 * 3600.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, retention_days=30)


def made(db: Database, settings: Settings, account: str) -> Job:
    """A finished job with a file."""
    with db.write() as tx:
        add_job(tx, account)
        job = queue.claim(tx, "w", ["pocket"], "cpu")
        assert job is not None
        done = queue.succeed(tx, job.id, job.fence, [output(job)], {})
    assert done is not None
    file = settings.data_dir / done.outputs[0].path
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    return done


def get(db: Database, job: Job) -> Job:
    with db.read() as tx:
        return queue.get(tx, job.id, deleted=True)


def test_old_outputs_go_and_the_books_stay(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    old = made(db, settings, account)
    clock.forward(29 * DAY)
    young = made(db, settings, account)
    assert housekeeping.sweep(db, settings).emptied == 0
    clock.forward(2 * DAY)
    assert housekeeping.sweep(db, settings).emptied == 1
    assert not (settings.data_dir / "outputs" / old.id).exists()
    assert (settings.data_dir / young.outputs[0].path).is_file()
    left = get(db, old)
    assert (left.state, left.outputs, left.cost_captured) == (State.SUCCEEDED, (), old.cost_captured)
    assert get(db, young).outputs == young.outputs
    assert housekeeping.sweep(db, settings).emptied == 0


def test_files_of_deleted_jobs_go_at_once(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    job = made(db, settings, account)
    with db.write() as tx:
        queue.delete(tx, job.id)
    clock.forward(1)
    assert housekeeping.sweep(db, settings).emptied == 1
    assert not (settings.data_dir / "outputs" / job.id).exists()


def test_what_killed_workers_left_goes_and_nothing_else(
    db: Database, settings: Settings, account: str
) -> None:
    """Three jobs: one has succeeded, one was cancelled after its worker died, one runs."""
    done = made(db, settings, account)
    with db.write() as tx:
        for _ in range(2):
            add_job(tx, account)
        stopped, runs = (queue.claim(tx, "w", ["pocket"], "cpu") for _ in range(2))
        assert stopped is not None
        assert runs is not None
        assert queue.cancelled(tx, stopped.id, stopped.fence)
    work, outputs = settings.data_dir / "work", settings.data_dir / "outputs"
    left = [
        work / f"{stopped.id}-1",
        work / f"{runs.id}-0",
        outputs / done.id / "0.part",
        outputs / stopped.id / "1",
    ]
    kept = [
        work / f"{runs.id}-1",
        outputs / done.id / "1",
        outputs / runs.id / "1.part",
        outputs / "unknown" / "1",
    ]
    for folder in (*left, *kept):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "input.png").write_bytes(b"x")
    assert housekeeping.sweep_leftovers(db, settings) == len(left)
    assert not any(folder.exists() for folder in left)
    assert not (outputs / stopped.id).exists()
    assert all((folder / "input.png").is_file() for folder in kept)
    assert housekeeping.sweep_leftovers(db, settings) == 0


def test_a_silent_worker_loses_its_job_within_forty_seconds(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    with db.write() as tx:
        add_job(tx, account)
        job = queue.claim(tx, "w", ["pocket"], "cpu", lease_s=settings.lease_s)
    assert job is not None
    clock.forward(settings.lease_s - 1)
    assert housekeeping.sweep(db, settings).lost == 0
    clock.forward(2)
    assert settings.lease_s + 1 < 40
    assert housekeeping.sweep(db, settings).lost == 1
    again = get(db, job)
    assert (again.state, again.crashes) == (State.QUEUED, 1)
    with db.write() as tx:
        assert queue.succeed(tx, job.id, job.fence, [output(job)], {}) is None


def test_rows_that_nobody_needs_are_forgotten(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    job = made(db, settings, account)
    with db.write() as tx:
        assert idempotency.begin(tx, account, "key", "POST /x", "hash") is None
        idempotency.keep(tx, account, "key", 200, {}, "{}")
        assert feed.after(tx, 0, job_id=job.id)
    clock.forward(settings.idempotency_hours * 3600 + 1)
    housekeeping.sweep(db, settings)
    with db.write() as tx:
        assert idempotency.begin(tx, account, "key", "POST /x", "another") is None  # free again
        assert feed.after(tx, 0, job_id=job.id)
    clock.forward(31 * DAY)
    housekeeping.sweep(db, settings)
    with db.read() as tx:
        assert not feed.after(tx, 0, job_id=job.id)
