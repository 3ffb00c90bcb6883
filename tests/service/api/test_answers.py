"""What is answered is what the OpenAPI document says: every route, once and more, with everything that it can hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from api_house import BASE, House, opened

from mutoscope.catalog import find_model
from mutoscope.jobs import queue, workers
from mutoscope.jobs.model import Failure
from tests.making_loras import make_lora

NOT_JSON = {("get", "/jobs/{job_id}/content"), ("get", "/jobs/{job_id}/events"), ("get", "/events"),
            ("get", "/batches/{batch_id}/results")}  # fmt: skip


class Checked:
    """Asks, and compares each answer with the document."""

    def __init__(self, house: House) -> None:
        self.house, self.seen = house, set[tuple[str, str]]()
        self.paths: dict[str, Any] = house.http.get(f"{BASE}/openapi.json").json()["paths"]

    def schema(self, method: str, path: str, status: int) -> tuple[tuple[str, str], dict[str, Any] | None]:
        plain = path.partition("?")[0]
        fitting = [p for p in self.paths if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", p), BASE + plain)]
        found = min((p for p in fitting if method in self.paths[p]), key=lambda p: p.count("{"))
        content = self.paths[found][method]["responses"][str(status)].get("content")
        key = method, found.removeprefix(BASE)
        return key, None if content is None else content["application/json"]["schema"]

    def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        got = self.house.call(method.upper(), path, body, key="admin")
        assert got.status_code == status, f"{method} {path}: {got.text}"
        key, schema = self.schema(method, path, status)
        self.seen.add(key)
        if status == 204:
            assert (schema, got.content) == (None, b"")
            return None
        assert schema is not None
        for error in jsonschema_rs.Draft202012Validator(schema).iter_errors(got.json()):
            raise AssertionError(f"{method} {path}: {error.message} at {list(error.instance_path)}")
        return got.json()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    make_lora(tmp_path / "loras" / "ink.safetensors", find_model("pocket").files.dit.path)
    with opened(House(tmp_path / "data", preload="", loras_dir=tmp_path / "loras")) as made:
        yield made


def test_every_answer_is_as_described(house: House) -> None:
    ask = Checked(house)
    full = {
        "prompt": "a red ball", "keyframes": [{"media": {"url": "https://example.com/a.png"}}], "seed": 1,
        "tracks": [[{"at": 0, "x0": 0, "y0": 0, "x1": 1, "y1": 1}]], "loras": [{"name": "ink", "strength": 0.5}],
        "guidance_interval": [0, 0.5], "cache": "easy=0.1", "metadata": {"order": 12},
    }  # fmt: skip
    first = ask("post", "/jobs", full, status=201)["id"]
    ask("post", "/estimates", {"prompt": "a red ball"})
    with house.db.write() as tx:
        workers.register(tx, worker_id="w", device="cpu", host="here", pid=1)
    for end in ("fail", "succeed"):
        ask("post", "/jobs", {"prompt": "a red ball"}, status=201)
        job = house.claim()
        ask("get", f"/jobs/{job.id}")
        if end == "succeed":
            house.succeed(job)
        else:
            with house.db.write() as tx:
                queue.fail(tx, job.id, job.fence, Failure.INTERNAL, "a bug")
    ask("get", "/jobs?limit=2")
    assert {job["state"] for job in ask("get", "/jobs")["data"]} == {"queued", "failed", "succeeded"}
    waiting = ask("post", "/jobs", {"prompt": "a red ball"}, status=201)["id"]
    ask("post", f"/jobs/{waiting}/cancel")
    ask("delete", f"/jobs/{first}", status=204)

    batch = ask("post", "/batches", {"items": [{"prompt": "a red ball"}], "confirm": False}, status=201)["id"]
    ask("get", "/batches")
    ask("post", f"/batches/{batch}/confirm")
    ask("get", f"/batches/{batch}")
    ask("post", f"/batches/{batch}/cancel")

    for path in ("/models", "/loras", "/loras/ink", "/ping", "/credits", "/plans", "/usage", "/workers"):
        ask("get", path)
    ask("post", "/prompts", {"prompt": "a red bal", "model": "pocket"})
    file = ask("post", "/files", {"filename": "a.png"}, status=201)["id"]
    ask("get", "/files")
    ask("get", f"/files/{file}")
    ask("delete", f"/files/{file}", status=204)

    ask("post", "/routers", {"slug": "cheap"}, status=201)
    for path in ("/routers", "/routers/cheap", "/decisions"):
        ask("get", path)
    ask("put", "/routers/cheap", {"slug": "cheap", "rules": {"max_credits": {"video": 4}}})
    ask("delete", "/routers/cheap", status=204)

    hook = {"url": "https://example.com/hook", "events": ["job.failed"]}
    endpoint = ask("post", "/webhooks", hook, status=201)["id"]
    ask("post", f"/webhooks/{endpoint}/test", status=202)
    for path in ("/webhooks", f"/webhooks/{endpoint}", "/webhooks/deliveries", "/webhooks/secret"):
        ask("get", path)
    ask("put", f"/webhooks/{endpoint}", hook)
    ask("post", f"/webhooks/{endpoint}/rotate")
    ask("post", "/webhooks/replay", {"endpoint_id": endpoint, "since": 0})
    ask("delete", f"/webhooks/{endpoint}", status=204)

    ask("post", "/accounts", {"name": "studio", "limits": {"concurrency": 8}}, status=201)
    ask("patch", "/accounts/studio", {"weight": 2})
    ask("post", "/accounts/studio/credits", {"amount": 5})
    key = ask("post", "/keys", {"name": "laptop", "account": "studio"}, status=201)["id"]
    for path in ("/accounts", "/keys"):
        ask("get", path)
    ask("delete", f"/keys/{key}")

    described = {(method, p.removeprefix(BASE)) for p, methods in ask.paths.items() for method in methods}
    assert described - ask.seen == NOT_JSON


def test_a_field_too_many_or_too_few_would_be_noticed(house: House) -> None:
    ask = Checked(house)
    job = ask("post", "/jobs", {"prompt": "a red ball"}, status=201)
    validator = jsonschema_rs.Draft202012Validator(ask.schema("get", f"/jobs/{job['id']}", 200)[1])
    assert validator.is_valid(job)
    for wrong in ({**job, "more": 1}, {k: v for k, v in job.items() if k != "cost"}, {**job, "state": "paused"},
                  {**job, "spec": {"promt": ""}}):  # fmt: skip
        assert not validator.is_valid(wrong)
