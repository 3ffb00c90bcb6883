"""Webhooks: signatures, the schedule to the second, receivers that misbehave, and processes that die."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from standardwebhooks import Webhook

from mutoscope.jobs import endpoints, outbox, webhooks
from mutoscope.jobs.database import Database
from mutoscope.jobs.webhooks import Answer
from mutoscope.settings import Settings
from tests.service.databases import START, Clock
from tests.service.webhooks.conftest import Receiver, Sends, make_job
from tests.service.webhooks.telling import URL, deliver, endpoint, only, rows, tell

# -- signatures ----------------------------------------------------------------------------------------------


def test_signature_of_the_specification() -> None:
    """The vector that Standard Webhooks' own libraries are tested with."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = webhooks.sign([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, '{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-timestamp"] == "1614265330"


def test_receiver_verifies_with_the_library(
    db: Database, settings: Settings, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = endpoint(db, settings)
    tell(db)
    sends = Sends()
    assert deliver(db, settings, sends) == 1
    (message,) = sends.sent
    now = datetime.fromtimestamp(START, UTC)

    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return now

    monkeypatch.setattr("standardwebhooks.webhooks.datetime", Now)
    event = Webhook(made.secrets[0]).verify(message.body, dict(message.headers))
    assert event["type"] == "job.running"
    assert event["data"]["id"] == make_job().id
    assert event["data"]["sequence"] == 1
    with pytest.raises(Exception, match="No matching signature"):
        Webhook("whsec_" + base64.b64encode(b"x" * 32).decode()).verify(message.body, dict(message.headers))


def test_both_secrets_sign_for_a_day_after_a_rotation(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    made = endpoint(db, settings)
    with db.write() as tx:
        new = endpoints.rotate(tx, "acct", made.id)
    sends = Sends()

    def signatures() -> list[str]:
        tell(db)
        deliver(db, settings, sends)
        return sends.sent[-1].headers["webhook-signature"].split(" ")

    def by(secret: str) -> str:
        sent = sends.sent[-1]
        at = datetime.fromtimestamp(int(sent.headers["webhook-timestamp"]), UTC)
        return Webhook(secret).sign(sent.headers["webhook-id"], at, sent.body.decode())

    assert signatures() == [by(new), by(made.secrets[0])]
    clock.now += endpoints.ROTATION_S - 1
    assert len(signatures()) == 2
    clock.now += 2
    assert signatures() == [by(new)]


def test_a_job_url_is_signed_with_the_secret_of_the_account(
    db: Database, settings: Settings, account: str
) -> None:
    tell(db, "job.succeeded", spec={"prompt": "a ball", "webhook_url": URL})
    sends = Sends()
    deliver(db, settings, sends)
    with db.write() as tx:
        (secret,) = endpoints.account_secrets(tx, "acct")
    (sent,) = sends.sent
    at = datetime.fromtimestamp(START, UTC)
    assert sent.headers["webhook-signature"] == Webhook(secret).sign(
        sent.headers["webhook-id"], at, sent.body.decode()
    )


# -- the schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("jitter", "stretch"), [(0.0, 1.0), (1.0, 1.1)])
def test_schedule_to_the_second(
    db: Database, settings: Settings, account: str, clock: Clock, jitter: float, stretch: float
) -> None:
    endpoint(db, settings)
    tell(db)
    sends = Sends(Answer(status=500))
    expected = [0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    for i, delay in enumerate(expected):
        if i:
            clock.now += delay * stretch - 0.5
            assert deliver(db, settings, sends, jitter=lambda: jitter) == 0, f"attempt {i + 1} came early"
            clock.now += 0.6
        assert deliver(db, settings, sends, jitter=lambda: jitter) == 1
        assert only(db).attempts == i + 1
        clock.now -= 0.1 if i else 0
    assert only(db).state == "failed"
    assert len({m.headers["webhook-id"] for m in sends.sent}) == 1
    clock.now += 10 * 86400
    assert deliver(db, settings, sends) == 0


def test_each_attempt_is_signed_anew(db: Database, settings: Settings, account: str, clock: Clock) -> None:
    endpoint(db, settings)
    tell(db)
    sends = Sends(Answer(error="no connection"), Answer(status=204))
    deliver(db, settings, sends)
    clock.now += 5
    deliver(db, settings, sends)
    first, second = sends.sent
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) == 5
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]
    assert only(db).state == "delivered"
    assert only(db).last_error == ""


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [("90", 90.0), (" 90 ", 90.0), ("99999999999999999999", 86400.0), ("soon", 0.0), ("-3", 0.0), ("", 0.0), ("²", 0.0),
     ("1e3", 0.0), (datetime.fromtimestamp(START + 120, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), 120.0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2099 07:28:00 -0000", 86400.0)],
)  # fmt: skip
def test_retry_after_is_read(value: str, wait_s: float) -> None:
    assert webhooks.retry_after_s(value, START) == pytest.approx(wait_s)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_retry_after_is_heeded(
    db: Database, settings: Settings, account: str, clock: Clock, status: int
) -> None:
    """If it is later than the schedule."""
    endpoint(db, settings)
    tell(db)
    for value, wait_s in (("90", 90.0), ("1", 300.0)):
        deliver(db, settings, Sends(Answer(status=status, retry_after=value)))
        assert only(db).next_at == pytest.approx(clock.now + wait_s)
        clock.now += wait_s


def test_retry_after_of_other_answers_is_not_heeded(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    endpoint(db, settings)
    tell(db)
    deliver(db, settings, Sends(Answer(status=500, retry_after="9000")))
    assert only(db).next_at == clock.now + 5


def test_endpoint_that_fails_for_five_days_is_disabled_with_a_reason(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    made = endpoint(db, settings)
    sends = Sends(Answer(status=500))
    for day in range(6):
        tell(db, id=f"job-{day}")
        deliver(db, settings, sends)
        with db.read() as tx:
            now = endpoints.get(tx, "acct", made.id)
        assert (now.disabled_at is not None) == (day == 5)
        clock.now += 86400
    assert now.failing_since == START
    assert "5 days" in now.disabled_why
    assert "500" in now.disabled_why
    assert {row.state for row in rows(db)} == {"failed"}
    tell(db, id="later")
    assert len(rows(db)) == 6, "nothing is written for a disabled endpoint"


def test_one_success_starts_the_five_days_again(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    made = endpoint(db, settings)
    for status in (500, 500, 500, 500, 200, 500, 500, 500, 500):
        tell(db, id=f"job-{clock.now}")
        deliver(db, settings, Sends(Answer(status=status)))
        clock.now += 86400
    with db.read() as tx:
        assert endpoints.get(tx, "acct", made.id).disabled_at is None


def test_luma_retries_three_times_at_once(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    spec = {"prompt": "a ball", "webhook_url": URL}
    tell(db, "job.succeeded", dialect="luma", spec=spec)
    sends = Sends(Answer(status=500))
    render = {"luma": lambda tx, delivery: json.dumps({"id": delivery.job_id, "state": "completed"})}
    for wait_s in (0.0, 0.1, 0.1, 0.1, 5.0, 300.0):
        clock.now += wait_s
        assert deliver(db, settings, sends, render=render) == 1
    assert json.loads(sends.sent[-1].body) == {"id": make_job().id, "state": "completed"}
    assert sends.sent[-1].timeout_s == 5.0
    assert "webhook-signature" in sends.sent[-1].headers


def test_progress_is_not_retried_for_days(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    endpoint(db, settings, events=("job.progress",))
    tell(db, "job.progress")
    for _ in range(2):
        assert deliver(db, settings, Sends(Answer(status=500))) == 1
        clock.now += 5
    assert only(db).state == "failed"


# -- processes that die, and one another's way ---------------------------------------------------------------


def test_account_with_many_hung_receivers_delays_no_other(
    db: Database, settings: Settings, account: str
) -> None:
    """200 receivers that hang, each at a host of its own: more than fit into the air."""
    with db.write() as tx:
        for i in range(200):
            spec = {"prompt": "a ball", "webhook_url": f"https://hung-{i}.example/"}
            outbox.enqueue(tx, make_job(id=f"hung-{i}", spec=spec), "job.succeeded")
    release, others = threading.Event(), threading.Semaphore(0)
    most, lock = [0, 0], threading.Lock()

    def send(message: webhooks.Message) -> Answer:
        if "hung" in message.url:
            with lock:
                most[0] += 1
                most[1] = max(most)
            release.wait()
            with lock:
                most[0] -= 1
        else:
            others.release()
        return Answer(status=200)

    sending = threading.Thread(target=deliver, args=(db, settings, send))
    sending.start()
    try:
        with db.write() as tx:
            for i in range(20):
                spec = {"prompt": "a ball", "webhook_url": f"https://well-{i}.example/"}
                outbox.enqueue(tx, make_job(id=f"well-{i}", spec=spec, account_id="other"), "job.succeeded")
        for _ in range(20):
            assert others.acquire(timeout=10)
    finally:
        release.set()
        sending.join()
    assert 0 < most[1] <= webhooks.PER_ACCOUNT
    assert {row.state for row in rows(db)} == {"delivered"}


def test_delivery_of_a_dead_process_is_sent_again_with_the_same_id(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    endpoint(db, settings)
    tell(db)

    class Killed(BaseException):
        pass

    first = Sends()

    def dies(message: webhooks.Message) -> Answer:
        first(message)
        raise Killed  # after the receiver got it, before it was noted

    with pytest.raises(Killed):
        deliver(db, settings, dies)
    second = Sends()
    assert deliver(db, settings, second) == 0, "still leased"
    clock.now += settings.webhook_timeout_s + 60
    assert deliver(db, settings, second) == 1
    assert first.sent[0].headers["webhook-id"] == second.sent[0].headers["webhook-id"]
    assert only(db).state == "delivered"
    assert only(db).attempts == 2


_SENDER = """
import sys
from mutoscope.jobs.database import Database
from mutoscope.jobs.webhooks import deliver_due
from mutoscope.settings import Settings
deliver_due(Database(sys.argv[1], clock=lambda: float(sys.argv[2])), Settings(allow_private_hosts=("127.0.0.1",)))
"""


def test_kill_9_of_the_sender(
    db: Database, settings: Settings, account: str, clock: Clock, receiver: Receiver
) -> None:
    """The receiver has it, and the process that sent it is killed before it hears the answer."""
    endpoint(db, settings, receiver.url("/hang"))
    tell(db)
    sender = subprocess.Popen([sys.executable, "-c", _SENDER, db.url, str(clock.now)])
    try:
        assert receiver.arrived.acquire(timeout=60)
    finally:
        sender.kill()
        sender.wait()
    sends = Sends()
    clock.now += 3600
    assert deliver(db, settings, sends) == 1
    assert sends.sent[0].headers["webhook-id"] == receiver.got[0][1]["webhook-id"]
    assert sends.sent[0].body == receiver.got[0][2]
    assert (only(db).state, only(db).attempts) == ("delivered", 2)


def test_late_answer_of_a_slow_process_changes_nothing(
    db: Database, settings: Settings, account: str, clock: Clock
) -> None:
    """Its lease ran out and another process took over: only a success counts."""
    endpoint(db, settings)
    tell(db)

    def slow(message: webhooks.Message) -> Answer:
        clock.now += 1000
        assert deliver(db, settings, Sends(Answer(status=500))) == 1
        return Answer(status=404)

    deliver(db, settings, slow)
    assert only(db).last_status == 500
    assert only(db).attempts == 2


def test_two_processes_send_nothing_twice(db: Database, settings: Settings, account: str) -> None:
    endpoint(db, settings)
    for i in range(40):
        tell(db, id=f"job-{i}")
    sends = Sends()
    start = threading.Barrier(3)

    def run() -> None:
        start.wait()
        deliver(db, settings, sends)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [m.headers["webhook-id"] for m in sends.sent]
    assert len(ids) == len(set(ids)) == 40


def test_bug_in_one_attempt_does_not_stop_the_others(db: Database, settings: Settings, account: str) -> None:
    spec = {"prompt": "a ball"}
    tell(db, "job.failed", id="bad", spec={**spec, "webhook_url": URL + "/bad"})
    tell(db, "job.failed", id="good", spec={**spec, "webhook_url": URL + "/good"})

    def send(message: webhooks.Message) -> Answer:
        if message.url.endswith("bad"):
            raise ZeroDivisionError("oh")
        return Answer(status=200)

    assert deliver(db, settings, send) == 2
    assert [row.state for row in rows(db)] == ["pending", "delivered"]
    assert "ZeroDivisionError" in rows(db)[0].last_error
