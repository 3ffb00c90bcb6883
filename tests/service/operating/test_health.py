"""What probes and Prometheus see, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from mutoscope.jobs import migrations, queue, workers
from mutoscope.jobs.database import Database
from mutoscope.server.app import create_app
from mutoscope.settings import Settings
from tests.service.databases import Clock
from tests.service.making import add_job, output

LABELS = {"state", "model", "stage", "result", "device", "method", "route", "status", "le"}


@pytest.fixture
def http(db: Database, clock: Clock, tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(
        Settings(data_dir=tmp_path, database_url=db.engine.url.render_as_string(hide_password=False))
    )
    app.state.ctx.db.clock = clock
    yield TestClient(app, raise_server_exceptions=False)
    app.state.ctx.db.close()


def register(db: Database) -> None:
    with db.write() as tx:
        workers.register(tx, worker_id="w", device="cpu", host="here", pid=1)


def metrics(http: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = http.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_alive_is_not_ready(http: TestClient, db: Database, clock: Clock) -> None:
    assert http.get("/healthz").json()["status"] == "ok"
    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["problems"] == ["no worker was heard of in the last minute"]
    register(db)
    assert http.get("/readyz").json() == {"status": "ready", "problems": []}
    clock.forward(300)
    assert http.get("/readyz").status_code == 503


def test_a_database_of_another_version_is_not_ready(
    http: TestClient, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(db)
    monkeypatch.setattr(migrations, "newest", lambda: "r9999")
    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert "another schema" in answer.json()["problems"][0]


def test_what_is_counted(http: TestClient, db: Database, account: str, clock: Clock) -> None:
    register(db)
    with db.write() as tx:
        for _ in range(3):
            add_job(tx, account)
    clock.forward(2)
    with db.write() as tx:
        job = queue.claim(tx, "w", ["pocket"], "cpu")
    assert job is not None
    clock.forward(5)
    with db.write() as tx:
        result = {"stages": {"denoise": 3.5, "decode": 1.0}}
        assert queue.succeed(tx, job.id, job.fence, [output(job)], result) is not None
    http.get(f"/api/v1/jobs/{job.id}")
    found = metrics(http)
    assert found["mutoscope_jobs", (("state", "queued"),)] == 2
    assert found["mutoscope_jobs_ended_total", (("state", "succeeded"),)] == 1
    assert found["mutoscope_device_seconds_total", (("model", "pocket"),)] == 5
    assert found["mutoscope_wait_seconds_total", (("model", "pocket"),)] == 2
    assert found["mutoscope_stage_seconds_total", (("stage", "denoise"),)] == 3.5
    assert found["mutoscope_stage_seconds_total", (("stage", "load"),)] == 0
    assert found["mutoscope_workers", (("device", "cpu"), ("state", "starting"))] == 1
    route = ("route", "/api/v1/jobs/{job_id}")
    assert any(route in labels for name, labels in found if name == "mutoscope_http_seconds_count")


def test_nothing_is_labelled_by_job_or_account(http: TestClient, db: Database, account: str) -> None:
    with db.write() as tx:
        job = add_job(tx, account)
    http.get(f"/api/v1/jobs/{job.id}")
    http.get("/api/v1/jobs/does-not-exist")
    http.get(f"/nowhere/{job.id}")
    found = metrics(http)
    assert {label for _, labels in found for label, _ in labels} <= LABELS
    assert not [labels for _, labels in found for _, value in labels if job.id in value or value == account]
