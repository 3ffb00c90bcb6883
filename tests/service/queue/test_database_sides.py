"""What rests on the database: migrations, claims from several processes, the feed's numbers, idempotency keys."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from mutoscope.errors import FileError
from mutoscope.jobs import feed, idempotency, migrations, queue
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import IdempotencyMismatch, InvalidRequest
from mutoscope.jobs.schema import jobs, metadata
from tests.service.databases import Postgres
from tests.service.making import make_account, new_job


@pytest.fixture
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without tables."""
    if request.param == "sqlite":
        db = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    else:
        server = request.getfixturevalue("postgres")
        assert isinstance(server, Postgres)
        db = Database(server.another(f"{server.name}_empty"))
    yield db
    db.close()


@pytest.mark.parametrize("empty", ["sqlite", "postgresql"], indirect=True)
def test_migrations_build_the_schema(empty: Database) -> None:
    assert migrations.current(empty) is None
    with ThreadPoolExecutor(2) as both:  # two processes that start at once
        list(both.map(lambda _: migrations.upgrade(empty), range(2)))
    assert migrations.current(empty) == migrations.newest()
    with empty.engine.connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []
        for (
            table
        ) in metadata.tables.values():  # which autogenerate does not compare on SQLite: partial indexes
            found = {i["name"]: i for i in sa.inspect(conn).get_indexes(table.name)}
            for index in table.indexes:
                assert index.name in found
                where = index.dialect_options[conn.dialect.name].get("where")
                got = found[index.name].get("dialect_options", {}).get(f"{conn.dialect.name}_where")
                assert (got is None) == (where is None)
    migrations.upgrade(empty)
    with empty.write() as tx:
        tx.conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(FileError, match="9999"):
        migrations.upgrade(empty)


def _take_all(url: str, name: str, found: multiprocessing.Queue[list[str]]) -> None:
    db, mine = Database(url), []
    while True:
        with db.write() as tx:
            job = queue.claim(tx, name, ("pocket",), "cpu")
        if job is None:
            break
        mine.append(job.id)
    db.close()
    found.put(mine)


def test_processes_never_claim_the_same_job(db: Database, account: str) -> None:
    """Four processes, 200 jobs (and once by hand 2,000)."""
    with db.write() as tx:
        ids = [job.id for job in queue.insert_many(tx, [new_job() for _ in range(200)])]
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[list[str]] = context.Queue()
    url = str(db.engine.url.render_as_string(hide_password=False))
    workers = [context.Process(target=_take_all, args=(url, f"w{i}", found)) for i in range(4)]
    for worker in workers:
        worker.start()
    taken = [job_id for _ in workers for job_id in found.get(timeout=60)]
    for worker in workers:
        worker.join()
    found.close()
    assert len(taken) == 200
    assert set(taken) == set(ids)


def test_changes_of_one_account_side_by_side(db: Database, account: str) -> None:
    """Ends, cancels and new jobs from four threads: nobody waits in a circle, and no credit or tag is lost."""
    with db.write() as tx:
        queue.insert_many(tx, [new_job() for _ in range(40)])

    def act(n: int) -> None:
        for i in range(8):
            with db.write() as tx:
                if i % 4 == 3:
                    queue.insert(tx, new_job())
                    continue
                job = queue.claim(tx, f"w{n}", ("pocket",), "cpu")
            if i % 4 != 3 and job is not None:
                with db.write() as tx:
                    queue.succeed(tx, job.id, job.fence, [], {})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(act, range(4)))
    with db.read() as tx:
        tags = [row.vtime for row in tx.all(sa.select(jobs.c.vtime))]
        assert len(tags) == 48
        assert len(set(tags)) == 48  # an update that was lost would give one tag twice


