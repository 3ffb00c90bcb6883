"""Event streams: everything comes, in order and once, however often a listener comes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from api_house import DRAFT, House, events

from mutoscope.jobs import feed, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.feed import FeedEvent
from mutoscope.jobs.model import Failure, Job
from mutoscope.server import events as module
from mutoscope.server.events import Tail
from tests.service.making import add_job, make_account


def test_a_finished_job_is_told_from_its_beginning(house: House) -> None:
    job_id = house.post("/jobs", DRAFT)["id"]
    job = house.claim()
    house.step(job, 0.25, "data:image/jpeg;base64,AA==")
    house.step(job, 0.5, "data:image/jpeg;base64,BB==")
    house.succeed(job)
    got = house.call("GET", f"/jobs/{job_id}/events")
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["cache-control"] == "no-store"
    told = events(got.text)
    assert [(e["event"], e["data"].get("state")) for e in told] == [
        ("state", "queued"), ("state", "running"), ("progress", None), ("progress", None), ("preview", None),
        ("state", "succeeded"),
    ]  # fmt: skip
    step = told[3]["data"]
    assert (step["stage"], step["step"], step["steps"], step["progress"]) == ("denoise", 10, 20, 0.5)
    assert step["eta_at"] > 0
    assert told[4]["data"]["image"] == "data:image/jpeg;base64,BB=="  # of earlier ones only the last is kept
    assert all(e["data"]["job_id"] == job_id for e in told)
    ids = [e["id"] for e in told]
    assert ids == sorted(ids)


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_listener_goes_on_where_it_was(house: House, how: str) -> None:
    job_id = house.post("/jobs", DRAFT)["id"]
    house.succeed(house.claim())
    whole = events(house.call("GET", f"/jobs/{job_id}/events").text)
    for i, event in enumerate(whole[:-1]):
        at = str(event["id"])
        given: dict[str, Any] = (
            {"headers": {"last-event-id": at}} if how == "header" else {"params": {"after": at}}
        )
        assert events(house.call("GET", f"/jobs/{job_id}/events", **given).text) == whole[i + 1 :]


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 19, "²"])
def test_a_number_that_is_none(house: House, given: str) -> None:
    error = house.refused("GET", "/events", params={"after": given}, status=400)
    assert error["field"] == "Last-Event-ID"


def test_streams_belong_to_accounts(house: House) -> None:
    job_id = house.post("/jobs", DRAFT)["id"]
    house.refused("GET", f"/jobs/{job_id}/events", status=404, key="other")
    house.refused("GET", f"/jobs/{job_id}/events", status=401, key="wrong")


# -- the tail ------------------------------------------------------------------------------------------------


class Stand:
    """A tail on a database, and what a worker writes."""

    def __init__(self, db: Database) -> None:
        self.db, self.tail = db, Tail(db)

    def job(self, account: str = "acct") -> Job:
        with self.db.write() as tx:
            return add_job(tx, account)

    def write(self, job: Job, n: int) -> None:
        with self.db.write() as tx:
            feed.write(tx, job, "progress", {"n": n})

    def end(self, job: Job) -> None:
        with self.db.write() as tx:
            queue.fail(tx, job.id, None, Failure.INTERNAL, "no")


def with_tail(db: Database, act: Callable[[Stand], Coroutine[Any, Any, None]]) -> None:
    """Run `act` while a tail reads the feed."""

    async def run() -> None:
        stand = Stand(db)
        stand.tail.start()
        try:
            async with asyncio.timeout(60):
                await act(stand)
        finally:
            await stand.tail.close()

    asyncio.run(run())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)


async def next_of(stream: AsyncIterator[bytes]) -> list[dict[str, Any]]:
    """The events of the next piece; what is no event is passed over."""
    while True:
        found = events((await anext(stream)).decode())
        if found:
            return found


async def several(stream: AsyncIterator[bytes], n: int) -> list[int]:
    """`n` in the data of the next events."""
    found: list[int] = []
    while len(found) < n:
        found += [e["data"]["n"] for e in await next_of(stream)]
    return found


def test_what_was_comes_first_and_then_what_happens(db: Database, account: str) -> None:
    async def act(stand: Stand) -> None:
        job = stand.job()
        stand.write(job, 1)
        stream = stand.tail.listen("acct", job_id=job.id)
        assert (await next_of(stream))[0]["data"]["state"] == "queued"
        assert await several(stream, 1) == [1]
        for n in (2, 3):
            stand.write(job, n)
        assert await several(stream, 2) == [2, 3]
        stand.end(job)
        assert (await next_of(stream))[-1]["data"]["state"] == "failed"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stand.tail.listeners == set()

    with_tail(db, act)


def test_the_first_event_of_all(db: Database, account: str) -> None:
    """A feed that is empty when somebody begins to listen."""

    async def act(stand: Stand) -> None:
        stream = stand.tail.listen("acct")
        first = asyncio.ensure_future(next_of(stream))
        await stand.tail._begun.wait()
        job = stand.job()
        assert (await first)[0]["data"]["job_id"] == job.id
        await stream.aclose()  # type: ignore[attr-defined]

    with_tail(db, act)


def test_what_happens_between_the_replay_and_the_first_look(
    db: Database, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something is committed when the replay has read to the end, and before the tail settles where it begins."""
    replayed = threading.Event()
    job = Stand(db).job()

    class Slow(Tail):
        def _replay(self, listener: module.Listener, since: int) -> list[FeedEvent]:
            rows = super()._replay(listener, since)
            if not rows and not replayed.is_set():
                Stand(db).write(job, 7)
                replayed.set()
            return rows

        def _look(self) -> list[FeedEvent]:
            replayed.wait(0.5)  # if the replay does not wait for this look, the look waits for the replay
            return super()._look()

    monkeypatch.setattr(__import__(__name__), "Tail", Slow)

    async def act(stand: Stand) -> None:
        stream = stand.tail.listen("acct", job_id=job.id)
        assert (await next_of(stream))[0]["data"]["state"] == "queued"
        assert await several(stream, 1) == [7]
        await stream.aclose()  # type: ignore[attr-defined]

    with_tail(db, act)


