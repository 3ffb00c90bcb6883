"""Runway's Model Router: configurations, what they decided, and how a decision is told. Pure.

The rules themselves are ours (`jobs/router.py`). What Runway's form has beyond them (`description`, `version`, the
names as they were given) is kept beside them in `Rules.shown`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.model import Job
from mutoscope.jobs.registry import AUTO, Registry
from mutoscope.jobs.router import KeptDecision, Router, Rules
from mutoscope.manifest import suggest
from mutoscope.server.dialects.runway_rules import BodyRefused, Hosts, Issue, check
from mutoscope.server.dialects.runway_view import iso

PROVIDER = "mutoscope"
SCHEMA_VERSION = 1
MOST_CREDITS = 10**9
KINDS = ("video", "image", "audio")

_SETTINGS = {
    "object": {
        "optimizeFor": {"enum": ["cost", "latency", "quality"]},
        "models": {
            "object": {
                "mode": {"enum": ["allow_new_except", "allowlist_only"]},
                "ids": {"list": {"text": [1, 200]}, "most": 500},
            },
            "required": [],
        },
        "maxCreditsPerGeneration": {
            "object": {kind: {"int": [1, MOST_CREDITS]} for kind in KINDS},
            "required": [],
        },
        "fallback": {"object": {"onCapacity": {"bool": True}}, "required": []},
        "schemaVersion": {"enum": [SCHEMA_VERSION]},
    },
    "required": [],
}
_TEXTS = {"name": {"text": [1, 200]}, "description": {"text": [0, 2000]}}
CREATE = {"fields": {"slug": {"text": [1, 63]}, **_TEXTS, "settings": _SETTINGS}, "required": ["slug"]}
UPDATE = {"fields": {**_TEXTS, "settings": _SETTINGS}, "required": []}

FILTERS = (("allow_deny", ("rule",)), ("capability", ("capability", "limits")), ("price", ("price",)))
"""Runway's names of the filters that our decisions record, in the order in which they run."""


