"""Jobs, estimates, prompts, keys and money over HTTP, on both databases where it matters."""

from __future__ import annotations

import csv
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from api_house import DRAFT, House

from mutoscope.jobs import accounts, housekeeping, idempotency, queue
from mutoscope.jobs.schema import api_keys
from mutoscope.server import edge


def test_a_job_from_its_estimate_to_its_file(either_house: House) -> None:
    house = either_house
    told = house.post("/estimates", DRAFT, expect=200)
    assert (told["credits"], told["usd"], told["model"]) == (4, 0.04, "pocket")
    assert house.get("/jobs")["total"] == 0
    job = house.post("/jobs", {**DRAFT, "metadata": {"shot": 3}})
    assert (job["state"], job["cost"], job["queue_position"], job["metadata"]) == (
        "queued",
        4,
        0,
        {"shot": 3},
    )
    second = house.post("/jobs", DRAFT)
    assert second["queue_position"] == 1
    assert second["eta_s"] > second["estimate_s"]
    running = house.claim()
    house.step(running, 0.5)
    shown = house.get(f"/jobs/{job['id']}")
    assert (shown["state"], shown["stage"], shown["step"], shown["progress"]) == (
        "running",
        "denoise",
        10,
        0.5,
    )
    assert 0 < shown["eta_s"] <= 30
    house.refused("GET", f"/jobs/{job['id']}/content", status=409)
    house.succeed(running)
    done = house.get(f"/jobs/{job['id']}")
    assert (done["state"], done["cost_captured"], done["progress"]) == ("succeeded", 4, 1.0)
    assert house.call("GET", f"/jobs/{job['id']}/content").content == b"not really a video"
    (decision,) = house.get("/decisions", params={"job_id": job["id"]})["data"]
    assert decision["chosen"] == "pocket"
    assert decision["data"]["reasonCode"] == "only_eligible_model"
    assert house.call("DELETE", f"/jobs/{job['id']}").status_code == 204
    house.refused("GET", f"/jobs/{job['id']}", status=404)
    assert house.post(f"/jobs/{second['id']}/cancel", expect=200)["state"] == "cancelled"
    house.refused("GET", f"/jobs/{second['id']}", status=404, key="other")
    page = house.get("/jobs", params={"state": "cancelled,failed", "limit": 1})
    assert [j["id"] for j in page["data"]] == [second["id"]]
    assert house.refused("GET", "/jobs", params={"order": "up"}, status=400)["field"] == "order"


def test_what_no_job_can_be_is_refused_with_its_field(house: House) -> None:
    for body, field in (
        ({"prompt": "x", "colour": 1}, "colour"), ({"prompt": "x", "seconds": 0}, "seconds"), ({}, ""),
        ({"prompt": "x", "model": "pockett"}, "model"), ([], ""),
        ({"prompt": "x", "keyframes": [{"media": {"asset": "a", "url": "b"}}]}, "keyframes.0.media"),
    ):  # fmt: skip
        assert house.refused("POST", "/jobs", body, status=400)["field"] == (field or None)
    assert "pocket" in str(
        house.refused("POST", "/jobs", {"prompt": "x", "model": "pockett"}, status=400)["hint"]
    )
    for text in (
        '{"prompt": "\\u0000"}',
        '{"prompt": "\\udfff"}',
        '{"metadata": {"a": Infinity}}',
        "[" * 100_000,
    ):
        house.refused("POST", "/jobs", content=text, status=400)
    house.refused("GET", "/jobs/a%00b", status=400)


def test_words_that_a_model_does_not_know(house: House) -> None:
    report = house.post("/prompts", {"prompt": "A red bal bounces near a dragon."}, expect=200)
    assert report["known_vocabulary"]
    unknown = {entry["word"]: entry["near"] for entry in report["unknown"]}
    assert {"bal", "dragon"} <= set(unknown)
    assert "ball" in unknown["bal"]
    assert not {"red", "a"} & set(unknown)


# -- Idempotency-Key -----------------------------------------------------------------------------------------


def test_one_key_makes_one_job(either_house: House) -> None:
    house = either_house
    named = {"headers": {"idempotency-key": "k"}}
    first = house.call("POST", "/jobs", DRAFT, **named)
    again = house.call("POST", "/jobs", DRAFT, **named)
    assert (again.status_code, again.text) == (201, first.text)
    assert again.headers["location"] == first.headers["location"]
    refused = house.call("POST", "/jobs", {**DRAFT, "seed": 1}, **named)
    assert refused.status_code == 422
    assert refused.headers["x-should-retry"] == "false"
    assert house.call("POST", "/estimates", DRAFT, **named).status_code == 422  # another route
    assert house.call("POST", "/jobs", DRAFT, key="other", **named).json()["id"] != first.json()["id"]
    assert house.get("/jobs")["total"] == 1


