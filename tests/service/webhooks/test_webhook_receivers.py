"""Receivers that misbehave, over real connections."""

from __future__ import annotations

import threading
import time

import pytest

from mutoscope.jobs import endpoints, webhooks
from mutoscope.jobs.database import Database
from mutoscope.settings import Settings
from tests.service.databases import START
from tests.service.webhooks.conftest import Receiver, Sends
from tests.service.webhooks.telling import deliver, endpoint, only, tell


@pytest.fixture
def db(sqlite_db: Database) -> Database:
    """The network does not care about the database."""
    return sqlite_db


@pytest.mark.parametrize(
    ("path", "state", "status", "error"),
    [
        ("/200", "delivered", 200, ""),
        ("/204", "delivered", 204, ""),
        ("/slow", "delivered", 200, ""),
        ("/301", "pending", 301, "answered 301"),
        ("/307", "pending", 307, "answered 307"),
        ("/404", "pending", 404, "answered 404"),
        ("/410", "failed", 410, "answered 410"),
        ("/429", "pending", 429, "answered 429"),
        ("/500", "pending", 500, "answered 500"),
        ("/reset", "pending", None, "the receiver"),
        ("/garbage", "pending", None, "does not speak HTTP"),
    ],
)
def test_receivers(
    db: Database, settings: Settings, account: str, receiver: Receiver, path: str, state: str, status: int | None,
    error: str,
) -> None:  # fmt: skip
    made = endpoint(db, settings, receiver.url(path))
    tell(db)
    assert deliver(db, settings) == 1
    row = only(db)
    assert (row.state, row.last_status) == (state, status)
    assert error in row.last_error
    assert (row.last_error == "") == (state == "delivered")
    assert [got[0] for got in receiver.got] == [path], "one request, and no redirect followed"
    assert receiver.got[0][1]["content-type"] == "application/json"
    with db.read() as tx:
        assert (endpoints.get(tx, "acct", made.id).disabled_at is not None) == (status == 410)
    if status == 429:
        assert row.next_at == START + 1234


def test_receiver_that_never_answers(
    db: Database, settings: Settings, account: str, receiver: Receiver
) -> None:
    endpoint(db, settings, receiver.url("/hang"))
    tell(db)
    short = settings.model_copy(update={"webhook_timeout_s": 0.2})
    assert deliver(db, short) == 1
    assert only(db).last_error == "the receiver did not answer within 0.2 s"
    assert only(db).next_at == START + 5


def test_receiver_that_is_not_there(
    db: Database, settings: Settings, account: str, receiver: Receiver
) -> None:
    url = receiver.url("/200")
    receiver.close()
    endpoint(db, settings, url)
    tell(db)
    deliver(db, settings)
    assert "cannot be connected to" in only(db).last_error


def test_private_receiver_is_not_contacted_unless_allowed(
    db: Database, settings: Settings, account: str, receiver: Receiver
) -> None:
    endpoint(db, settings, receiver.url("/200"))
    tell(db)
    strict = settings.model_copy(update={"allow_private_hosts": ()})
    deliver(db, strict)
    assert "allow_private_hosts" in only(db).last_error
    assert only(db).state == "pending"
    assert receiver.got == []


def test_name_that_moves_to_a_private_address_is_not_contacted(
    db: Database, settings: Settings, account: str, receiver: Receiver
) -> None:
    endpoint(db, settings, f"https://rebind.example:{receiver.port}/200")
    tell(db)
    strict = settings.model_copy(update={"allow_private_hosts": ()})
    deliver(db, strict, webhooks.sender(strict, resolver=lambda host, port: ["127.0.0.1"]))
    assert "private" in only(db).last_error
    assert receiver.got == []


def test_one_hung_receiver_delays_nobody(db: Database, settings: Settings, account: str) -> None:
    """100 endpoints, one hangs and has the most to be sent: p99 of the others under 2 s, on wall time."""
    hung, well = Receiver(), Receiver()
    paths = [f"/200/{i}" for i in range(99)]
    for i in range(300):
        tell(db, "job.succeeded", id=f"hung-{i}", spec={"prompt": "a ball", "webhook_url": hung.url("/hang")})
    done = threading.Event()
    told: dict[str, float] = {}

    def run() -> None:
        deliver(db, settings.model_copy(update={"webhook_timeout_s": 30.0}), should_stop=done.is_set)

    sending = threading.Thread(target=run)
    try:
        sending.start()
        assert hung.arrived.acquire(timeout=10)
        for path in paths:  # they come while the hung ones are already in the air
            tell(db, "job.succeeded", id=path, spec={"prompt": "a ball", "webhook_url": well.url(path)})
            told[path] = time.monotonic()
        for _ in paths:
            assert well.arrived.acquire(timeout=10)
    finally:
        done.set()
        hung.close()
        sending.join()
        well.close()
    assert set(well.times) == set(paths)
    assert sorted(well.times[path] - told[path] for path in paths)[97] < 2.0
    assert len(hung.got) <= webhooks.PER_ORIGIN


def test_server_that_stops_leaves_hung_receivers_to_the_next(
    db: Database, settings: Settings, account: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its grace, and without counting the attempt; the next one sends the same again."""
    monkeypatch.setattr(webhooks, "STOP_GRACE_S", 0.1)
    made = endpoint(db, settings, receiver.url("/hang"))
    tell(db)
    stop = threading.Event()
    patient = settings.model_copy(update={"webhook_timeout_s": 60.0})
    sending = threading.Thread(target=deliver, args=(db, patient), kwargs={"should_stop": stop.is_set})
    sending.start()
    assert receiver.arrived.acquire(timeout=10)
    stop.set()
    sending.join(timeout=20)
    assert not sending.is_alive()
    row = only(db)
    assert (row.state, row.attempts, row.lease_until, row.next_at) == ("pending", 0, None, START)
    with db.read() as tx:
        assert endpoints.get(tx, "acct", made.id).failing_since is None
    sends = Sends()
    deliver(db, settings, sends)
    assert sends.sent[0].headers["webhook-id"] == receiver.got[0][1]["webhook-id"]
