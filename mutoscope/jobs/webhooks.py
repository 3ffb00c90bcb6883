"""Sends what the outbox holds: Standard Webhooks 1.0.0, at least once, in as many web processes as there are.

A due row is leased by the process that sends it; if that dies, the lease runs out and another one sends it again
under the same id. Receivers tell repeats by `webhook-id` and order by `data.sequence`.

Receivers that hang hold up nobody else: attempts run side by side, at most `PER_ORIGIN` of them go to the same scheme,
host and port, and at most `PER_ACCOUNT` are those of one account.

    attempt   1    2     3     4      5     6     7      8      9      10
    after     0   5 s   5 m   30 m   2 h   5 h   10 h   14 h   20 h   24 h     each, and up to a tenth more
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import sqlalchemy as sa
from standardwebhooks import Webhook

from mutoscope import __version__
from mutoscope.errors import MutoscopeError
from mutoscope.jobs import addresses, endpoints, outbox, pinned, queue, view
from mutoscope.jobs.addresses import Resolver
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.outbox import Delivery
from mutoscope.jobs.schema import deliveries
from mutoscope.jobs.view import Link
from mutoscope.settings import Settings

SCHEDULE_S = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""Wait before each attempt, from the one before; Standard Webhooks' example."""
SCHEDULES_S: Mapping[str, Sequence[float]] = {
    "standard": SCHEDULE_S,
    "luma": (0.0, 0.1, 0.1, 0.1, *SCHEDULE_S[1:]),  # Luma retries three times at once
}
PROGRESS_SCHEDULE_S = SCHEDULE_S[:2]
"""Progress that is minutes old is worth nothing."""
JITTER = 0.1
GIVE_UP_S = 5 * 24 * 3600.0
"""An endpoint that failed for so long without a success is disabled."""
MAX_RETRY_AFTER_S = 24 * 3600.0
HEEDS_RETRY_AFTER = (429, 502, 503, 504)
TIMEOUTS_S = {"luma": 5.0}
"""Shorter limits of some styles."""
LEASE_MARGIN_S = 15.0
AT_ONCE = 64
PER_ORIGIN = 4
PER_ACCOUNT = 32
LOOK_AGAIN_S = 0.25
STOP_GRACE_S = 2.0
"""How long a process that is to stop waits for receivers; what they did not answer by then is sent by the next one."""
USER_AGENT = f"Mutoscope-Webhooks/{__version__}"

Render = Mapping[str, Callable[[Tx, Delivery], str]]
"""Bodies by style, made when they are sent; a style that is not here gets the body of the event."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One attempt, ready to be sent."""

    url: str
    headers: Mapping[str, str]
    body: bytes
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of it: a status, or why there is none. `stopped`: broken off by us, not held against the receiver."""

    status: int | None = None
    retry_after: str = ""
    error: str = ""
    stopped: bool = False

    @property
    def ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


Send = Callable[[Message], Answer]
Jitter = Callable[[], float]
"""A number from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    delivery: Delivery
    message: Message


def sender(
    settings: Settings, *, resolver: Resolver | None = None, should_stop: Callable[[], bool] = lambda: False
) -> Send:
    """Sends over the network, to addresses that were checked. Redirects are answers like others."""
    policy = addresses.webhook_policy(settings)

    def send(message: Message) -> Answer:
        try:
            with pinned.request(
                "POST", message.url, policy=policy, timeout_s=message.timeout_s, headers=message.headers,
                content=message.body, resolver=resolver, should_stop=should_stop,
            ) as response:  # fmt: skip
                return Answer(status=response.status, retry_after=response.headers.get("retry-after", ""))
        except addresses.Refused as e:
            return Answer(error=f"not sent: the URL {e.reason}")
        except pinned.Unreachable as e:
            return Answer(error=f"the receiver {e.reason}")
        except pinned.Stopped:
            return Answer(error="not sent: the server was stopping", stopped=True)

    return send


def deliver_due(
    db: Database,
    settings: Settings,
    send: Send | None = None,
    render: Render | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    jitter: Jitter = random.random,
) -> int:
    """Send all that is due, side by side; how many attempts were made.

    As long as an attempt is under way, what becomes due meanwhile is sent too: a slow receiver delays nobody. Call it
    again and again, in any number of processes.
    """
    send = send or sender(settings, should_stop=_some_time_after(should_stop, STOP_GRACE_S))
    made = 0
    flying: dict[Future[Answer], _Attempt] = {}
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhook") as pool:
        while True:
            if not should_stop():
                in_air = [attempt.delivery for attempt in flying.values()]
                for attempt in _claim(db, settings, render or {}, in_air, jitter):
                    flying[pool.submit(_safely, send, attempt.message)] = attempt
                    made += 1
            if not flying:
                return made
            done, _ = wait(flying, timeout=LOOK_AGAIN_S, return_when=FIRST_COMPLETED)
            if done:
                with db.write() as tx:
                    for future in done:
                        _record(tx, flying.pop(future).delivery, future.result(), jitter)


