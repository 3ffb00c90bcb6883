"""The description of our API is valid, and what is sent by its rules, or against them, is answered by its rules."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from api_house import BASE, House, opened
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.databases import Clock, Postgres

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 50 if os.environ.get("SOAK_STEPS") else 4
NUMBERS = itertools.count()
ENDLESS = f"{BASE}/events"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One server for all requests: whatever they do to it, it has to go on."""
    url = ""
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        assert isinstance(server, Postgres)
        server.make(Clock()).close()
        url = server.url
    folder: Path = tmp_path_factory.mktemp("openapi")
    with opened(House(folder / "data", preload="", database_url=url)) as made:
        made.post("/jobs", {"prompt": "a red ball", "quality": "draft"})
        yield made


def operations(house: House) -> list[Any]:
    """All of our routes but the stream that has no end."""
    schema = schemathesis.openapi.from_dict(house.app.openapi())
    schema.config.update(base_url="http://testserver")
    chosen = schema.include(path_regex=f"^{BASE}/").exclude(path=ENDLESS)
    return [result.ok() for result in chosen.get_all_operations()]


def things(house: House) -> dict[str, str]:
    """Ids of things that are there, by the names of path parameters."""
    made = f"thing-{next(NUMBERS)}"
    job = house.post("/jobs", {"prompt": "a red ball", "quality": "draft"})["id"]
    batch = house.post("/batches", {"items": [{"prompt": "a red ball"}], "confirm": False})["id"]
    for old in house.get("/webhooks")["data"]:  # an account has only so many
        house.call("DELETE", f"/webhooks/{old['id']}")
    endpoint = house.post("/webhooks", {"url": "https://example.com/hook"})["id"]
    key = house.post("/keys", {"name": made}, key="admin")["id"]
    file = house.post("/files", {"filename": "a.png"})["id"]
    house.post("/routers", {"slug": made})
    house.post("/accounts", {"name": made}, key="admin")
    return {
        "job_id": job,
        "batch_id": batch,
        "endpoint_id": endpoint,
        "key_id": key,
        "file_id": file,
        "name": made,
    }


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_requests_of_all_kinds(shared: House, mode: str) -> None:
    """By the description's rules, and against them."""
    headers = {"authorization": f"Bearer {shared.keys['admin']}"}
    wrong: list[str] = []
    seen: list[int] = []

    def ask(operation: Any) -> None:
        try:
            strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
        except Unsatisfiable:
            return

        there = things(shared)
        if operation.path.endswith("/events"):  # only the stream of what has ended comes to an end
            shared.post(f"/jobs/{there['job_id']}/cancel", expect=200)

        @given(case=strategy)
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def one(case: Case) -> None:
            if case.path_parameters and len(seen) % 3:  # otherwise nearly everything would be 404
                case.path_parameters = {name: there[name] for name in case.path_parameters}
            given = case.as_transport_kwargs()
            names = ("method", "url", "headers", "params", "data", "json", "files")
            request = requests.Request(**{name: given[name] for name in names if name in given}).prepare()
            request.headers.update(headers)
            assert request.url is not None
            response = shared.http.request(
                str(request.method), request.url, content=request.body, headers=dict(request.headers)
            )
            seen.append(response.status_code)
            is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
            case.validate_response(response, checks=CHECKS[: -1 if is_stream else None])

        try:
            one()
        except Unsatisfiable:  # nothing can be sent against the rules of a route without parameters
            return
        except (Exception, BaseExceptionGroup) as e:
            wrong.append(f"{operation.method.upper()} {operation.path}: {e}")

    for operation in operations(shared):
        ask(operation)
    assert not wrong, "\n\n".join(wrong)
    assert {200, 201, 204, 400, 404} <= set(seen)


def test_the_description_is_valid(house: House) -> None:
    described = house.http.get(f"{BASE}/openapi.json").json()
    schemathesis.openapi.from_dict(described).validate()
    ours = {path for path in described["paths"] if path.startswith(BASE)}
    for name in (
        "jobs",
        "estimates",
        "batches",
        "models",
        "prompts",
        "files",
        "usage",
        "keys",
        "accounts",
        "events",
    ):
        assert f"{BASE}/{name}" in ours
    for path in ours:
        for method, operation in described["paths"][path].items():
            assert operation["summary"], (method, path)
            assert {"4XX", "5XX"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
            assert operation["security"] == [{"ApiKey": []}]
