"""Which fields Runway's models take at which endpoint, and whether a body keeps to them. Pure.

The facts are in runway_models.json, made by scripts/make_runway_models.py from the types of the official SDKs. Every
issue of a body is found at once, and each names its path, as Runway's own answers do.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.spec import MAX_PROMPT
from mutoscope.manifest import suggest

Rule = Mapping[str, Any]
Path = tuple[str | int, ...]

MAX_URL = 2048
MAX_LIST = 64
"""Longest list where Runway states no limit."""

MAX_SAFE = 2**53 - 1
"""Largest whole number of JSON that every reader understands."""

INVALID_URL = "Invalid URL"
ONLY_HTTPS = "Only HTTPS URLs are allowed."
NOT_A_DOMAIN = "URLs must be hosted on a domain."
SCHEME = "runway://"


@dataclass(frozen=True)
class Issue:
    """What is wrong with one place of a body."""

    path: Path
    message: str

    @property
    def name(self) -> str:
        """promptImage[0].uri"""
        return dotted(self.path)


@dataclass(frozen=True)
class Found:
    """A picture or clip that a body names."""

    path: Path
    kind: str  # "image", "video", "audio"
    uri: str


@dataclass(frozen=True)
class Hosts:
    """What the service's settings allow beyond Runway's rules for URLs."""

    http: bool = False
    names: Collection[str] = ()  # hosts that need not be domains


class BodyRefused(InvalidRequest):
    """A body that breaks rules, or asks for what cannot be done here; all of it at once."""

    def __init__(self, issues: list[Issue], *, hint: str = "") -> None:
        super().__init__(
            " ".join(f"{i.name or 'body'}: {i.message}" for i in issues), field=issues[0].name, hint=hint
        )
        self.issues = issues


@cache
def table() -> dict[str, Any]:
    """runway_models.json"""
    text = resources.files(__package__).joinpath("runway_models.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def rules_of(endpoint: str, model: str) -> Rule:
    """Fields and required fields of a model at an endpoint."""
    rules: Rule = table()["endpoints"][endpoint][model]
    return rules


def model_of(endpoint: str, body: Any) -> str:
    """The model that a body names.

    Raises:
        BodyRefused: the body is no object, or names no model that this endpoint has.
    """
    if not isinstance(body, dict):
        raise BodyRefused([Issue((), f"got {_show(body)}, expected a JSON object.")])
    known = table()["endpoints"][endpoint]
    model = body.get("model")
    if model is None:
        raise BodyRefused([Issue(("model",), f"is required; {endpoint} has {', '.join(known)}.")])
    if not isinstance(model, str) or model not in known:
        elsewhere = [
            e for e, models in table()["endpoints"].items() if isinstance(model, str) and model in models
        ]
        more = f" It belongs to {', '.join(elsewhere)}." if elsewhere else ""
        expected = f"expected one of {', '.join(known)}"
        raise BodyRefused(
            [Issue(("model",), f"got {_show(model)}, {expected}.{more}")], hint=suggest(str(model), known)
        )
    return model


def check(
    rules: Rule, body: Mapping[str, Any], hosts: Hosts, *, at: Path = ()
) -> tuple[list[Issue], list[Found]]:
    """The issues of an object against its rules, and the media that it names."""
    found: list[Found] = []
    issues = list(_fields(rules["fields"], rules["required"], body, at, hosts, found))
    return issues, found


def url_problem(url: str, hosts: Hosts) -> str:
    """What keeps a URL from being fetched, in Runway's words; empty: nothing."""
    if len(url) > MAX_URL:
        return f"{INVALID_URL} It has {len(url)} characters, at most {MAX_URL} are taken."
    if re.search(r"[\x00-\x20\x7f\\]", url):
        return INVALID_URL
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return INVALID_URL
    if parts.scheme not in ("http", "https"):
        return ONLY_HTTPS if parts.scheme and "//" in url else INVALID_URL
    if parts.scheme == "http" and not hosts.http:
        return ONLY_HTTPS
    if not host or port == 0 or parts.username is not None or parts.password is not None:
        return INVALID_URL
    if host in hosts.names:
        return ""
    return NOT_A_DOMAIN if not _is_domain(host) else ""