def test_duplicates_in_flight_get_the_answer_of_the_first(either_house: House) -> None:
    house = either_house
    start = threading.Barrier(6)

    def ask(_: int) -> tuple[int, str]:
        start.wait()
        got = house.call("POST", "/jobs", DRAFT, headers={"idempotency-key": "k"})
        return got.status_code, got.text

    with ThreadPoolExecutor(6) as threads:
        answers = set(threads.map(ask, range(6)))
    assert len(answers) == 1
    assert next(iter(answers))[0] == 201
    assert house.get("/jobs")["total"] == 1


def test_a_refused_request_leaves_its_key_free_and_a_day_frees_all(house: House) -> None:
    named = {"headers": {"idempotency-key": "k"}}
    house.refused("POST", "/jobs", {"prompt": "x", "model": "nobody"}, status=400, **named)
    first = house.post("/jobs", DRAFT, **named)
    now = house.db.clock()
    house.db.clock = lambda: now + 24 * 3600 - 1
    housekeeping.sweep(house.db, house.settings)
    assert house.post("/jobs", DRAFT, **named)["id"] == first["id"]
    house.db.clock = lambda: now + 24 * 3600 + 60
    housekeeping.sweep(house.db, house.settings)
    assert house.post("/jobs", DRAFT, **named)["id"] != first["id"]


def test_a_key_lasts_its_day_even_if_nobody_sweeps(house: House) -> None:
    with house.db.write() as tx:
        assert idempotency.begin(tx, "default", "k", "POST /x", "h") is None
    now = house.db.clock()
    house.db.clock = lambda: now + 30 * 3600
    housekeeping.sweep(house.db, house.settings)
    with house.db.write() as tx:
        assert idempotency.begin(tx, "default", "k", "POST /x", "other") is None


# -- keys and limits -----------------------------------------------------------------------------------------


def test_keys_are_shown_once_and_can_be_taken_back(either_house: House) -> None:
    house = either_house
    made = house.post("/keys", {"name": "ci", "scopes": ["jobs"]}, key="admin")
    assert made["secret"].startswith("mk_")
    assert made["hint"] == made["secret"][:8] + "..."
    listed = {k["id"]: k for k in house.get("/keys", key="admin")["data"]}
    assert "secret" not in listed[made["id"]]
    assert listed[made["id"]]["last_used_at"] is None
    with house.db.read() as tx:
        rows = [str(row) for row in tx.all(api_keys.select())]
    assert not any(made["secret"] in row for row in rows)  # only its hash is kept
    assert house.get("/ping", key=made["secret"])["account"] == "default"
    assert {k["id"]: k for k in house.get("/keys", key="admin")["data"]}[made["id"]][
        "last_used_at"
    ] is not None
    assert house.call("DELETE", f"/keys/{made['id']}", key="admin").json()["revoked_at"] is not None
    assert "revoked" in house.refused("GET", "/ping", key=made["secret"], status=401)["message"]


def test_an_existing_key_can_be_taken_over(house: House) -> None:
    house.post("/keys", {"name": "old", "value": "key_deployed-long-ago"}, key="admin")
    assert house.get("/ping", key="key_deployed-long-ago")["message"] == "pong"
    house.refused("POST", "/keys", {"name": "old", "value": "key_deployed-long-ago"}, key="admin", status=409)
    for value in ("", " ", "snow☃", "a\nb"):
        error = house.refused("POST", "/keys", {"name": "n", "value": value}, key="admin", status=400)
        assert error["field"] == "value"


def test_scopes(house: House) -> None:
    house.refused("POST", "/jobs", DRAFT, key="read", status=403)
    assert house.get("/jobs", key="read")["total"] == 0
    for method, path, body in (
        ("GET", "/keys", None), ("GET", "/accounts", None), ("POST", "/keys", {"name": "n"}),
        ("POST", "/accounts/default/credits", {"amount": 5}), ("PATCH", "/accounts/default", {"plan": "pro"}),
    ):  # fmt: skip
        house.refused(method, path, body, status=403)
    house.refused("POST", "/keys", {"name": "n", "scopes": ["root"]}, key="admin", status=400)
    house.refused("GET", "/jobs", key="mk_nobody", status=401)
    assert house.call("GET", "/jobs", headers={"authorization": "Basic x"}).status_code == 401
    house.call("PATCH", "/accounts/other", {"disabled": True}, key="admin")
    house.refused("GET", "/ping", key="other", status=403)


def test_an_account_has_so_many_at_once_a_day_and_a_month(either_house: House) -> None:
    house = either_house
    change = {"limits": {"concurrency": 1, "daily_jobs": 3, "monthly_credits": 8}}
    assert house.call("PATCH", "/accounts/default", change, key="admin").status_code == 200
    assert [house.post("/jobs", DRAFT)["state"] for _ in range(2)] == ["queued", "throttled"]
    assert "limit of 8" in house.refused("POST", "/jobs", DRAFT, status=403)["message"]
    for _ in range(2):
        house.succeed(house.claim())
    house.refused("POST", "/jobs", DRAFT, status=403)  # what was spent counts as what is held
    house.call("PATCH", "/accounts/default", {"limits": {"daily_jobs": 3}}, key="admin")
    house.post("/jobs", DRAFT)
    got = house.call("POST", "/jobs", DRAFT)
    assert got.status_code == 429
    assert 86_000 < int(got.headers["retry-after"]) <= 86_400
    assert got.headers["x-should-retry"] == "false"
    error = house.call("PATCH", "/accounts/default", {"limits": {"speed": 1}}, key="admin").json()["error"]
    assert error["field"] == "limits.speed"


