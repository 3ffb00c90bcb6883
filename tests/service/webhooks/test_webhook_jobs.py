"""What jobs tell, from the queue to the receiver."""

from __future__ import annotations

import json
from typing import Any

from mutoscope.jobs import endpoints, queue, webhooks
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Failure, Job, Output
from mutoscope.settings import Settings
from tests.service.databases import Clock
from tests.service.making import add_job, output
from tests.service.webhooks.conftest import Sends
from tests.service.webhooks.telling import deliver, endpoint

MODELS = ("pocket",)


def received(db: Database, settings: Settings, **options: Any) -> list[dict[str, Any]]:
    sends = Sends()
    deliver(db, settings, sends, **options)
    return sorted((json.loads(m.body) for m in sends.sent), key=lambda e: e["data"].get("sequence", 0))


def test_life_of_a_job(db: Database, settings: Settings, account: str, clock: Clock) -> None:
    endpoint(db, settings, events=tuple(endpoints.EVENTS))
    with db.write() as tx:
        add_job(tx)
    clock.forward(1)
    with db.write() as tx:
        job = queue.claim(tx, "w1", MODELS, "cpu")
        assert job is not None
    for i in range(5):
        clock.forward(4)
        with db.write() as tx:
            queue.progress(
                tx, job.id, job.fence, stage="denoise", step=i, steps=5, fraction=i / 5, eta_at=None
            )
    with db.write() as tx:
        queue.succeed(tx, job.id, job.fence, [output(job)], {"seed": 7})

    def link(job: Job, made: Output) -> str:
        return f"https://files.example/{job.id}/{made.role}"

    events = received(db, settings, render={"standard": webhooks.linked(link)})
    kinds = [e["type"] for e in events]
    assert kinds == ["job.created", "job.running", "job.progress", "job.progress", "job.succeeded"]
    assert [e["data"]["sequence"] for e in events] == [1, 2, 3, 4, 5]
    assert [e["data"]["state"] for e in events] == ["queued", "running", "running", "running", "succeeded"]
    assert [e["data"]["progress"] for e in events[2:4]] == [0.0, 0.6]
    (made,) = events[-1]["data"]["outputs"]
    assert made["url"] == f"https://files.example/{job.id}/video"
    assert "path" not in made
    assert events[-1]["data"]["cost_captured"] == job.cost


def test_failure_and_its_reason(db: Database, settings: Settings, account: str) -> None:
    with db.write() as tx:
        add_job(tx, spec={"prompt": "a ball", "webhook_url": "https://example.com/own"})
        job = queue.claim(tx, "w1", MODELS, "cpu")
        assert job is not None
        queue.fail(
            tx, job.id, job.fence, Failure.INPUT_UNREACHABLE, "source: https://x.example answered 404."
        )
    running, failed = received(db, settings)
    assert (running["type"], failed["type"]) == ("job.running", "job.failed")
    assert failed["data"]["failure"] == {
        "code": "input_unreachable", "message": "source: https://x.example answered 404.",
    }  # fmt: skip


def test_attempt_that_was_lost_is_told_as_running_again(
    db: Database, settings: Settings, account: str
) -> None:
    endpoint(db, settings, events=("job.running", "job.cancelled"))
    with db.write() as tx:
        made = add_job(tx)
        for _ in range(2):
            job = queue.claim(tx, "w1", MODELS, "cpu")
            assert job is not None
            queue.lose(tx, job.id, job.fence, "its worker died")
        queue.cancel(tx, made.id)
    events = received(db, settings)
    assert [e["type"] for e in events] == ["job.running", "job.running", "job.cancelled"]
    assert [e["data"]["attempt"] for e in events[:2]] == [1, 2]


def test_output_urls_of_a_deleted_job_are_left_out(db: Database, settings: Settings, account: str) -> None:
    endpoint(db, settings, events=("job.succeeded",))
    with db.write() as tx:
        add_job(tx)
        job = queue.claim(tx, "w1", MODELS, "cpu")
        assert job is not None
        queue.succeed(tx, job.id, job.fence, [output(job)], {})
        queue.delete(tx, job.id)
    (event,) = received(
        db, settings, render={"standard": webhooks.linked(lambda job, made: "https://x.example")}
    )
    assert event["data"]["state"] == "succeeded"
    assert "url" not in event["data"]["outputs"][0]


def test_events_and_money_are_one_transaction(db: Database, settings: Settings, account: str) -> None:
    """A success that is rolled back is neither told nor paid."""
    endpoint(db, settings, events=("job.succeeded",))
    with db.write() as tx:
        add_job(tx)
        job = queue.claim(tx, "w1", MODELS, "cpu")
        assert job is not None

    class Lost(Exception):
        pass

    try:
        with db.write() as tx:
            queue.succeed(tx, job.id, job.fence, [output(job)], {})
            raise Lost
    except Lost:
        pass
    assert received(db, settings) == []
    with db.write() as tx:
        assert queue.get(tx, job.id).cost_captured == 0
        assert queue.succeed(tx, job.id, job.fence, [output(job)], {}) is not None
    assert len(received(db, settings)) == 1
