"""How long others wait while a large batch is made or cancelled: in one write, and in pieces, in turns in one run.

    python -m benchmarks.batches [--items 10000] [--rounds 2] [--database-url postgresql+psycopg://...]

Jobs are submitted by the clock, one every EVERY_S, from a thread beside the batch; a latency counts from when the job
should have been submitted to its commit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mutoscope.jobs import accounts, batches, batching, ledger, migrations
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Caller, Priority, State
from mutoscope.jobs.service import Service
from mutoscope.jobs.spec import JobSpec
from mutoscope.settings import Settings

EVERY_S = 0.1
ALONE_S = 3.0


def caller_of(db: Database, name: str) -> Caller:
    with db.write() as tx:
        accounts.create(tx, name, account_id=name)
        key, _ = accounts.create_key(tx, name, "bench")
        return Caller(account=accounts.get(tx, name), key_id=key.id, scopes=("jobs",))


def beside(db: Database, service: Service, caller: Caller, until: threading.Event) -> list[float]:
    """Latencies of single jobs, seconds."""
    found, due = [], time.monotonic()
    while not until.is_set():
        with db.write() as tx:
            service.submit(tx, caller, JobSpec(prompt="a red ball", quality="draft"), dialect="api")
        found.append(time.monotonic() - due)
        due += EVERY_S
        time.sleep(max(0.0, due - time.monotonic()))
    return found


def during(db: Database, service: Service, caller: Caller, work: Callable[[], None]) -> dict[str, float]:
    """Do something with others beside it."""
    over = threading.Event()
    latencies: list[float] = []
    other = threading.Thread(target=lambda: latencies.extend(beside(db, service, caller, over)))
    other.start()
    time.sleep(0.3)
    began = time.monotonic()
    work()
    took = time.monotonic() - began
    over.set()
    other.join()
    ordered = sorted(latencies)
    return {"took_s": took, "p50_ms": 1e3 * statistics.median(ordered), "most_ms": 1e3 * ordered[-1],
            "p90_ms": 1e3 * ordered[int(0.9 * (len(ordered) - 1))]}  # fmt: skip


def make(db: Database, service: Service, caller: Caller, n: int) -> None:
    specs = [JobSpec(prompt=f"a red ball number {i}", quality="draft") for i in range(n)]
    in_pieces = n > batching.PIECE
    with db.read() as tx:
        prepared = batching.prepare(tx, service, caller, specs, Priority.NORMAL) if in_pieces else ()
    with db.write() as tx:
        batch = batching.create(tx, service, caller, specs, prepared=prepared)
    batching.go_on(db, service, batch.id)


def cancel(db: Database, caller: Caller, n: int) -> None:
    """The last one."""
    with db.write() as tx:
        batch = batches.listing(tx, caller.account.id, limit=1)[0]
        batching.cancel(tx, caller, batch.id)
    batching.stop_rest(db, batch.id)
    with db.read() as tx:
        assert ledger.check(tx) == []
        ended = batches.get(tx, caller.account.id, batch.id)
    assert (ended.counts[State.CANCELLED], ended.finished_at is not None) == (n, True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--database-url", default="")
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    piece = batching.PIECE
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), database_url=asked.database_url)
        db = Database(settings.database)
        migrations.upgrade(db)
        service = Service.make(settings)
        big, small = caller_of(db, "big"), caller_of(db, "small")
        works: dict[str, Callable[[], None]] = {
            "make": lambda: make(db, service, big, asked.items),
            "cancel": lambda: cancel(db, big, asked.items),
        }
        for _ in range(asked.rounds):
            found.setdefault("alone", []).append(during(db, service, small, lambda: time.sleep(ALONE_S)))
            print("alone", found["alone"][-1], flush=True)
            for way, size in (("in one write", asked.items), (f"in pieces of {piece}", piece)):
                batching.PIECE = size
                for name, work in works.items():
                    found.setdefault(f"{name} {way}", []).append(during(db, service, small, work))
                    print(f"{name} {way}", found[f"{name} {way}"][-1], flush=True)
        db.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
