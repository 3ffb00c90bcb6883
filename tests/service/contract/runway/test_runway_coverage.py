"""The tables say what is there: against the SDK's types, its routes, and each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mutoscope.server.dialects import runway_support as support
from mutoscope.server.dialects.coverage import IGNORED, REFUSED
from mutoscope.server.dialects.runway_coverage import COVERAGE, PREFIX
from mutoscope.server.dialects.runway_organization import REPORTED_AS
from mutoscope.server.dialects.runway_rules import Rule, table

ROOT = Path(__file__).parents[4]


def names(rule: Rule, at: str) -> Iterator[str]:
    yield at
    for inner in (*rule.get("any", ()), *([rule["list"]] if "list" in rule else [])):
        yield from names(inner, at)
    for name, inner in rule.get("object", {}).items():
        yield from names(inner, f"{at}.{name}")


FIELDS = {
    (model, name)
    for models in table()["endpoints"].values()
    for model, rules in models.items()
    for field, rule in rules["fields"].items()
    for name in names(rule, field)
} | {(model, "model") for models in table()["endpoints"].values() for model in models}


def test_the_rules_are_those_of_the_sdks() -> None:
    script = ROOT / "scripts" / "make_runway_models.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_route_of_the_sdk_is_in_the_table_once() -> None:
    routes = [(r.method, PREFIX + r.path) for r in COVERAGE]
    assert sorted(routes) == sorted((m, p) for m, p in table()["routes"])


def test_every_exception_names_a_field_that_exists() -> None:
    fields = {name for _, name in FIELDS}
    leaves = {name.rsplit(".", 1)[-1] for name in fields}
    assert {r.field for r in support.REFUSALS} <= fields
    assert set(support.IGNORED) <= leaves
    assert set(support.IGNORED_AT) <= FIELDS
    for refusal in support.REFUSALS:
        assert all((model, refusal.field) in FIELDS for model in refusal.models)


def test_every_output_format_is_made_or_refused() -> None:
    asked = {
        value
        for models in table()["endpoints"].values()
        for rules in models.values()
        for value in rules["fields"].get("outputFormat", {}).get("enum", ())
    }
    refused = {v for r in support.REFUSALS if r.field == "outputFormat" for v in r.values}
    assert asked == set(support.FORMATS) | refused
    assert not set(support.FORMATS) & refused


def test_what_is_refused_or_ignored_is_on_the_page_with_its_reason() -> None:
    fields = {part.name: part for route in COVERAGE for part in route.fields}
    assert fields["referenceAudio"].level == REFUSED
    assert fields["contentModeration"].level == IGNORED
    assert "refused for true" in fields["audio"].note
    assert {r.level for r in COVERAGE if r.path.startswith(("/voices", "/avatars", "/recipes"))} == {REFUSED}


def test_reported_names_are_runways() -> None:
    assert set(REPORTED_AS.values()) <= set(table()["usage_models"])
