"""What is written for whom: events, endpoints, replay. Nothing here sends."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import sqlalchemy as sa

from mutoscope.jobs import endpoints, outbox, schema
from mutoscope.jobs.database import Database
from mutoscope.jobs.errors import InvalidRequest, NotFound
from mutoscope.jobs.model import State
from mutoscope.jobs.webhooks import Answer, deliver_due
from mutoscope.settings import Settings
from tests.service.databases import START, Clock
from tests.service.webhooks.conftest import Sends, make_job

URL = "https://example.com/hook"
pytestmark = pytest.mark.usefixtures("account")


def create(
    db: Database, settings: Settings, url: str = URL, events: tuple[str, ...] = ()
) -> endpoints.Endpoint:
    with db.write() as tx:
        return endpoints.create(tx, settings, "acct", url, events)


def tell(db: Database, event: str, **job: Any) -> None:
    with db.write() as tx:
        outbox.enqueue(tx, make_job(**job), event)


def listed(db: Database, **filters: Any) -> list[outbox.Delivery]:
    with db.read() as tx:
        return outbox.listing(tx, "acct", **filters)


def events(db: Database) -> list[str]:
    return [d.event for d in listed(db)][::-1]


def test_nothing_is_written_when_nobody_asked(db: Database) -> None:
    for event in endpoints.EVENTS:
        tell(db, event)
    assert listed(db) == []


def test_endpoint_gets_all_but_progress(db: Database, settings: Settings) -> None:
    create(db, settings)
    for event in endpoints.EVENTS:
        tell(db, event)
    assert events(db) == [e for e in endpoints.EVENTS if e != "job.progress"]


def test_endpoint_gets_what_it_names(db: Database, settings: Settings) -> None:
    create(db, settings, events=("job.failed", "job.progress"))
    for event in endpoints.EVENTS:
        tell(db, event)
    assert events(db) == ["job.progress", "job.failed"]


def test_url_of_a_job_gets_its_changes(db: Database) -> None:
    spec = {"prompt": "a ball", "webhook_url": URL}
    for event in endpoints.EVENTS[:-1]:
        tell(db, event, spec=spec)
    assert events(db) == ["job.running", "job.succeeded", "job.failed", "job.cancelled"]
    assert {(d.url, d.endpoint_id, d.style) for d in listed(db)} == {(URL, None, "standard")}


def test_luma_jobs_get_lumas_body_at_their_own_url_only(db: Database, settings: Settings) -> None:
    create(db, settings)
    tell(db, "job.succeeded", dialect="luma", spec={"prompt": "a ball", "webhook_url": URL + "/luma"})
    assert {(d.url, d.style) for d in listed(db)} == {(URL, "standard"), (URL + "/luma", "luma")}


def test_rolled_back_change_is_not_told(db: Database, settings: Settings) -> None:
    create(db, settings)

    def fails() -> None:
        with db.write() as tx:
            outbox.enqueue(tx, make_job(), "job.running")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert listed(db) == []


def test_progress_is_throttled_by_job(db: Database, settings: Settings, clock: Clock) -> None:
    create(db, settings, events=("job.progress",))
    for _ in range(40):
        tell(db, "job.progress")
        tell(db, "job.progress", id="another")
        clock.now += 0.5
    assert len(listed(db)) == 4
    assert len(listed(db, job_id="another")) == 2


def test_body(db: Database, settings: Settings) -> None:
    create(db, settings)
    tell(db, "job.created", state=State.QUEUED)
    tell(db, "job.running")
    created, running = (json.loads(d.body) for d in listed(db)[::-1])
    assert created["type"] == "job.created"
    assert created["timestamp"] == "2027-01-15T08:00:00.000Z"
    assert created["data"]["id"] == make_job().id
    assert (created["data"]["state"], running["data"]["state"]) == ("queued", "running"), "as it was then"
    assert [created["data"]["sequence"], running["data"]["sequence"]] == [1, 2]


def test_sequence_counts_by_job_and_is_the_same_for_all_receivers(db: Database, settings: Settings) -> None:
    create(db, settings)
    create(db, settings, URL + "/2")
    for event in ("job.created", "job.running", "job.succeeded"):
        tell(db, event)
        tell(db, event, id="another")
    for job_id in (make_job().id, "another"):
        assert [d.sequence for d in listed(db, job_id=job_id)[::-1]] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "large",
    [
        {"metadata": {"note": "x" * 16_000}, "spec": {"prompt": "p" * 20_000}},
        {"metadata": {"note": "ä" * 16_000}},
        {"result": {"note": "x" * 30_000}},
        {"message": "m" * 3000, "metadata": {"k": "x" * 16_000}, "spec": {"prompt": "ü" * 5000}},
    ],
)
def test_body_stays_below_20_kb(db: Database, settings: Settings, large: dict[str, Any]) -> None:
    create(db, settings)
    tell(db, "job.succeeded", **large)
    (delivery,) = listed(db)
    assert len(delivery.body.encode()) < outbox.MAX_BODY_BYTES
    data = json.loads(delivery.body)["data"]
    assert data["omitted"]
    assert data["id"] == make_job().id
    assert data["state"] == "running"
    for key in data["omitted"]:
        assert key not in data


def test_batch_finished(db: Database, settings: Settings) -> None:
    create(db, settings)
    create(db, settings, URL + "/jobs-only", ("job.succeeded",))
    with db.write() as tx:
        outbox.enqueue_batch(tx, "acct", {"id": "b1", "total": 3}, webhook_url=URL + "/own")
    assert {d.url for d in listed(db)} == {URL, URL + "/own"}
    assert json.loads(listed(db)[0].body)["data"] == {"id": "b1", "total": 3}


def test_ping(db: Database, settings: Settings) -> None:
    made = create(db, settings, events=("job.failed",))
    with db.write() as tx:
        delivery = outbox.ping(tx, "acct", made.id)
        with pytest.raises(NotFound):
            outbox.ping(tx, "other", made.id)
    assert (delivery.event, delivery.url) == ("ping", URL)
    sends = Sends()
    assert deliver_due(db, settings, sends) == 1
    assert json.loads(sends.sent[0].body)["type"] == "ping"


# -- replay --------------------------------------------------------------------------------------------------


def fail_all(db: Database, settings: Settings, clock: Clock) -> None:
    """Until the schedule is at its end."""
    refuses = Sends(Answer(status=500))
    while any(d.state == "pending" for d in listed(db)):
        deliver_due(db, settings, refuses)
        clock.now += 30 * 3600


def test_replay_of_one_and_of_all_that_failed(db: Database, settings: Settings, clock: Clock) -> None:
    made = create(db, settings)
    tell(db, "job.created")
    deliver_due(db, settings, Sends())
    delivered = listed(db)[0]
    tell(db, "job.running")
    with db.write() as tx:  # or it would be disabled after five days
        tx.run(schema.webhook_endpoints.update().values(failing_since=clock.now + 1e6))
    fail_all(db, settings, clock)
    middle = clock.now
    tell(db, "job.failed")
    with db.write() as tx:
        tx.run(
            schema.deliveries.update().where(schema.deliveries.c.state == "pending").values(state="failed")
        )
    first = {d.id for d in listed(db, states=("failed",))}
    assert len(first) == 2

    with db.write() as tx:
        assert outbox.replay(tx, "acct", since=middle) == 1
        assert outbox.replay(tx, "acct", since=0.0) == 1, "what is pending already is left alone"
        assert outbox.replay(tx, "acct") == 0
        assert outbox.replay(tx, "other", since=0.0) == 0
    sends = Sends()
    assert deliver_due(db, settings, sends) == 2
    assert {m.headers["webhook-id"] for m in sends.sent} == first, "the same ids"

    with db.write() as tx:
        assert outbox.replay(tx, "acct", delivery_id=delivered.id) == 1, "also one that was delivered"
        assert outbox.replay(tx, "acct", endpoint_id=made.id) == 0
        with pytest.raises(NotFound):
            outbox.replay(tx, "other", delivery_id=delivered.id)
        with pytest.raises(NotFound):
            outbox.replay(tx, "acct", endpoint_id="no-such")
    assert deliver_due(db, settings, sends) == 1


def test_replay_goes_to_the_url_that_the_endpoint_has_now(
    db: Database, settings: Settings, clock: Clock
) -> None:
    made = create(db, settings)
    tell(db, "job.running")
    with db.write() as tx:
        tx.run(schema.deliveries.update().values(state="failed"))
        endpoints.update(tx, settings, "acct", made.id, url=URL + "/new")
        outbox.replay(tx, "acct")
    sends = Sends()
    deliver_due(db, settings, sends)
    assert sends.sent[0].url == URL + "/new"


def test_pending_deliveries_follow_a_changed_url(db: Database, settings: Settings) -> None:
    made = create(db, settings)
    tell(db, "job.running")
    with db.write() as tx:
        endpoints.update(tx, settings, "acct", made.id, url=URL + "/new")
    assert [d.url for d in listed(db)] == [URL + "/new"]


def test_backlog_is_what_waits_for_no_reason(db: Database, settings: Settings, clock: Clock) -> None:
    create(db, settings)

    def backlog() -> tuple[int, float]:
        with db.read() as tx:
            return outbox.backlog(tx)

    assert backlog() == (0, 0.0)
    tell(db, "job.created")
    tell(db, "job.running")
    clock.now += 7
    assert backlog() == (2, 7.0)
    deliver_due(db, settings, Sends(Answer(status=200), Answer(status=500)))
    assert backlog() == (0, 0.0), "one delivered, one waits for its time"
    clock.now += 60
    assert backlog()[0] == 1


def test_prune_keeps_what_is_pending(db: Database, settings: Settings, clock: Clock) -> None:
    create(db, settings)
    tell(db, "job.created")
    deliver_due(db, settings, Sends())
    tell(db, "job.running")
    with db.write() as tx:
        assert outbox.prune(tx, before=START) == 0
        assert outbox.prune(tx, before=START + 1) == 1
    assert events(db) == ["job.running"]


def test_listing_pages(db: Database, settings: Settings) -> None:
    made = create(db, settings)
    for i in range(5):
        tell(db, "job.running", id=f"job-{i}")
    first = listed(db, limit=2)
    rest = listed(db, before=first[-1].seq, endpoint_id=made.id)
    assert [d.job_id for d in first + rest] == [f"job-{i}" for i in (4, 3, 2, 1, 0)]
    assert listed(db, states=("failed",)) == []


# -- endpoints -----------------------------------------------------------------------------------------------


def test_crud(db: Database, settings: Settings) -> None:
    made = create(db, settings, events=("job.failed", "job.failed"))
    assert made.events == ("job.failed",)
    assert len(made.secrets) == 1
    assert made.secrets[0].startswith("whsec_")
    with db.write() as tx:
        assert endpoints.listing(tx, "acct") == [made]
        changed = endpoints.update(tx, settings, "acct", made.id, events=(), enabled=False)
        assert changed.disabled_why == "disabled by its owner"
        assert changed.wants("job.created")
        assert not changed.wants("job.progress")
        assert endpoints.update(tx, settings, "acct", made.id, enabled=True).disabled_at is None
        endpoints.delete(tx, "acct", made.id)
        assert endpoints.listing(tx, "acct") == []


def test_endpoints_of_others(db: Database, settings: Settings) -> None:
    made = create(db, settings)
    with db.write() as tx:
        assert endpoints.listing(tx, "other") == []
        for act in (
            lambda: endpoints.get(tx, "other", made.id),
            lambda: endpoints.delete(tx, "other", made.id),
            lambda: endpoints.rotate(tx, "other", made.id),
            lambda: endpoints.update(tx, settings, "other", made.id, enabled=False),
        ):
            with pytest.raises(NotFound):
                act()


@pytest.mark.parametrize(
    "url", ["http://example.com/", "https://10.0.0.1/", "ftp://x.example/", "https://a:b@x.example/"]
)
def test_urls_are_checked(db: Database, settings: Settings, url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        create(db, settings, url)
    assert caught.value.field == "url"
    made = create(db, settings)
    with db.write() as tx, pytest.raises(InvalidRequest):
        endpoints.update(tx, settings, "acct", made.id, url=url)
    assert endpoints.check_url("http://127.0.0.1:3000/hook", settings)
    with pytest.raises(InvalidRequest, match=r"webhook_url.*allow_private_hosts"):
        endpoints.check_url("http://localhost:3000/hook", settings, field="webhook_url")


def test_events_are_checked(db: Database, settings: Settings) -> None:
    with pytest.raises(InvalidRequest, match=r"job\.finished"):
        create(db, settings, events=("job.finished",))


def test_number_of_endpoints_is_limited(
    db: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "MAX_ENDPOINTS", 2)
    create(db, settings)
    create(db, settings)
    with pytest.raises(InvalidRequest, match="at most 2"):
        create(db, settings)


def test_secret_of_the_account_is_made_once(db: Database, clock: Clock) -> None:
    with db.write() as tx:
        first = endpoints.account_secrets(tx, "acct")
        assert endpoints.account_secrets(tx, "acct") == first
        assert endpoints.account_secrets(tx, "other") != first
        new = endpoints.rotate_account(tx, "acct")
        assert endpoints.account_secrets(tx, "acct") == (new, *first)
        after = dataclasses.replace(tx, now=tx.now + endpoints.ROTATION_S)
        assert endpoints.account_secrets(after, "acct") == (new,)


def test_rotating_twice_does_not_keep_a_secret_longer(db: Database, settings: Settings, clock: Clock) -> None:
    made = create(db, settings)
    with db.write() as tx:
        second = endpoints.rotate(tx, "acct", made.id)
        later = dataclasses.replace(tx, now=tx.now + endpoints.ROTATION_S / 2)
        third = endpoints.rotate(later, "acct", made.id)
        assert endpoints.get(later, "acct", made.id).secrets == (third, second, *made.secrets)
        after = dataclasses.replace(tx, now=tx.now + endpoints.ROTATION_S)
        assert endpoints.get(after, "acct", made.id).secrets == (third, second)
    with db.read() as tx:
        kept = tx.scalar(sa.select(schema.webhook_endpoints.c.secrets))
    assert len(kept) == 3