def linked(link: Link) -> Callable[[Tx, Delivery], str]:
    """For `render["standard"]`: the body of the event, with fresh URLs in the outputs of a job that succeeded."""

    def render(tx: Tx, delivery: Delivery) -> str:
        if delivery.event != "job.succeeded" or delivery.job_id is None:
            return delivery.body
        try:
            job = queue.get(tx, delivery.job_id, account_id=delivery.account_id)
        except NotFound:  # deleted meanwhile: what happened is still true
            return delivery.body
        event = json.loads(delivery.body)
        event["data"]["outputs"] = view.public(tx, job, link, live=False)["outputs"]
        return json.dumps(event, separators=(",", ":"))

    return render


def sign(secrets: Sequence[str], delivery_id: str, at: float, body: str) -> dict[str, str]:
    """The three headers of Standard Webhooks; every secret signs, newest first."""
    moment = datetime.fromtimestamp(int(at), UTC)
    signatures = [Webhook(secret).sign(delivery_id, moment, body) for secret in secrets]
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": " ".join(signatures),
    }


def retry_after_s(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks to wait, as a number or a date; 0 if it says nothing usable."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:10]), MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, moment.timestamp() - now), MAX_RETRY_AFTER_S)


def origin(url: str) -> str:
    """Scheme, host and port, as they begin the URL, in lower case."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _some_time_after(happened: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """True so long after another condition was first seen to be true."""
    seen: list[float] = []

    def over() -> bool:
        if happened():
            if not seen:
                seen.append(time.monotonic())
            return time.monotonic() - seen[0] >= seconds
        return False

    return over


def _safely(send: Send, message: Message) -> Answer:
    try:
        return send(message)
    except Exception as e:  # a bug in one attempt must not stop all the others
        return Answer(error=f"not sent: {type(e).__name__}: {e}"[:300])


def _claim(
    db: Database, settings: Settings, render: Render, flying: Sequence[Delivery], jitter: Jitter
) -> list[_Attempt]:
    """Lease what is due and may be sent now."""
    free = AT_ONCE - len(flying)
    if free <= 0:
        return []
    busy = _Busy(flying)
    with db.read() as tx:  # no write lock to find out that there is nothing
        if not _due(tx, busy, 1):
            return []
    attempts: list[_Attempt] = []
    with db.write() as tx:
        while len(attempts) < free:
            chosen = []
            for delivery in _due(tx, busy, free - len(attempts)):
                if busy.takes(delivery):
                    chosen.append(delivery)
            if not chosen:
                break
            started = (_start(tx, delivery, settings, render, jitter) for delivery in chosen)
            attempts += [attempt for attempt in started if attempt is not None]
    return attempts


class _Busy:
    """What is in the air, by receiver and by account."""

    def __init__(self, flying: Sequence[Delivery]) -> None:
        self.origins = Counter(origin(d.url) for d in flying)
        self.accounts = Counter(d.account_id for d in flying)

    def takes(self, delivery: Delivery) -> bool:
        """Whether one more may fly; then it counts."""
        name = origin(delivery.url)
        if self.origins[name] >= PER_ORIGIN or self.accounts[delivery.account_id] >= PER_ACCOUNT:
            return False
        self.origins[name] += 1
        self.accounts[delivery.account_id] += 1
        return True

    def room(self) -> list[sa.ColumnElement[bool]]:
        """The same as conditions on deliveries: without them, rows that have to wait would hide the others."""
        url = sa.func.lower(deliveries.c.url)
        full = [name for name, count in self.origins.items() if count >= PER_ORIGIN]
        there = [
            sa.or_(url == name, *(url.startswith(name + c, autoescape=True) for c in "/?")) for name in full
        ]
        spent = [name for name, count in self.accounts.items() if count >= PER_ACCOUNT]
        return [*(sa.not_(at) for at in there), deliveries.c.account_id.not_in(spent)]


def _due(tx: Tx, busy: _Busy, limit: int) -> list[Delivery]:
    """Deliveries that wait for their time, oldest first, but those that have to wait for others to land."""
    d = deliveries.c
    query = (
        sa.select(deliveries)
        .where(
            d.state == "pending",
            d.next_at <= tx.now,
            sa.or_(d.lease_until.is_(None), d.lease_until <= tx.now),
        )
        .where(*busy.room())
        .order_by(d.next_at, d.seq)
        .limit(limit)
    )
    return [outbox.from_row(row) for row in tx.all(query.with_for_update(skip_locked=True))]


def _start(tx: Tx, due: Delivery, settings: Settings, render: Render, jitter: Jitter) -> _Attempt | None:
    """Lease a delivery and make its message; None if there is nothing to send."""
    lease_s = settings.webhook_timeout_s + addresses.RESOLVE_TIMEOUT_S + LEASE_MARGIN_S
    delivery = replace(due, attempts=due.attempts + 1, lease_until=tx.now + lease_s)
    tx.run(
        deliveries.update()
        .where(deliveries.c.seq == delivery.seq)
        .values(attempts=delivery.attempts, lease_until=delivery.lease_until)
    )
    if delivery.endpoint_id is None:
        secrets = endpoints.account_secrets(tx, delivery.account_id)
    else:
        try:
            endpoint = endpoints.get(tx, delivery.account_id, delivery.endpoint_id)
        except NotFound:
            _end(tx, delivery, error="not sent: the endpoint was deleted")
            return None
        if endpoint.disabled_at is not None:
            _end(tx, delivery, error=f"not sent: the endpoint is disabled ({endpoint.disabled_why})")
            return None
        secrets = endpoint.secrets
    try:
        body = render[delivery.style](tx, delivery) if delivery.style in render else delivery.body
    except MutoscopeError as e:
        _record(tx, delivery, Answer(error=f"not sent: no body could be made ({e})"[:300]), jitter)
        return None
    headers = {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        **sign(secrets, delivery.id, tx.now, body),
    }
    timeout_s = min(settings.webhook_timeout_s, TIMEOUTS_S.get(delivery.style, settings.webhook_timeout_s))
    message = Message(url=delivery.url, headers=headers, body=body.encode(), timeout_s=timeout_s)
    return _Attempt(delivery=delivery, message=message)


def _record(tx: Tx, delivery: Delivery, answer: Answer, jitter: Jitter) -> None:
    """Note what came of an attempt and decide about the next one."""
    d = deliveries.c
    if answer.ok:
        tx.run(
            deliveries.update()
            .where(d.seq == delivery.seq, d.state == "pending")
            .values(
                state="delivered",
                delivered_at=tx.now,
                lease_until=None,
                last_status=answer.status,
                last_error="",
            )
        )
        if delivery.endpoint_id is not None:
            endpoints.worked(tx, delivery.endpoint_id)
        return
    if answer.stopped:
        tx.run(
            deliveries.update()
            .where(d.seq == delivery.seq, d.state == "pending", d.attempts == delivery.attempts)
            .values(attempts=delivery.attempts - 1, lease_until=None, last_error=answer.error)
        )
        return
    error = answer.error or f"the receiver answered {answer.status}, 200 to 299 expected"
    if answer.status == 410:
        _end(tx, delivery, status=410, error=error)
        _disable(tx, delivery, "the receiver answered 410 Gone")
        return
    schedule = PROGRESS_SCHEDULE_S if delivery.event == "job.progress" else SCHEDULES_S[delivery.style]
    if delivery.attempts >= len(schedule):
        _end(tx, delivery, status=answer.status, error=error)
    else:
        delay_s = schedule[delivery.attempts] * (1 + JITTER * jitter())
        if answer.status in HEEDS_RETRY_AFTER:
            delay_s = max(delay_s, retry_after_s(answer.retry_after, tx.now))
        tx.run(
            deliveries.update()
            .where(d.seq == delivery.seq, d.state == "pending", d.attempts == delivery.attempts)
            .values(next_at=tx.now + delay_s, lease_until=None, last_status=answer.status, last_error=error)
        )
    if delivery.endpoint_id is not None:
        since = endpoints.failed(tx, delivery.endpoint_id)
        if tx.now - since >= GIVE_UP_S:
            _disable(tx, delivery, f"nothing was delivered for 5 days; last: {error}")


def _end(tx: Tx, delivery: Delivery, *, error: str, status: int | None = None) -> None:
    tx.run(
        deliveries.update()
        .where(
            deliveries.c.seq == delivery.seq,
            deliveries.c.state == "pending",
            deliveries.c.attempts == delivery.attempts,
        )
        .values(state="failed", lease_until=None, last_status=status, last_error=error)
    )


def _disable(tx: Tx, delivery: Delivery, why: str) -> None:
    """No more to this endpoint; what waits for it has failed, and can be replayed."""
    if delivery.endpoint_id is None:
        return
    endpoints.disable(tx, delivery.endpoint_id, why)
    tx.run(
        deliveries.update()
        .where(
            deliveries.c.endpoint_id == delivery.endpoint_id,
            deliveries.c.state == "pending",
            deliveries.c.seq != delivery.seq,
        )
        .values(
            state="failed", lease_until=None, last_error=f"not sent: the endpoint is disabled ({why})"[:500]
        )
    )
