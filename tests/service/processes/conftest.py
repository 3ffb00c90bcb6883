"""A worker with a fake runner on a database of its own, and jobs for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mutoscope.jobs import accounts, feed, ledger, migrations, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.feed import FeedEvent
from mutoscope.jobs.model import Job, Resolved, State
from mutoscope.jobs.spec import JobSpec
from mutoscope.runner import Runner
from mutoscope.settings import Settings
from mutoscope.worker import Worker
from tests.service.fakes import FakeRunner

COST = 7


@dataclass
class House:
    """Everything but the processes."""

    settings: Settings
    db: Database
    workers: list[tuple[Worker, threading.Thread]] = field(default_factory=list)

    def submit(
        self, prompt: str, *, model: str = "pocket", candidates: tuple[str, ...] = (), **spec: Any
    ) -> str:
        """A job as `submit` would make it, with credits reserved."""
        whole = JobSpec.model_validate({"prompt": prompt, **spec})
        frames = whole.frames or (1 if whole.operation == "image" else 5)
        resolved = Resolved(width=32, height=32, frames=frames, fps=8, steps=whole.steps or 4, passes=1,
                            out_width=whole.width or 32, out_height=whole.height or 32, seed=whole.seed or 1,
                            tier="draft", seconds=frames / 8)  # fmt: skip
        new = queue.NewJob(account_id="default", dialect="api", operation=whole.operation, model=model,
                           candidates=candidates, spec=whole.dump(), resolved=resolved, cost=COST, estimate_s=1.0,
                           time_limit_s=whole.time_limit_s or 60.0)  # fmt: skip
        with self.db.write() as tx:
            job = queue.insert(tx, new)
            ledger.reserve(tx, job)
        return job.id

    def get(self, job_id: str) -> Job:
        with self.db.read() as tx:
            return queue.get(tx, job_id)

    def cancel(self, job_id: str) -> Job:
        with self.db.write() as tx:
            return queue.cancel(tx, job_id)

    def events(self, job_id: str) -> list[FeedEvent]:
        with self.db.read() as tx:
            return feed.after(tx, 0, job_id=job_id, limit=1000)

    def wait(
        self, job_id: str, until: Callable[[Job], bool] = lambda job: job.is_terminal, limit_s: float = 30
    ) -> Job:
        """The job once it is so: looked at again and again, since another thread or process changes it."""
        clock = threading.Event()
        for _ in range(int(limit_s / 0.01)):
            job = self.get(job_id)
            if until(job):
                return job
            clock.wait(0.01)
        raise AssertionError(f"{job_id} is still {self.get(job_id)}")

    def worker(self, runner: Runner | None = None, **options: Any) -> Worker:
        """A running worker, in a thread."""
        made = Worker(self.db, self.settings, runner or self.runner(), device="cpu", **options)
        thread = threading.Thread(target=made.run)
        thread.start()
        self.workers.append((made, thread))
        return made

    def runner(self) -> FakeRunner:
        return FakeRunner("cpu", self.settings)

    def end(self) -> None:
        for worker, _ in self.workers:
            worker.drain(0)
        for _, thread in self.workers:
            thread.join(30)
            assert not thread.is_alive()
        self.workers.clear()

    def files(self) -> list[str]:
        """What lies in the folder of outputs, relative to it."""
        root = self.settings.data_dir / "outputs"
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

    def assert_sound(self) -> None:
        """Nothing is held, charged twice or half-written."""
        with self.db.read() as tx:
            assert ledger.check(tx) == []
            account = accounts.get(tx, "default")
            page = queue.listing(tx, None, limit=1000)
        assert account.reserved == 0
        done = [job for job in page.jobs if job.state is State.SUCCEEDED]
        assert all(job.is_terminal for job in page.jobs)
        assert [job.cost_captured for job in page.jobs] == [
            job.cost if job in done else 0 for job in page.jobs
        ]
        named = sorted(Path(o.path).relative_to("outputs").as_posix() for job in done for o in job.outputs)
        assert self.files() == named


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    settings = Settings(data_dir=tmp_path / "data", preload="", engine="tests.service.fakes:FakeRunner",
                        heartbeat_s=0.5, lease_s=5.0, cancel_grace_s=2.0, drain_s=5.0)  # fmt: skip
    settings.data_dir.mkdir()
    db = Database(settings.database)
    migrations.upgrade(db)
    with db.write() as tx:
        accounts.create(tx, "default", account_id="default")
        ledger.grant(tx, "default", 1_000_000)
    made = House(settings, db)
    yield made
    made.end()
    db.close()
