"""Batches over HTTP: arrays and JSON Lines, prices, progress, cancel, results, on both databases."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from api_house import DRAFT, House

from mutoscope.jobs import accounts, batching, ledger, queue
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.model import Caller, State
from mutoscope.jobs.spec import JobSpec

LINES = '{"prompt": "one", "quality": "draft"}\n\n{"prompt": "two", "quality": "draft", "seed": 7}\n'


def items(n: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**DRAFT, "prompt": f"ball {i}", **changes} for i in range(n)]


def test_a_batch_from_its_price_to_its_results(either_house: House) -> None:
    house = either_house
    batch = house.post(
        "/batches", {"items": items(3), "confirm": False, "name": "night", "metadata": {"a": 1}}
    )
    assert (batch["state"], batch["total"], batch["progress"]) == ("priced", 3, 0.0)
    assert batch["estimate"] == {
        "credits": 12, "usd": 0.12, "device_seconds": batch["estimate"]["device_seconds"], "models": {"pocket": 3},
    }  # fmt: skip
    assert house.get("/jobs")["total"] == 0
    assert house.get("/credits")["reserved"] == 0
    path = f"/batches/{batch['id']}"
    started = house.post(f"{path}/confirm", expect=200)
    assert (started["state"], started["counts"]["queued"]) == ("running", 3)
    assert house.get("/credits")["reserved"] == 12
    assert house.refused("POST", f"{path}/confirm", status=409)["code"] == "conflict"
    house.succeed(house.claim())
    running = house.claim()
    house.step(running, 0.5)
    half = house.get(path)
    assert (half["progress"], half["credits"]) == (0.5, 4)
    house.succeed(running)
    house.succeed(house.claim())
    done = house.get(path)
    assert (done["state"], done["progress"], done["credits"]) == ("finished", 1.0, 12)
    got = house.call("GET", f"{path}/results")
    assert got.headers["content-type"].startswith("application/jsonl")
    rows = [json.loads(line) for line in got.text.splitlines()]
    assert [row["spec"]["prompt"] for row in rows] == ["ball 0", "ball 1", "ball 2"]
    assert {row["state"] for row in rows} == {"succeeded"}
    assert house.http.get(rows[0]["outputs"][0]["url"]).content == b"not really a video"
    assert [b["id"] for b in house.get("/batches")["data"]] == [batch["id"]]
    assert house.get("/jobs", params={"batch_id": batch["id"]})["total"] == 3
    house.refused("GET", path, status=404, key="other")


def test_cancel_ends_what_waits_and_asks_what_runs(either_house: House) -> None:
    house = either_house
    batch = house.post("/batches", {"items": items(4)})
    house.succeed(house.claim())
    running = house.claim()
    cancelled = house.post(f"/batches/{batch['id']}/cancel", expect=200)
    assert cancelled["state"] == "cancelled"
    assert {k: n for k, n in cancelled["counts"].items() if n} == {
        "succeeded": 1,
        "running": 1,
        "cancelled": 2,
    }
    assert cancelled["finished_at"] is None
    assert house.get(f"/jobs/{running.id}")["cancel_asked"]
    again = house.post(f"/batches/{batch['id']}/cancel", expect=200)
    assert again["counts"] == cancelled["counts"]
    with house.db.write() as tx:
        from mutoscope.jobs import queue

        assert queue.cancelled(tx, running.id, running.fence)
    ended = house.get(f"/batches/{batch['id']}")
    assert ended["finished_at"] is not None
    assert (ended["state"], ended["credits"]) == ("cancelled", 4)
    with house.db.read() as tx:
        assert ledger.check(tx) == []


def test_a_large_batch_is_cancelled_at_once(either_house: House) -> None:
    """Everybody else waits for this transaction: its statements are as many for 40 jobs as for 4."""
    house, needed = either_house, []
    for n in (4, 40):
        batch = house.post("/batches", {"items": items(n)})
        statements: list[str] = []

        def count(_conn: Any, _cursor: Any, statement: str, *_rest: Any, to: list[str] = statements) -> None:
            to.append(statement)

        sa.event.listen(house.db.engine, "before_cursor_execute", count)
        ended = house.post(f"/batches/{batch['id']}/cancel", expect=200)
        sa.event.remove(house.db.engine, "before_cursor_execute", count)
        assert (ended["counts"]["cancelled"], ended["finished_at"] is None) == (n, False)
        needed.append(
            [s for s in statements if "api_keys" not in s]
        )  # whether the key's last use is written depends
    assert len(needed[0]) == len(needed[1]) < 40
    with house.db.read() as tx:
        assert ledger.check(tx) == []


@pytest.mark.parametrize("how", ["body", "form"])
def test_json_lines(house: House, how: str) -> None:
    if how == "body":
        given: dict[str, Any] = {"content": LINES, "headers": {"content-type": "application/jsonl; charset=utf-8"},
                                 "params": {"confirm": "false", "name": "n", "priority": "high"}}  # fmt: skip
    else:
        given = {"files": {"file": ("jobs.jsonl", LINES)},
                 "data": {"confirm": "false", "name": "n", "priority": "high", "metadata": '{"a": 1}'}}  # fmt: skip
    got = house.call("POST", "/batches", **given)
    assert got.status_code == 201, got.text
    batch = got.json()
    assert (batch["state"], batch["total"], batch["name"], batch["priority"]) == ("priced", 2, "n", "high")
    house.post(f"/batches/{batch['id']}/confirm", expect=200)
    jobs = house.get("/jobs", params={"order": "asc"})["data"]
    assert [(j["spec"]["prompt"], j["priority"]) for j in jobs] == [("one", "high"), ("two", "high")]
    assert jobs[1]["seed"] == 7


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("", "items", "0 items"),
        ("{", "items[0]", "Line 1 is not JSON"),
        ('{"prompt": "x"}\n[1]', "items[1]", "Line 2: a JSON object expected"),
        (
            '{"prompt": "x"}\n{"prompt": "x", "colour": 1}',
            "items[1].colour",
            "Line 2, colour: is not a field here",
        ),
        ('{"prompt": "x", "seconds": "long"}', "items[0].seconds", "Line 1, seconds"),
        ('{"prompt": "x", "metadata": {"a": NaN}}', "items[0]", "NaN is not a number"),
        ('{"prompt": "x", "metadata": {"a": 1e999}}', "items[0]", "too large a number"),
        ('{"prompt": "\\u0000"}', "items[0]", "u0000"),
        ('{"prompt": "\\ud800"}', "items[0]", "half of a character"),
        ('{"prompt": "x"}\n{"prompt": "x", "model": "nobody"}', "items[1].model", "Item 2: No model"),
    ],
)
def test_a_line_that_is_wrong_is_named(house: House, text: str, field: str, said: str) -> None:
    error = house.refused(
        "POST", "/batches", content=text or "\n", headers={"content-type": "application/x-ndjson"}, status=400
    )
    assert error["field"] == field
    assert said in error["message"]
    assert house.get("/jobs")["total"] == 0


@pytest.mark.parametrize(
    ("data", "field"),
    [({"confirm": "yes"}, "confirm"), ({"metadata": "{"}, "metadata"), ({"colour": "red"}, "colour"),
     ({"priority": "urgent"}, "priority"), ({"items": "[]"}, "items")],
)  # fmt: skip
def test_options_of_a_form_that_are_wrong(house: House, data: dict[str, str], field: str) -> None:
    error = house.refused("POST", "/batches", files={"file": ("a", LINES)}, data=data, status=400)
    assert error["field"] == field


def test_forms_that_are_wrong(house: House) -> None:
    assert house.refused("POST", "/batches", files={"f": ("a", LINES)}, status=400)["field"] == "file"
    error = house.refused("POST", "/batches", files={"file": ("a", b"\xff\xfe")}, status=400)
    assert "UTF-8" in error["message"]
    error = house.refused("POST", "/batches", {"items": [*items(1), "x"]}, status=400)
    assert error["field"] == "items[1]"


def test_an_item_may_have_a_priority_of_its_own(house: House) -> None:
    several = [*items(1), *items(1, priority="low"), *items(1, priority="normal")]
    batch = house.post("/batches", {"items": several, "priority": "high", "confirm": False})
    house.post(f"/batches/{batch['id']}/confirm", expect=200)
    jobs = house.get(f"/jobs?batch_id={batch['id']}&order=asc")["data"]
    assert [j["priority"] for j in jobs] == ["high", "low", "normal"]


def test_a_batch_is_all_or_nothing(either_house: House) -> None:
    """The credits do not cover the whole: no job of it is made."""
    house = either_house
    with house.db.write() as tx:
        accounts.change(tx, "default", plan="pro")
        accounts.change(tx, "default", limits={"daily_jobs": 5, "overdraft": False})
    error = house.refused("POST", "/batches", {"items": items(6)}, status=400)
    assert "5 in 24 hours" in error["message"]
    dear = items(5, quality="standard", resolution="4k", seconds=8)
    house.post("/batches", {"items": dear, "confirm": False})  # its price can be asked
    with house.db.write() as tx:
        ledger.renew(tx, "default", 100, "less")
    house.refused("POST", "/batches", {"items": dear}, status=402)
    assert house.get("/jobs")["total"] == 0
    with house.db.read() as tx:
        assert ledger.check(tx) == []


def test_what_a_batch_has_above_its_slots_waits(either_house: House) -> None:
    house = either_house
    with house.db.write() as tx:
        accounts.change(tx, "default", limits={"concurrency": 2})
    batch = house.post("/batches", {"items": items(5)})
    assert {k: n for k, n in batch["counts"].items() if n} == {"queued": 2, "throttled": 3}
    for _ in range(5):
        house.succeed(house.claim())
    assert house.get(f"/batches/{batch['id']}")["state"] == "finished"


def test_a_repeated_batch_is_made_once(either_house: House) -> None:
    house = either_house
    given = {"items": items(2)}
    first = house.call("POST", "/batches", given, headers={"idempotency-key": "b1"})
    again = house.call("POST", "/batches", given, headers={"idempotency-key": "b1"})
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = house.refused(
        "POST", "/batches", {"items": items(3)}, headers={"idempotency-key": "b1"}, status=422
    )
    assert other["code"] == "idempotency_mismatch"
    assert house.get("/jobs")["total"] == 2


def test_the_query_is_part_of_the_request(house: House) -> None:
    given = {"content": LINES, "headers": {"content-type": "application/jsonl", "idempotency-key": "k"}}
    first = house.call("POST", "/batches", params={"confirm": "false"}, **given)
    assert first.json()["state"] == "priced"
    assert house.call("POST", "/batches", params={"confirm": "false"}, **given).json() == first.json()
    assert house.call("POST", "/batches", params={"confirm": "true"}, **given).status_code == 422


# -- many jobs are made in pieces ------------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PIECE", 2)


def _accepted(house: House, n: int) -> str:
    """A batch as it is when the process dies behind the answer's transaction."""
    with house.db.write() as tx:
        account = accounts.get(tx, "default")
        caller = Caller(account=account, key_id="key", scopes=("jobs",))
        specs = [JobSpec.model_validate(item) for item in items(n)]
        return batching.create(tx, house.app.state.ctx.service, caller, specs).id


