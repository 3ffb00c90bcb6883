"""A server in this process with an account, the official SDK pointed at it, and a hand that does the worker's part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from fastapi.testclient import TestClient
from openai import OpenAI

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.model import Failure, Job, Output
from mutoscope.media.deliver import Delivery
from tests.service.contract.base import AppInProcess

BASE = "http://testserver/openai/v1"


class InProcess(httpx2.BaseTransport):
    """Hands the SDK's requests to the app without a network; keeps them."""

    def __init__(self, http: TestClient) -> None:
        self.http = http
        self.seen: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.seen.append(request)
        headers = {k: v for k, v in request.headers.items() if k != "host"}
        got = self.http.request(request.method, str(request.url), content=request.read(), headers=headers)
        return httpx2.Response(
            got.status_code, headers=list(got.headers.items()), content=got.content, request=request
        )


class House(AppInProcess):
    """The app, its database, and what workers do to jobs."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        super().__init__(data_dir, **settings)
        self.transport = InProcess(self.http)
        with self.db.write() as tx:
            self.account = accounts.create(tx, "test").id
            _, self.key = accounts.create_key(tx, self.account, "test", value="sk-test")

    def client(self, key: str | None = None, **options: Any) -> OpenAI:
        """The official SDK, which refuses every answer that is not typed."""
        return OpenAI(
            api_key=key or self.key, base_url=BASE, http_client=httpx2.Client(transport=self.transport),
            _strict_response_validation=True, **{"max_retries": 0, **options},
        )  # fmt: skip

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def finish(self) -> Job:
        """The next job is made: real files, written by what the worker writes with."""
        job = self.claim()
        folder = self.settings.data_dir / "outputs" / job.id / str(job.fence)
        folder.mkdir(parents=True)
        delivery = Delivery(folder, format="mp4", width=64, height=32, fps=8, frames=9, info={})
        delivery.write(
            np.linspace(0, 255, 9).astype(np.uint8)[:, None, None, None] * np.ones((32, 64, 3), np.uint8)
        )
        outputs = [
            Output(role=d.role, path=f"outputs/{job.id}/{job.fence}/{d.name}", mime=d.mime, width=d.width,
                   height=d.height, frames=d.frames, fps=d.fps, size_bytes=(folder / d.name).stat().st_size)
            for d in delivery.close()
        ]  # fmt: skip
        with self.db.write() as tx:
            done = queue.succeed(tx, job.id, job.fence, outputs, {"seed": job.resolved.seed})
        assert done is not None
        return done

    def fail(self, failure: Failure, message: str) -> None:
        job = self.claim()
        with self.db.write() as tx:
            assert queue.fail(tx, job.id, job.fence, failure, message)
