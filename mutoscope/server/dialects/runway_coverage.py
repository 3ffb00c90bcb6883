"""What of Runway's API is here: computed from the rules of the models and the tables of `runway_support`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mutoscope.server.dialects.coverage import IGNORED, REFUSED, SUPPORTED, Part, Route
from mutoscope.server.dialects.runway_rules import Rule, table
from mutoscope.server.dialects.runway_support import IGNORED as IGNORED_FIELDS
from mutoscope.server.dialects.runway_support import IGNORED_AT, NO_CLIP_REFERENCES, NOTES, REFUSALS, reason

PREFIX = "/v1"

ROUTER_FIELDS = (
    Part("slug", SUPPORTED),
    Part("name", SUPPORTED),
    Part("description", SUPPORTED),
    Part("settings.optimizeFor", SUPPORTED),
    Part("settings.models", SUPPORTED, "names of models here, or of Runway's that lead to one"),
    Part("settings.maxCreditsPerGeneration.video", SUPPORTED),
    Part("settings.maxCreditsPerGeneration.image", SUPPORTED),
    Part(
        "settings.maxCreditsPerGeneration.audio",
        IGNORED,
        "kept and given back; there is no audio to generate",
    ),
    Part("settings.fallback.onCapacity", SUPPORTED),
    Part("settings.schemaVersion", SUPPORTED),
)
PAGE = (Part("limit", SUPPORTED), Part("cursor", SUPPORTED))


def _names(rule: Rule, at: str) -> Iterator[str]:
    """Names of a field and of what is inside of it; what is refused or does nothing is not taken apart."""
    yield at
    if _part(at, ()).level != SUPPORTED:
        return
    for inner in (*rule.get("any", ()), *([rule["list"]] if "list" in rule else [])):
        yield from (name for name in _names(inner, at) if name != at)
    for name, inner in rule.get("object", {}).items():
        yield from _names(inner, f"{at}.{name}")


def _parts(models: dict[str, Any]) -> tuple[Part, ...]:
    """The fields of an endpoint, those of all of its models together."""
    owners: dict[str, list[str]] = {}
    for model, rules in models.items():
        for field, rule in rules["fields"].items():
            for name in dict.fromkeys(_names(rule, field)):
                owners.setdefault(name, []).append(model)
    everyone = tuple(models)
    return (
        Part("model", SUPPORTED, ", ".join(models)),
        *(_part(name, tuple(o), everyone) for name, o in owners.items()),
    )


def _part(name: str, owners: tuple[str, ...], everyone: tuple[str, ...] = ()) -> Part:
    """One field of the models that have it (`owners`), among those of an endpoint."""
    some = () if owners == everyone else owners
    refusals = [r for r in REFUSALS if r.field == name and (not r.models or set(r.models) & set(owners))]
    whole = [r for r in refusals if not r.values and name != "character"]
    if whole:
        return Part(name, REFUSED, whole[0].why, some)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in IGNORED_FIELDS:
        return Part(name, IGNORED, IGNORED_FIELDS[leaf], some)
    notes = [
        f"without effect for {m}: {why}"
        for (m, field), why in IGNORED_AT.items()
        if field == name and m in owners
    ]
    for refusal in refusals:
        values = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in refusal.values)
        who = f" ({', '.join(refusal.models)})" if refusal.models else ""
        notes.append(f"refused{' for ' + values if values else ''}{who}: {refusal.why}")
    return Part(name, SUPPORTED, "; ".join(notes), some)


def _routes() -> Iterator[Route]:
    for endpoint, models in table()["endpoints"].items():
        note = " ".join(NOTES[m] for m in models if m in NOTES)
        yield Route("POST", f"/{endpoint}", SUPPORTED, note, _parts(models))
    for kind in ("video", "image"):
        fields = table()["generate"][kind]["fields"]
        parts = [
            _part(name, ()) for field, rule in fields.items() for name in dict.fromkeys(_names(rule, field))
        ]
        clips = Part(
            "referenceVideos",
            SUPPORTED,
            f"one with role source; role reference is refused: {NO_CLIP_REFERENCES}",
        )
        inside = [clips if p.name == clips.name else p for p in parts]
        named = [Part(f"input.{p.name}", p.level, p.note) for p in inside]
        yield Route("POST", f"/generate/{kind}", SUPPORTED, "", (Part("configId", SUPPORTED), *named))
    yield Route("GET", "/tasks/{id}", SUPPORTED, "adds queuePosition, etaSeconds, stage, model and seed")
    yield Route(
        "DELETE", "/tasks/{id}", SUPPORTED, "cancels or deletes; a later GET answers 404, as Runway documents"
    )
    yield Route("POST", "/uploads", SUPPORTED, "", (Part("filename", SUPPORTED), Part("type", SUPPORTED)))
    yield Route("GET", "/organization", SUPPORTED)
    dates = (Part("startDate", SUPPORTED), Part("beforeDate", SUPPORTED))
    yield Route("POST", "/organization/usage", SUPPORTED, "", dates)
    yield Route("POST", "/routers", SUPPORTED, "", ROUTER_FIELDS)
    yield Route("GET", "/routers", SUPPORTED, "", PAGE)
    yield Route("GET", "/routers/{id}", SUPPORTED)
    yield Route("PATCH", "/routers/{id}", SUPPORTED, "the slug stays", ROUTER_FIELDS[1:])
    yield Route("DELETE", "/routers/{id}", SUPPORTED)
    yield Route("GET", "/routers/{id}/requests", SUPPORTED, "", PAGE)
    for method, path in table()["routes"]:
        if why := reason(path):
            yield Route(method, path.removeprefix(PREFIX), REFUSED, why)


COVERAGE: tuple[Route, ...] = tuple(_routes())