def dotted(path: Path) -> str:
    """("promptImage", 0, "uri") to promptImage[0].uri"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def utf16_units(text: str) -> int:
    """Length as JavaScript counts it."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _is_domain(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return False
    try:
        labels = host.rstrip(".").encode("idna").decode("ascii").split(".")
    except UnicodeError:
        return False
    last_is_a_number = (
        re.fullmatch(r"\d+|0[xX][0-9a-fA-F]*", labels[-1]) is not None
    )  # an address in disguise
    named = all(re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?", label) for label in labels)
    return len(labels) >= 2 and named and not last_is_a_number


def _fields(
    fields: Rule,
    required: Collection[str],
    value: Mapping[str, Any],
    at: Path,
    hosts: Hosts,
    found: list[Found],
) -> Iterator[Issue]:
    for name in required:
        if value.get(name) is None:
            yield Issue((*at, name), "is required.")
    for name, given in value.items():
        if name not in fields:
            near = suggest(name, fields)
            yield Issue(
                (*at, name), f"is not a field here; known: {', '.join(fields)}.{' ' + near if near else ''}"
            )
        elif given is not None:
            yield from _check(fields[name], given, (*at, name), hosts, found)
        elif name not in required:
            yield Issue((*at, name), "got null; leave it out, or give a value.")


def _check(rule: Rule, value: Any, at: Path, hosts: Hosts, found: list[Found]) -> Iterator[Issue]:
    if "any" in rule:
        yield from _any(rule["any"], value, at, hosts, found)
    elif "enum" in rule:
        same = [c for c in rule["enum"] if c == value and isinstance(c, bool) == isinstance(value, bool)]
        if not same:
            yield Issue(at, f"got {_show(value)}, expected {_one_of(rule['enum'])}.")
    elif "bool" in rule:
        if not isinstance(value, bool):
            yield Issue(at, f"got {_show(value)}, expected true or false.")
    elif "int" in rule or "number" in rule:
        yield from _number(rule, value, at)
    elif "text" in rule:
        yield from _text(rule, value, at)
    elif "media" in rule:
        yield from _media(rule["media"], value, at, hosts, found)
    elif "list" in rule:
        yield from _list(rule, value, at, hosts, found)
    elif not isinstance(value, dict):
        yield Issue(at, f"got {_show(value)}, expected an object with {', '.join(rule['object'])}.")
    else:
        yield from _fields(rule["object"], rule["required"], value, at, hosts, found)


def _any(rules: list[Rule], value: Any, at: Path, hosts: Hosts, found: list[Found]) -> Iterator[Issue]:
    """The alternative that fits best speaks."""
    best: tuple[int, list[Issue], list[Found]] | None = None
    for rule in rules:
        seen: list[Found] = []
        issues = list(_check(rule, value, at, hosts, seen))
        distance = sum(100 if i.path == at else 1 for i in issues)
        if best is None or distance < best[0]:
            best = (distance, issues, seen)
    assert best is not None
    _, issues, seen = best
    found += seen
    if len(issues) == 1 and issues[0].path == at and len(rules) > 1 and not isinstance(value, str):
        yield Issue(at, f"got {_show(value)}, expected {' or '.join(_describe(r) for r in rules)}.")
    else:
        yield from issues


def _number(rule: Rule, value: Any, at: Path) -> Iterator[Issue]:
    whole = "int" in rule
    low, high = rule["int"] if whole else rule["number"]
    ok = isinstance(value, int | float) and not isinstance(value, bool) and -MAX_SAFE <= value <= MAX_SAFE
    if ok and whole:
        ok = float(value).is_integer() if isinstance(value, float) else True
    if ok:
        ok = (low is None or value >= low) and (high is None or value <= high)
    if not ok:
        yield Issue(at, f"got {_show(value)}, expected {_describe(rule)}.")


def _text(rule: Rule, value: Any, at: Path) -> Iterator[Issue]:
    if not isinstance(value, str):
        yield Issue(at, f"got {_show(value)}, expected a string.")
        return
    low, high = rule["text"]
    units = utf16_units(value)
    most = MAX_PROMPT if high is None else min(high, MAX_PROMPT)
    if re.search(r"[\ud800-\udfff]", value):
        yield Issue(at, "holds half of a surrogate pair, expected Unicode text.")
    elif units < low:
        yield Issue(at, "is empty." if low == 1 else f"has {units} characters, at least {low} expected.")
    elif units > most:
        yield Issue(at, f"has {units} characters (UTF-16 code units), at most {most} expected.")
    elif "pattern" in rule and not re.fullmatch(rule["pattern"], value):
        yield Issue(at, f"got {_show(value)}, expected a letter, then letters, digits and underscores.")


def _media(kind: str, value: Any, at: Path, hosts: Hosts, found: list[Found]) -> Iterator[Issue]:
    if not isinstance(value, str) or not value:
        yield Issue(at, f"got {_show(value)}, expected an HTTPS URL, a data URI or a {SCHEME} URI.")
        return
    if (
        value[:5].lower() != "data:"
        and not value.startswith(SCHEME)
        and (problem := url_problem(value, hosts))
    ):
        yield Issue(at, problem)
        return
    if value.startswith(SCHEME) and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value[len(SCHEME) :]):
        yield Issue(at, f"got {_show(value)}, expected the URI that POST /v1/uploads gave.")
        return
    found.append(Found(at, kind, value))


def _list(rule: Rule, value: Any, at: Path, hosts: Hosts, found: list[Found]) -> Iterator[Issue]:
    if not isinstance(value, list):
        yield Issue(at, f"got {_show(value)}, expected {_describe(rule)}.")
        return
    most = rule.get("most") or MAX_LIST
    if len(value) > most:
        yield Issue(at, f"has {len(value)} entries, at most {most} expected.")
        return
    for i, entry in enumerate(value):
        yield from _check(rule["list"], entry, (*at, i), hosts, found)


def _describe(rule: Rule) -> str:
    if "enum" in rule:
        return _one_of(rule["enum"])
    if "int" in rule or "number" in rule:
        low, high = rule["int"] if "int" in rule else rule["number"]
        kind = "a whole number" if "int" in rule else "a number"
        if low is None:
            return kind
        return f"{kind} of at least {low}" if high is None else f"{kind} from {low} to {high}"
    if "list" in rule:
        return "an array"
    if "object" in rule:
        return f"an object with {', '.join(rule['object'])}"
    if "media" in rule:
        return f"an HTTPS URL, a data URI or a {SCHEME} URI of {_article(rule['media'])}"
    return "a string"


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "ai" else f"a {kind}"


def _one_of(choices: list[Any]) -> str:
    return _show(choices[0]) if len(choices) == 1 else "one of " + ", ".join(str(c) for c in choices)


def _show(value: Any) -> str:
    """A value as it was sent, shortened."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
