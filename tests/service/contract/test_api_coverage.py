"""docs/api-coverage.md is what the tables of the dialects say, and the tables name the routes that exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from mutoscope.server import app
from mutoscope.server.dialects.coverage import REFUSED
from mutoscope.settings import Settings
from scripts import make_api_coverage


def routes(module: Any, tmp_path: Path) -> set[tuple[str, str]]:
    """Method and path of each route, with {} for what varies."""
    router: APIRouter = module.router(SimpleNamespace(settings=Settings(data_dir=tmp_path)))
    return {
        (method, plain(route.path))
        for route in router.routes
        if isinstance(route, APIRoute) and ":path" not in route.path
        for method in route.methods
    }


def plain(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "{}", path)


def test_the_page_is_the_generated_one() -> None:
    assert make_api_coverage.OUT.read_text("utf-8") == make_api_coverage.render(), (
        "docs/api-coverage.md is old: run scripts/make_api_coverage.py"
    )


def test_the_page_has_every_dialect() -> None:
    pages = [make_api_coverage.coverage(d) for d in make_api_coverage.DIALECTS]
    assert sorted(prefix for prefix, _ in pages) == sorted(module.PREFIX for module in app.DIALECTS)


@pytest.mark.parametrize("module", app.DIALECTS, ids=lambda m: m.NAME)
def test_the_table_names_the_routes_that_exist(module: Any, tmp_path: Path) -> None:
    told = [(r.method, module.PREFIX + plain(r.path)) for r in module.COVERAGE]
    assert len(set(told)) == len(told), "a route stands in the table twice"
    there = routes(module, tmp_path)
    assert there <= set(told)
    by_the_rest = {(r.method, module.PREFIX + plain(r.path)) for r in module.COVERAGE if r.level == REFUSED}
    assert set(told) - there <= by_the_rest, (
        "only what is refused may be answered by a route for all the rest"
    )


@pytest.mark.parametrize("module", app.DIALECTS, ids=lambda m: m.NAME)
def test_a_field_stands_in_the_table_once(module: Any) -> None:
    for route in module.COVERAGE:
        names = [name for part in route.fields for name in part.name.split(", ")]
        assert len(set(names)) == len(names), f"{route.method} {route.path}"
