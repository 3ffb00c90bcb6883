"""The whole way: an endpoint made over the API, a job, a worker's result, and the web process that tells of it."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from fastapi.testclient import TestClient
from standardwebhooks import Webhook

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.model import Output
from mutoscope.server.app import create_app
from mutoscope.settings import Settings
from tests.service.webhooks.conftest import Receiver


def test_from_the_api_to_the_receiver(tmp_path: Path, receiver: Receiver) -> None:
    settings = Settings(data_dir=tmp_path, allow_private_hosts=("127.0.0.1",), public_url="http://testserver")
    app = create_app(settings, loops=True)
    ctx = app.state.ctx
    with ctx.db.write() as tx:
        account = accounts.create(tx, "test")
        key = accounts.create_key(tx, account.id, "test")[1]
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        body = {"url": receiver.url("/200/hook"), "events": ["job.succeeded"]}
        made = client.post("/api/v1/webhooks", json=body)
        assert made.status_code == 201, made.text
        secret, endpoint_id = made.json()["secret"], made.json()["id"]
        assert client.post(f"/api/v1/webhooks/{endpoint_id}/test").status_code == 202
        assert receiver.arrived.acquire(timeout=20)

        job_id = client.post("/api/v1/jobs", json={"prompt": "a red ball"}).json()["id"]
        with ctx.db.write() as tx:
            job = queue.claim(tx, "w1", ("pocket",), "cpu")
            assert job is not None
            assert job.id == job_id
        path = f"outputs/{job.id}/{job.fence}/video.mp4"
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"film")
        with ctx.db.write() as tx:
            output = Output(role="video", path=path, mime="video/mp4", size_bytes=4)
            assert queue.succeed(tx, job.id, job.fence, [output], {}) is not None
        assert receiver.arrived.acquire(timeout=20)

        kinds = []
        for _, headers, sent in receiver.got:
            event = Webhook(secret).verify(sent, headers)
            kinds.append(event["type"])
        assert kinds == ["ping", "job.succeeded"]
        event = json.loads(receiver.got[-1][2])
        assert event["data"]["id"] == job_id
        link = urlsplit(event["data"]["outputs"][0]["url"])
        assert client.get(f"{link.path}?{link.query}").content == b"film"
        deliveries = client.get("/api/v1/webhooks/deliveries").json()["data"]
        assert {d["event"] for d in deliveries} == {"ping", "job.succeeded"}