def test_the_feed_never_shows_a_smaller_number_later(db: Database, account: str) -> None:
    """A slow writer holds number n while a fast one commits n + 1: the reader waits for both."""
    with db.write() as tx:
        job = queue.insert(tx, new_job())
        start = feed.last_id(tx)
    seen: list[int] = []
    began = threading.Event()

    def read() -> None:
        with db.read() as tx:
            began.set()
            seen.extend(event.id for event in feed.after(tx, start))

    if db.is_sqlite:  # one writer at a time: nothing to wait for
        with db.write() as tx:
            feed.write(tx, job, "progress", {"n": 1})
        read()
        assert seen == [start + 1]
        return
    slow = db.engine.connect()
    feed.write(Tx(slow, 0.0), job, "progress", {"n": 1})
    with db.write() as tx:
        feed.write(tx, job, "progress", {"n": 2})
    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(10)
    slow.commit()
    slow.close()
    reader.join(30)
    assert seen == [start + 1, start + 2]


def test_the_feed_filters_and_forgets(db: Database, account: str) -> None:
    with db.write() as tx:
        make_account(tx, "else")
        mine, other = queue.insert(tx, new_job()), queue.insert(tx, new_job("else"))
        assert [e.job_id for e in feed.after(tx, 0, account_id="else")] == [other.id]
        assert [e.job_id for e in feed.after(tx, 0, job_id=mine.id)] == [mine.id]
        assert [e.job_id for e in feed.after(tx, 0, limit=1)] == [mine.id]
        assert feed.prune(tx, before=tx.now) == 0
        assert feed.prune(tx, before=tx.now + 1, limit=1) == 1
        assert feed.prune(tx, before=tx.now + 1) == 1
        queue.cancel(tx, mine.id)
        assert feed.last_id(tx) == 3  # a number is never used twice


# -- idempotency ---------------------------------------------------------------------------------------------


def test_one_answer_for_one_key(db: Database, account: str) -> None:
    with db.write() as tx:
        assert idempotency.begin(tx, "acct", "k", "POST /jobs", "h1") is None
        idempotency.keep(tx, "acct", "k", 201, {"x-a": "b"}, "body")
    with db.write() as tx:
        stored = idempotency.begin(tx, "acct", "k", "POST /jobs", "h1")
        assert stored == idempotency.Stored(status=201, headers={"x-a": "b"}, body="body")
        assert idempotency.begin(tx, "else", "k", "POST /jobs", "h1") is None
        for route, body_hash in (("POST /jobs", "h2"), ("POST /else", "h1")):
            with pytest.raises(IdempotencyMismatch, match="used before"):
                idempotency.begin(tx, "acct", "k", route, body_hash)
        for key in ("", "k" * 256):
            with pytest.raises(InvalidRequest, match="expected 1 to 255"):
                idempotency.begin(tx, "acct", key, "POST /jobs", "h1")
        assert idempotency.prune(tx, tx.now) == 0
        assert idempotency.prune(tx, tx.now + 1) == 2


def test_a_refused_request_leaves_its_key_free(db: Database, account: str) -> None:
    def refused() -> None:
        with db.write() as tx:
            idempotency.begin(tx, "acct", "k", "POST /jobs", "h1")
            raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        refused()
    with db.write() as tx:
        assert idempotency.begin(tx, "acct", "k", "POST /jobs", "h2") is None


@pytest.mark.parametrize("first_commits", [True, False])
def test_a_duplicate_in_flight_waits_for_the_first(db: Database, account: str, first_commits: bool) -> None:
    inside, asked = threading.Event(), threading.Event()
    made: list[str] = []

    def request(name: str) -> idempotency.Stored | None:
        if name == "second":
            assert inside.wait(10)
            asked.set()
        with db.write() as tx:
            stored = idempotency.begin(tx, "acct", "k", "POST /jobs", "h")
            if stored is not None:
                return stored
            if name == "first":
                inside.set()
                assert asked.wait(10)
            queue.insert(tx, new_job())
            idempotency.keep(tx, "acct", "k", 201, {}, name)
            if name == "first" and not first_commits:
                raise InvalidRequest("refused after all")
            made.append(name)
        return None

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(request, "first"), threads.submit(request, "second")
        if first_commits:
            answer = second.result(30)
            assert answer is not None
            assert answer.body == "first"
        else:
            assert isinstance(first.exception(30), InvalidRequest)
            assert second.result(30) is None
    assert made == ["first" if first_commits else "second"]
    with db.read() as tx:
        assert queue.listing(tx, "acct").total == 1