def checked(body: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """A body that keeps to `CREATE` or `UPDATE`. null clears a description or a ceiling, where Runway allows that.

    Raises:
        BodyRefused: with every issue.
    """
    if not isinstance(body, dict):
        raise BodyRefused([Issue((), "expected a JSON object.")])
    solid = dict(body)
    if rules is UPDATE:
        solid = {k: v for k, v in solid.items() if not (k == "description" and v is None)}
        if isinstance(solid.get("settings"), dict):
            settings = {k: v for k, v in solid["settings"].items()
                        if not (k == "maxCreditsPerGeneration" and v is None)}  # fmt: skip
            if isinstance(settings.get("maxCreditsPerGeneration"), dict):
                caps = settings["maxCreditsPerGeneration"].items()
                settings["maxCreditsPerGeneration"] = {
                    k: v for k, v in caps if v is not None or k not in KINDS
                }
            solid["settings"] = settings
    issues, _ = check(rules, solid, Hosts())
    models = solid.get("settings", {}).get("models") if not issues else None
    if rules is CREATE and models is not None:
        issues += [
            Issue(("settings", "models", k), "is required.") for k in ("mode", "ids") if k not in models
        ]
    if issues:
        raise BodyRefused(issues)
    return body


def merged(old: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a change laid over them: what is left out stays, null removes."""
    new = {k: dict(v) if isinstance(v, Mapping) else v for k, v in old.items()}
    for name, value in change.items():
        if value is None:
            new.pop(name, None)
        elif isinstance(value, Mapping):
            inner = {**new.get(name, {}), **value}
            new[name] = {k: v for k, v in inner.items() if v is not None}
        else:
            new[name] = value
    if not new.get("maxCreditsPerGeneration", True):
        del new["maxCreditsPerGeneration"]
    if "models" in new:
        new["models"] = {"mode": "allow_new_except", "ids": [], **new["models"]}
    return new


def to_rules(settings: Mapping[str, Any], shown: Mapping[str, Any], registry: Registry) -> Rules:
    """Our rules of Runway's settings.

    A name of Runway's stands for the model that the alias table gives it. One that means "auto" stands for all: in a
    list of allowed names everything is allowed then, in a list of names left out nothing is left out by it.

    Raises:
        BodyRefused: a model that nobody knows.
    """
    models = settings.get("models", {})
    mode = models.get("mode", "allow_new_except")
    ids: list[str] = []
    issues = []
    known = [*(m.name for m in registry.models()), *registry.aliases]
    for i, name in enumerate(models.get("ids", ())):
        try:
            ids.append(registry.target(name))
        except InvalidRequest:
            near = suggest(name, known)
            issues.append(
                Issue(("settings", "models", "ids", i), f"got {name!r}, expected a model. {near}".rstrip())
            )
    if issues:
        raise BodyRefused(issues)
    if mode == "allowlist_only" and AUTO in ids:
        mode, ids = "allow_new_except", []
    caps = settings.get("maxCreditsPerGeneration", {})
    return Rules(
        optimize_for=settings.get("optimizeFor", "cost"),
        mode=mode,
        ids=tuple(name for name in dict.fromkeys(ids) if name != AUTO),
        max_credits={kind: int(caps[kind]) for kind in ("video", "image") if kind in caps},
        on_capacity=settings.get("fallback", {}).get("onCapacity", False),
        shown={**shown, "settings": dict(settings)},
    )


def settings_of(router: Router) -> dict[str, Any]:
    """Settings as Runway shows them; of a router that was made elsewhere, its rules in Runway's form."""
    rules = router.rules
    if "settings" in rules.shown:
        return {"optimizeFor": "cost", **rules.shown["settings"], "schemaVersion": SCHEMA_VERSION}
    made: dict[str, Any] = {
        "schemaVersion": SCHEMA_VERSION,
        "optimizeFor": rules.optimize_for,
        "models": {"mode": rules.mode, "ids": list(rules.ids)},
        "fallback": {"onCapacity": rules.on_capacity},
    }
    caps = {kind: cap for kind, cap in rules.max_credits.items() if kind in KINDS}
    return {**made, "maxCreditsPerGeneration": caps} if caps else made


def from_router(router: Router) -> dict[str, Any]:
    """A router in Runway's form."""
    shown = router.rules.shown
    body = {
        "id": router.id,
        "slug": router.slug,
        "name": router.name,
        "createdAt": iso(router.created_at),
        "updatedAt": iso(router.updated_at),
        "version": int(shown.get("version", 1)),
        "settings": settings_of(router),
    }
    return {**body, "description": shown["description"]} if shown.get("description") is not None else body


def routing(
    job: Job, router: Router, data: Mapping[str, Any], kind: str, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The `routing` of an answer of generate/*."""
    resolved = job.resolved
    made: dict[str, Any] = {
        "configId": router.slug,
        "model": job.model,
        "provider": PROVIDER,
        "estimatedCost": {"credits": job.cost},
        "resolvedInput": {
            "ratio": f"{resolved.out_width}:{resolved.out_height}",
            "resolution": asked.get("resolution", resolved.tier),
        },
        "resolvedSettings": {
            "optimizeFor": router.rules.optimize_for,
            "priceCeiling": router.rules.max_credits.get(kind),
        },
    }
    if kind == "video":
        made["resolvedInput"]["duration"] = resolved.seconds
    else:
        divisor = math.gcd(resolved.out_width, resolved.out_height)
        shape = f"{resolved.out_width // divisor}:{resolved.out_height // divisor}"
        made["resolvedInput"]["aspectRatio"] = asked.get("aspectRatio", shape)
    if made["resolvedSettings"]["priceCeiling"] is None:
        del made["resolvedSettings"]["priceCeiling"]
    if data.get("capacityFallback"):
        made["capacityFallback"] = data["capacityFallback"]
    return made


def from_decision(decision: KeptDecision) -> dict[str, Any]:
    """A recorded decision as one of a router's requests."""
    data = decision.data
    left = [f["model"] for f in data["filter"]]
    pipeline: list[dict[str, Any]] = []
    for name, codes in FILTERS:
        dropped = {f["model"] for f in data["filter"] if f["code"] in codes}
        left = [model for model in left if model not in dropped]
        pipeline.append({"type": "filter", "filter": name, "models": left})
    if data.get("capacityFallback"):
        pipeline.append({"type": "capacity", **data["capacityFallback"]})
    reason = data["reasonCode"]
    outcome = {
        "only_eligible_model": "single_candidate",
        "lowest_cost": "cost",
        "filter_order_fallback": "fallback",
    }
    pipeline.append({"type": "rank", "outcome": outcome.get(reason, "selected")})
    others = "; ".join(f"{f['model']}: {f['why']}" for f in data["filter"] if not f["kept"])
    return {
        "id": decision.id,
        "requestId": decision.id,
        "taskId": decision.job_id,
        "createdAt": iso(decision.at),
        "status": "routed",
        "model": decision.chosen,
        "provider": PROVIDER,
        "estimatedCredits": data["estimatedCost"],
        "reasonCode": reason,
        "reason": f"{decision.chosen}: {reason.replace('_', ' ')}." + (f" Not {others}" if others else ""),
        "emptiedBy": [],
        "pipeline": pipeline,
    }


def page_of(query: Mapping[str, str], most: int = 100) -> tuple[int, str | None]:
    """`limit` and `cursor` of a list request.

    Raises:
        BodyRefused: limit is missing or out of range.
    """
    given = query.get("limit")
    if given is None:
        raise BodyRefused([Issue(("limit",), f"is required, 1 to {most}.")])
    if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= most or len(given) > 9:
        raise BodyRefused(
            [Issue(("limit",), f"got {given[:40]!r}, expected a whole number from 1 to {most}.")]
        )
    return int(given), query.get("cursor") or None


def number_of(cursor: str | None) -> int | None:
    """A cursor that is a number of ours.

    Raises:
        BodyRefused: it is none.
    """
    if cursor is None:
        return None
    if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 18:
        raise BodyRefused([Issue(("cursor",), f"got {cursor[:40]!r}, expected the nextCursor of an answer.")])
    return int(cursor)
