"""A server in this process with two accounts and an administrator, and a hand that does the worker's part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from httpx import Response

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Job, Output
from mutoscope.server.app import create_app
from mutoscope.settings import Settings

BASE = "/api/v1"
DRAFT = {"prompt": "a red ball", "quality": "draft"}
"""The smallest job: 4 credits."""


class House:
    """The app, its database, and what workers do to jobs."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.settings = Settings(data_dir=data_dir, **settings)
        self.app = create_app(self.settings)
        self.db: Database = self.app.state.ctx.db
        self.http = TestClient(self.app, raise_server_exceptions=False)
        self.keys: dict[str, str] = {}
        with self.db.write() as tx:
            accounts.create(tx, "default", account_id="default")
            accounts.create(tx, "other", account_id="other")
            for name, account, scopes in (
                ("jobs", "default", ["jobs"]), ("admin", "default", ["jobs", "admin"]), ("read", "default", ["read"]),
                ("other", "other", ["jobs"]),
            ):  # fmt: skip
                _, self.keys[name] = accounts.create_key(tx, account, name, scopes=scopes)

    def call(
        self, method: str, path: str, body: Any = None, *, key: str = "jobs", **options: Any
    ) -> Response:
        headers = {"authorization": f"Bearer {self.keys.get(key, key)}", **options.pop("headers", {})}
        given = {"json": body} if body is not None else {}
        return self.http.request(method, path if path.startswith("http") else BASE + path, headers=headers,
                                 **given, **options)  # fmt: skip

    def get(self, path: str, **options: Any) -> Any:
        """The JSON of a successful GET."""
        got = self.call("GET", path, **options)
        assert got.status_code == 200, got.text
        return got.json()

    def post(self, path: str, body: Any = None, *, expect: int = 201, **options: Any) -> Any:
        got = self.call("POST", path, body, **options)
        assert got.status_code == expect, got.text
        return got.json()

    def refused(
        self, method: str, path: str, body: Any = None, *, status: int, **options: Any
    ) -> dict[str, Any]:
        """What an error says."""
        got = self.call(method, path, body, **options)
        assert got.status_code == status, got.text
        assert set(got.json()) == {"error"}
        error: dict[str, Any] = got.json()["error"]
        assert set(error) == {"code", "message", "hint", "field"}
        return error

    def claim(self, models: tuple[str, ...] = ("pocket",)) -> Job:
        with self.db.write() as tx:
            job = queue.claim(tx, "worker", models, "cpu")
        assert job is not None, "nothing waits"
        return job

    def step(self, job: Job, fraction: float, preview: str | None = None) -> None:
        with self.db.write() as tx:
            assert queue.progress(tx, job.id, job.fence, stage="denoise", step=round(20 * fraction), steps=20,
                                  fraction=fraction, eta_at=tx.now + 30, preview=preview)  # fmt: skip

    def succeed(self, job: Job) -> None:
        relative = f"outputs/{job.id}/{job.fence}/video.mp4"
        path = self.settings.data_dir / relative
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not really a video")
        output = Output(role="video", path=relative, size_bytes=18, mime="video/mp4", width=16, height=16)
        with self.db.write() as tx:
            assert queue.succeed(tx, job.id, job.fence, [output], {"seed": job.resolved.seed})


def events(text: str) -> list[dict[str, Any]]:
    """Server-sent events as {"id", "event", "data"}; comments and `retry` are left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != ":")
        if "data" in fields:
            found.append(
                {"id": int(fields["id"]), "event": fields["event"], "data": json.loads(fields["data"])}
            )
    return found


@contextmanager
def opened(house: House) -> Iterator[House]:
    with house.http:
        yield house