def test_an_account_hears_of_all_its_jobs_and_of_no_others(db: Database, account: str) -> None:
    async def act(stand: Stand) -> None:
        with stand.db.write() as tx:
            make_account(tx, "else")
        stream = stand.tail.listen("acct", after=0)
        foreign, one, two = stand.job("else"), stand.job(), stand.job()
        told: list[str] = []
        while len(told) < 2:
            told += [e["data"]["job_id"] for e in await next_of(stream)]
        assert told == [one.id, two.id]
        assert foreign.id not in told
        await stream.aclose()  # type: ignore[attr-defined]

    with_tail(db, act)


def test_many_come_and_go_and_miss_nothing(db: Database, account: str) -> None:
    """Listeners that break off after every few events and come back, while a thread writes."""

    async def act(stand: Stand) -> None:
        job = stand.job()
        writer = threading.Thread(target=lambda: [stand.write(job, n) for n in range(60)])

        async def follow(every: int) -> list[int]:
            seen: list[int] = []
            last: int | None = None
            while len(seen) < 60:
                stream = stand.tail.listen("acct", job_id=job.id, after=last)
                taken = 0
                while taken < every and len(seen) < 60:
                    for event in await next_of(stream):
                        last = event["id"]
                        taken += 1
                        seen += [event["data"]["n"]] if event["event"] == "progress" else []
                await stream.aclose()  # type: ignore[attr-defined]
            return seen

        followers = [asyncio.ensure_future(follow(every)) for every in (1, 3, 7, 100)]
        writer.start()
        for found in await asyncio.gather(*followers):
            assert found == list(range(60))
        writer.join()

    with_tail(db, act)


def test_a_slow_listener_is_let_go_and_comes_back(
    db: Database, account: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(stand: Stand) -> None:
        job = stand.job()
        stream = stand.tail.listen("acct", job_id=job.id)
        await next_of(stream)
        (listener,) = stand.tail.listeners
        listener.queue = asyncio.Queue(1)
        reads = asyncio.ensure_future(anext(stream))
        stand.write(job, 0)
        first = await reads
        for n in range(1, 5):  # each in a look of its own
            stand.write(job, n)
            before = stand.tail._last
            while stand.tail._last == before:
                await asyncio.sleep(0)
        rest = [piece async for piece in stream]
        assert b"come back with Last-Event-ID" in rest[-1]
        last = events(first.decode())[-1]["id"]
        again = stand.tail.listen("acct", job_id=job.id, after=last)
        assert await several(again, 4) == [1, 2, 3, 4]
        await again.aclose()  # type: ignore[attr-defined]

    with_tail(db, act)


def test_the_end_of_the_server_ends_the_streams(db: Database, account: str) -> None:
    async def act(stand: Stand) -> None:
        job = stand.job()
        stream = stand.tail.listen("acct", job_id=job.id)
        await next_of(stream)
        waits = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stand.tail.closing()
        assert b"the server stops" in await waits
        late = stand.tail.listen("acct", job_id=job.id)
        assert b"retry" in await anext(late)
        assert [piece async for piece in late]

    with_tail(db, act)
