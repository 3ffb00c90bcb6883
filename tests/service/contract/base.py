"""What the contract tests of every dialect start from: the app in this process, and what a worker does to its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from mutoscope.jobs import queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Job
from mutoscope.server.app import create_app
from mutoscope.settings import Settings
from tests.service.databases import place_migrated


class InProcess(httpx.BaseTransport):
    """Hands an SDK's requests to the app without a network."""

    def __init__(self, http: TestClient) -> None:
        self.http = http

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        headers = {k: v for k, v in request.headers.items() if k != "host"}
        got = self.http.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx.Response(
            got.status_code, headers=list(got.headers.items()), content=got.content, request=request
        )


class AppInProcess:
    """The app, its database, and what workers do to jobs. `raising`: what nobody foresaw fails the test."""

    def __init__(self, data_dir: Path, *, raising: bool = False, **settings: Any) -> None:
        self.settings = Settings(data_dir=data_dir, **settings)
        place_migrated(data_dir)
        self.app = create_app(self.settings)
        self.db: Database = self.app.state.ctx.db
        self.http = TestClient(self.app, raise_server_exceptions=raising)

    def job(self, job_id: str | None) -> Job:
        assert job_id is not None
        with self.db.read() as tx:
            return queue.get(tx, job_id, deleted=True)

    def claim(self) -> Job:
        """The next job starts."""
        with self.db.write() as tx:
            job = queue.claim(tx, "worker", ["pocket"], "cpu")
        assert job is not None, "nothing waits"
        return job

    def progress(self, job: Job, fraction: float) -> None:
        with self.db.write() as tx:
            assert queue.progress(tx, job.id, job.fence, stage="denoise", step=5, steps=20, fraction=fraction,
                                  eta_at=tx.now + 30)  # fmt: skip