def _is_sound(house: House, reserved: int) -> None:
    with house.db.read() as tx:
        assert ledger.check(tx) == []
        assert ledger.unsettled(tx) == []
    assert house.get("/credits")["reserved"] == reserved


def test_the_answer_comes_when_all_pieces_are_made(either_house: House, pieces: None) -> None:
    house = either_house
    made = house.post("/batches", {"items": items(5)})
    assert (made["state"], made["counts"]["queued"], made["progress"]) == ("running", 5, 0.0)
    jobs = house.get("/jobs", params={"batch_id": made["id"], "order": "asc"})["data"]
    assert [job["batch_index"] for job in jobs] == [0, 1, 2, 3, 4]
    assert [job["spec"]["prompt"] for job in jobs] == [f"ball {i}" for i in range(5)]
    _is_sound(house, 20)
    for _ in range(5):
        house.succeed(house.claim())
    done = house.get(f"/batches/{made['id']}")
    assert (done["state"], done["credits"], done["counts"]["succeeded"]) == ("finished", 20, 5)
    _is_sound(house, 0)


def test_what_a_dead_process_left_is_made_by_housekeeping(
    either_house: House, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, service = either_house, either_house.app.state.ctx.service
    batch_id = _accepted(house, 5)
    _is_sound(house, 20)
    for _ in range(2):
        house.succeed(house.claim())
    half = house.get(f"/batches/{batch_id}")
    assert (half["state"], half["progress"]) == ("running", 0.4)
    assert (half["counts"]["succeeded"], half["counts"]["queued"]) == (2, 3)
    assert batching.go_on_with_left(house.db, service) == 0  # somebody may be at it
    monkeypatch.setattr(batching, "LEFT_S", -1.0)
    assert batching.go_on_with_left(house.db, service) == 1
    _is_sound(house, 12)
    assert house.get("/jobs", params={"batch_id": batch_id})["total"] == 5
    for _ in range(3):
        house.succeed(house.claim())
    assert house.get(f"/batches/{batch_id}")["state"] == "finished"
    assert batching.go_on_with_left(house.db, service) == 0
    _is_sound(house, 0)


def test_jobs_to_come_count_for_the_day(either_house: House, pieces: None) -> None:
    house = either_house
    with house.db.write() as tx:
        accounts.change(tx, "default", limits={"daily_jobs": 6})
    batch_id = _accepted(house, 5)  # 2 of them are made
    assert house.get("/credits")["jobs_today"] == 5
    house.post("/jobs", *items(1))
    error = house.refused("POST", "/jobs", *items(1), status=429)
    assert "6 jobs in the last 24 hours and 1 asked" in error["message"]
    error = house.refused("POST", "/batches", {"items": items(5)}, status=429)
    assert "in 1440 minutes" in error["hint"], "the fifth oldest is still to be made"
    house.post(f"/batches/{batch_id}/cancel", expect=200)
    assert house.get("/credits")["jobs_today"] == 3


def test_a_cancel_between_two_pieces(either_house: House, pieces: None) -> None:
    house = either_house
    batch_id = _accepted(house, 5)
    house.succeed(house.claim())
    house.succeed(house.claim())
    stopped = house.post(f"/batches/{batch_id}/cancel", expect=200)
    assert (stopped["state"], stopped["progress"]) == ("cancelled", 1.0)
    assert (stopped["counts"]["succeeded"], stopped["counts"]["cancelled"]) == (2, 3)
    assert stopped["finished_at"] is not None
    batching.go_on(house.db, house.app.state.ctx.service, batch_id)
    assert house.get("/jobs", params={"batch_id": batch_id})["total"] == 2
    _is_sound(house, 0)


def test_what_cannot_be_made_any_more_is_cancelled(
    either_house: House, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, service = either_house, either_house.app.state.ctx.service
    batch_id = _accepted(house, 5)

    def gone(*_: Any, **__: Any) -> None:
        raise InvalidRequest("No model 'pocket'.", field="model")

    monkeypatch.setattr(service, "prepare", gone)
    batching.go_on(house.db, service, batch_id)
    left = house.get(f"/batches/{batch_id}")
    assert (left["state"], left["counts"]["cancelled"]) == ("cancelled", 5)
    _is_sound(house, 0)


def test_a_cancel_in_pieces(either_house: House, pieces: None) -> None:
    house, service = either_house, either_house.app.state.ctx.service
    batch_id = house.post("/batches", {"items": items(7)})["id"]
    with house.db.write() as tx:
        caller = Caller(account=accounts.get(tx, "default"), key_id="key", scopes=("jobs",))
        stopped = batching.cancel(tx, caller, batch_id)
    assert (stopped.state, stopped.counts[State.CANCELLED], stopped.progress) == ("cancelled", 7, 1.0)
    assert house.get("/jobs", params={"batch_id": batch_id, "state": "queued"})["total"] == 5
    running = house.claim()  # a worker was faster
    batching.go_on_with_left(house.db, service)  # as after the death of the process
    assert house.get("/jobs", params={"batch_id": batch_id, "state": "queued"})["total"] == 0
    assert house.get(f"/jobs/{running.id}")["cancel_asked"]
    assert house.get(f"/batches/{batch_id}")["finished_at"] is None
    with house.db.write() as tx:
        queue.cancelled(tx, running.id, running.fence)
    done = house.get(f"/batches/{batch_id}")
    assert (done["finished_at"] is not None, done["counts"]["cancelled"]) == (True, 7)
    _is_sound(house, 0)

    whole = house.post("/batches", {"items": items(7)})["id"]
    house.post(f"/batches/{whole}/cancel", expect=200)
    assert house.get("/jobs", params={"batch_id": whole, "state": "cancelled"})["total"] == 7
    assert house.get(f"/batches/{whole}")["finished_at"] is not None
