"""Every example of docs/api.md is sent to a server and gets the answer that the page shows; every route has one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mutoscope.catalog import find_model
from mutoscope.jobs import accounts
from tests.making_loras import make_lora
from tests.service.contract.runway.runway_house import House, listening

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@dataclass(frozen=True)
class Example:
    """A request, and the answer it gets: only the parts that are shown, "..." stands for anything."""

    method: str
    path: str
    body: str
    status: int
    answer: Any

    @property
    def ends_jobs(self) -> bool:
        """Whether the page tells what is when the job has ended."""
        return isinstance(self.answer, dict) and self.answer.get("state") == "succeeded"


def examples() -> list[Example]:
    found = []
    for block in re.findall(r"```http\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        asked, _, told = block.strip().partition("\n\n")
        line, _, body = asked.partition("\n")
        status, _, answer = told.partition("\n")
        method, path = line.split()
        found.append(Example(method, path, body, int(status), json.loads(answer) if answer else None))
    return found


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path / "home"))
    make_lora(tmp_path / "home" / "loras" / "ink.safetensors", find_model("pocket").files.dit.path)
    made = House(tmp_path)
    with made.db.write() as tx:
        made.key = accounts.create_key(tx, made.account.id, "admin", scopes=("jobs", "admin"))[1]
    yield made
    made.db.close()


def test_every_example_gets_the_answer_that_is_shown(house: House) -> None:
    known: dict[str, str] = {}
    with listening(house, lifespan="on") as url, httpx.Client(base_url=url, timeout=30) as http:
        http.headers["authorization"] = f"Bearer {house.key}"
        for example in examples():
            if example.ends_jobs:
                house.succeed(house.claim())
            path, body = (_filled(text, known) for text in (example.path, example.body))
            with http.stream(example.method, path, content=body or None) as got:
                if got.headers.get("content-type", "").startswith("text/event-stream"):
                    events = _first_event(got)
                    assert "state" in events
                    continue
                got.read()
            shown = f"{example.method} {path}: {got.status_code} {got.text[:500]}"
            assert got.status_code == example.status, shown
            if example.answer is not None:
                answer = got.json()
                assert not _differences(example.answer, answer), (
                    f"{shown}\n{_differences(example.answer, answer)}"
                )
                if "object" in answer and "id" in answer:
                    known[f"{answer['object']}_id"] = answer["id"]


def test_every_route_has_an_example(house: House) -> None:
    shown = {(e.method, e.path.partition("?")[0]) for e in examples()}
    paths = house.app.openapi()["paths"]
    for path, methods in paths.items():
        pattern = re.sub(r"\{[^}]+\}", "[^/]+", path)
        for method in methods:
            assert any(m == method.upper() and re.fullmatch(pattern, p) for m, p in shown), f"{method} {path}"


def _filled(text: str, known: dict[str, str]) -> str:
    return re.sub(r"\{(\w+_id)\}", lambda m: known[m[1]], text)


def _first_event(got: httpx.Response) -> str:
    """The stream until its first event."""
    text = ""
    for piece in got.iter_text():
        text += piece
        if "\nevent: " in text:
            break
    return text


def _differences(expected: Any, got: Any, at: str = "") -> list[str]:
    """Where an answer is not as shown. Lists may be longer."""
    if expected == "...":
        return [] if got not in (None, "") else [f"{at}: nothing there"]
    if isinstance(expected, dict) and isinstance(got, dict):
        return [d for k, v in expected.items() for d in _differences(v, got.get(k), f"{at}.{k}")]
    if isinstance(expected, list) and isinstance(got, list) and expected and len(got) >= len(expected):
        return [d for i, v in enumerate(expected) for d in _differences(v, got[i], f"{at}[{i}]")]
    return [] if expected == got else [f"{at}: {got!r:.200}, {expected!r} shown"]