def test_more_slots_let_in_what_waits(either_house: House) -> None:
    house = either_house
    house.call("PATCH", "/accounts/default", {"limits": {"concurrency": 0}}, key="admin")
    job = house.post("/jobs", DRAFT)
    assert job["state"] == "throttled"
    house.call("PATCH", "/accounts/default", {"limits": {}}, key="admin")
    assert house.get(f"/jobs/{job['id']}")["state"] == "queued"


def test_requests_a_second(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(edge, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(
        house.app.state.ctx, "settings", house.settings.model_copy(update={"rate_limit_per_s": 2.0})
    )
    got = [house.call("GET", "/ping", key="read").status_code for _ in range(6)]
    assert got == [200] * 4 + [429] * 2
    assert house.call("GET", "/ping", key="other").status_code == 200  # each key for itself
    now[0] += 0.5
    assert [house.call("GET", "/ping", key="read").status_code for _ in range(2)] == [200, 429]


def test_usage_by_day_model_and_key(either_house: House) -> None:
    house = either_house
    for key in ("jobs", "jobs", "admin"):
        house.post("/jobs", DRAFT, key=key)
        house.succeed(house.claim())
    house.post("/jobs", {**DRAFT, "operation": "image"})
    house.succeed(house.claim())
    house.post("/jobs", DRAFT)
    with house.db.write() as tx:
        job = queue.claim(tx, "w", ("pocket",), "cpu")
        assert job is not None
        queue.cancelled(tx, job.id, job.fence)
    told = house.get("/usage")
    assert {(row["operation"], row["jobs"], row["credits"]) for row in told["data"]} == {
        ("video", 2, 8), ("video", 1, 4), ("image", 1, 1),
    }  # fmt: skip
    assert len({row["key_id"] for row in told["data"]}) == 2
    assert sum(told["days"].values()) == 13
    assert len(told["days"]) == 30
    table = list(csv.DictReader(io.StringIO(house.call("GET", "/usage", params={"format": "csv"}).text)))
    assert [int(row["credits"]) for row in table] == [row["credits"] for row in told["data"]]
    assert {row["model"] for row in table} == {"pocket"}
    for bad in ({"start": "x"}, {"start": "2024-01-01", "before": "2026-01-01"}, {"format": "xml"}):
        house.refused("GET", "/usage", params=bad, status=400)
    assert house.get("/usage", key="other")["data"] == []
    credits = house.get("/credits")
    assert (credits["spent_30_days"], credits["jobs_today"], credits["reserved"]) == (13, 5, 0)


def test_names_that_a_spreadsheet_would_run(house: House) -> None:
    from mutoscope.jobs import usage

    row = usage.UsageRow(day=usage.date(2026, 1, 2), model='=cmd("x")', model_asked="auto", operation="video",
                         key_id=None, jobs=1, credits=4, device_seconds=1.5)  # fmt: skip
    assert next(csv.DictReader(io.StringIO(usage.as_csv([row]))))["model"] == '\'=cmd("x")'


def test_the_first_start_makes_one_key(house: House) -> None:
    with house.db.write() as tx:
        assert accounts.first_run(tx) is None  # there are accounts


def test_a_full_disk_refuses_and_changes_nothing(house: House) -> None:
    """SQLite says the same of a database that may not grow as of a full disk."""

    def full(raw: Any, _record: Any) -> None:
        (pages,) = raw.execute("PRAGMA page_count").fetchone()
        raw.execute(f"PRAGMA max_page_count = {pages}")

    long = {"prompt": "a red ball " * 1500, "quality": "draft"}
    headers = {"idempotency-key": "once"}
    house.get("/jobs")  # the key was seen: nothing else is to be written
    house.db.engine.dispose()
    sa.event.listen(house.db.engine, "connect", full)
    got = house.call("POST", "/jobs", long, headers=headers)
    assert got.status_code == 503
    assert got.json()["error"]["code"] == "storage_full"
    assert "nothing was changed" in got.json()["error"]["message"]
    assert (got.headers["retry-after"], got.headers["x-should-retry"]) == ("60", "true")
    assert house.get("/jobs")["total"] == 0
    assert house.get("/credits")["reserved"] == 0
    sa.event.remove(house.db.engine, "connect", full)
    house.db.engine.dispose()
    assert house.call("POST", "/jobs", long, headers=headers).status_code == 201
    assert house.get("/jobs")["total"] == 1
