"""Field rules of Runway's models: what is taken, what is refused, and that each refusal says why."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.server.dialects import runway_spec
from mutoscope.server.dialects.runway_rules import BodyRefused, Hosts, Rule, table, url_problem, utf16_units
from mutoscope.server.dialects.runway_spec import File, parse, to_spec

HTTPS_ONLY = Hosts()
IMAGE = "https://example.com/a.png"
CLIP = "https://example.com/a.mp4"
PAIRS = [(e, m) for e, models in table()["endpoints"].items() for m in models]


def simplest(rule: Rule) -> Any:
    """A value that keeps to a rule."""
    if "any" in rule:
        return simplest(rule["any"][0])
    if "enum" in rule:
        return rule["enum"][0]
    if "int" in rule or "number" in rule:
        low, _ = rule["int"] if "int" in rule else rule["number"]
        return 5 if low is None else low
    if "text" in rule:
        return "abc"
    if "media" in rule:
        return CLIP if rule["media"] == "video" else IMAGE
    if "list" in rule:
        return [simplest(rule["list"])]
    if "object" in rule:
        return {name: simplest(rule["object"][name]) for name in rule["required"]}
    return True


def smallest_body(endpoint: str, model: str) -> dict[str, Any]:
    rules = table()["endpoints"][endpoint][model]
    body = {name: simplest(rules["fields"][name]) for name in rules["required"]}
    if "promptText" in rules["fields"]:
        body["promptText"] = "a red ball"
    return {"model": model, **body}


def spec_of(endpoint: str, body: dict[str, Any], seconds: float | None = None) -> JobSpec:
    _, found = parse(endpoint, body, HTTPS_ONLY)
    return to_spec(endpoint, body, {f.uri: File(Media(url=f.uri), seconds) for f in found})


def issues_of(endpoint: str, body: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(BodyRefused) as caught:
        spec_of(endpoint, body)
    return {i.name: i.message for i in caught.value.issues}


@pytest.mark.parametrize(("endpoint", "model"), PAIRS)
def test_every_model_takes_its_smallest_body(endpoint: str, model: str) -> None:
    body = smallest_body(endpoint, model)
    if model == "recraft_v4_1_vector":
        assert "vector" in issues_of(endpoint, body)["model"]
        return
    spec = spec_of(endpoint, body)
    assert spec.model == model
    assert (spec.operation == "image") == (endpoint == "text_to_image")


@pytest.mark.parametrize(("endpoint", "model"), PAIRS)
def test_every_required_field_is_missed(endpoint: str, model: str) -> None:
    whole = smallest_body(endpoint, model)
    for name in table()["endpoints"][endpoint][model]["required"]:
        for body in ({k: v for k, v in whole.items() if k != name}, {**whole, name: None}):
            assert issues_of(endpoint, body)[name] == "is required."


@pytest.mark.parametrize(("endpoint", "model"), PAIRS)
def test_nothing_unknown_is_ignored(endpoint: str, model: str) -> None:
    assert "is not a field here" in issues_of(endpoint, {**smallest_body(endpoint, model), "sead": 1})["sead"]


def test_all_issues_are_named_at_once() -> None:
    body = {"model": "gen4.5", "promptText": "", "duration": 11, "ratio": "1:1", "seed": -1, "size": 3}
    assert set(issues_of("text_to_video", body)) == {"promptText", "duration", "ratio", "seed", "size"}


@pytest.mark.parametrize(
    ("field", "value", "ok"),
    [
        ("promptText", "x" * 1000, True),
        ("promptText", "x" * 1001, False),
        ("promptText", "😀" * 500, True),
        ("promptText", "😀" * 501, False),
        ("promptText", "", False),
        ("promptText", 7, False),
        ("promptText", "half \ud83d", False),
        ("duration", 2, True),
        ("duration", 10, True),
        ("duration", 5.0, True),
        ("duration", 5.5, False),
        ("duration", 1, False),
        ("duration", 11, False),
        ("duration", "5", False),
        ("duration", True, False),
        ("ratio", "720:1280", True),
        ("ratio", "960:960", False),
        ("seed", 0, True),
        ("seed", 4294967295, True),
        ("seed", 4294967296, False),
        ("seed", -1, False),
        ("seed", None, False),
        ("contentModeration", {"publicFigureThreshold": "low"}, True),
        ("contentModeration", {"publicFigureThreshold": "high"}, False),
        ("contentModeration", {"threshold": "low"}, False),
        ("contentModeration", "low", False),
        ("outputFormat", "prores", True),
        ("outputFormat", "hdr10", True),
        ("outputFormat", "hdr_prores", True),
        ("outputFormat", "sdr_rec709_10bit", False),
        ("outputFormat", "avi", False),
        ("proresProfile", "422", False),  # without outputFormat prores
    ],
)
def test_ranges_of_gen4_5(field: str, value: Any, ok: bool) -> None:
    body = {"model": "gen4.5", "promptText": "a ball", "duration": 5, "ratio": "1280:720", field: value}
    if ok:
        spec_of("text_to_video", body)
    else:
        (issue,) = issues_of("text_to_video", body).items()
        assert issue[0].split(".")[0] == field
        assert len(issue[1]) > 5


def test_length_is_counted_as_javascript_does() -> None:
    assert [utf16_units(t) for t in ("", "ä", "😀", "a\ud800")] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("model", "places", "ok"),
    [
        ("gen4.5", ["first"], True),
        ("gen4.5", ["last"], False),
        ("gen4.5", ["first", "first"], False),
        ("gen4.5", [None], False),
        ("gen4.5", [], False),
        ("gen4_turbo", ["last"], False),
        ("gen3a_turbo", ["first", "last"], True),
        ("gen3a_turbo", ["last"], True),
        ("veo3.1", ["first", "last"], True),
        ("veo3", ["last"], False),
        ("kling3.0_pro", ["first", "last"], True),
        ("h3_max", ["last"], False),
        ("seedance2", [None, None], True),
        ("seedance2", ["first", None], False),
        ("wan3", ["first", "last"], True),
        ("wan3", [None], True),
    ],
)
def test_positions_of_prompt_images(model: str, places: list[str | None], ok: bool) -> None:
    body = smallest_body("image_to_video", model)
    body["promptImage"] = [
        {"uri": f"https://example.com/{i}.png", **({"position": p} if p else {})}
        for i, p in enumerate(places)
    ]
    if not ok:
        assert all(name.startswith("promptImage") for name in issues_of("image_to_video", body))
        return
    spec = spec_of("image_to_video", body)
    assert [k.at for k in spec.keyframes] == [{"first": 0.0, "last": 1.0}[p] for p in places if p]
    assert len(spec.references) == places.count(None)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://example.com/a.png", ""),
        ("https://example.com:8443/a.png?x=1#y", ""),
        ("https://bücher.example/a.png", ""),
        ("http://example.com/a.png", "Only HTTPS URLs are allowed."),
        ("ftp://example.com/a.png", "Only HTTPS URLs are allowed."),
        ("file:///etc/passwd", "Only HTTPS URLs are allowed."),
        ("https://127.0.0.1/a.png", "URLs must be hosted on a domain."),
        ("https://[::1]/a.png", "URLs must be hosted on a domain."),
        ("https://2130706433/a.png", "URLs must be hosted on a domain."),
        ("https://0x7f.1/a.png", "URLs must be hosted on a domain."),
        ("https://1.2.3.4.5/a.png", "URLs must be hosted on a domain."),
        ("https://localhost/a.png", "URLs must be hosted on a domain."),
        ("https://user:pass@example.com/a.png", "Invalid URL"),
        ("https:///a.png", "Invalid URL"),
        ("https://exa mple.com/", "Invalid URL"),
        ("https://example.com\\@127.0.0.1/", "Invalid URL"),
        ("https://[::1/a.png", "Invalid URL"),
        ("https://example.com:99999/", "Invalid URL"),
        ("a.png", "Invalid URL"),
        ("https://example.com/" + "a" * 2028, ""),
        ("https://example.com/" + "a" * 2029, "Invalid URL It has 2049 characters, at most 2048 are taken."),
    ],
)
def test_urls(url: str, problem: str) -> None:
    assert url_problem(url, HTTPS_ONLY) == problem


def test_settings_can_allow_more_urls() -> None:
    assert url_problem("http://127.0.0.1:9/a.png", Hosts(http=True, names=("127.0.0.1",))) == ""


@pytest.mark.parametrize("uri", ["runway://", "runway://a/b", "runway://../x", "runway://" + "a" * 65])
def test_upload_uris_have_one_form(uri: str) -> None:
    body = {"model": "gen4_turbo", "promptImage": uri, "ratio": "1280:720"}
    assert "POST /v1/uploads" in issues_of("image_to_video", body)["promptImage"]


def test_a_model_of_another_endpoint_is_named() -> None:
    assert "image_to_video" in issues_of("text_to_video", {"model": "gen4_turbo"})["model"]
    assert "is required" in issues_of("text_to_video", {})["model"]
    with pytest.raises(BodyRefused, match="expected a JSON object"):
        parse("text_to_video", ["gen4.5"], HTTPS_ONLY)


def strategy(rule: Rule) -> st.SearchStrategy[Any]:
    """Anything that keeps to a rule."""
    if "any" in rule:
        return st.one_of([strategy(r) for r in rule["any"]])
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    if "int" in rule:
        low, high = rule["int"]
        return st.integers(0 if low is None else low, 60 if high is None else high)
    if "number" in rule:
        low, high = rule["number"]
        return st.floats(0 if low is None else low, 60 if high is None else high, allow_nan=False)
    if "text" in rule:
        return st.sampled_from(["abc", "red_ball", "abd"])
    if "media" in rule:
        return st.sampled_from([f"https://example.com/{name}.{rule['media']}" for name in "ab"])
    if "list" in rule:
        return st.lists(strategy(rule["list"]), max_size=min(rule.get("most") or 3, 3))
    if "object" in rule:
        return members(rule["object"], rule["required"])
    return st.booleans()


def members(fields: Rule, required: list[str]) -> st.SearchStrategy[Any]:
    optional = {k: strategy(v) for k, v in fields.items() if k not in required}
    return st.fixed_dictionaries({k: strategy(fields[k]) for k in required}, optional=optional)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.data())
def test_a_body_within_the_rules_is_a_job_or_a_refusal_with_a_reason(data: st.DataObject) -> None:
    endpoint, model = data.draw(st.sampled_from(PAIRS))
    rules = table()["endpoints"][endpoint][model]
    body = {"model": model, **data.draw(members(rules["fields"], rules["required"]))}
    try:
        spec = spec_of(endpoint, body, data.draw(st.sampled_from([None, 5.0])))
    except BodyRefused as e:
        refused = e.issues
    else:
        refused = None
    if refused is not None:
        assert all(len(i.message) > 5 for i in refused)
    else:
        assert spec.operation in ("video", "image", "upscale", "reframe_rate", "hdr")
        assert JobSpec.model_validate(spec.dump()) == spec
        if "seed" in body:
            assert spec.seed == body["seed"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_the_routers_input_is_a_job_or_a_refusal_with_a_reason(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["video", "image"]))
    rules = table()["generate"][kind]
    body = {"configId": "mine", "input": data.draw(members(rules["fields"], rules["required"]))}
    try:
        slug, found = runway_spec.parse_generate(kind, body, HTTPS_ONLY)
        spec = runway_spec.to_generate_spec(kind, body, {f.uri: File(Media(url=f.uri)) for f in found})
    except BodyRefused as e:
        refused = e.issues
    else:
        refused = None
    if refused is not None:
        assert all(len(i.message) > 5 for i in refused)
    else:
        assert slug == "mine"
        assert spec.model == "auto"
        assert spec.operation == kind


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_junk_in_any_field_is_refused_and_nothing_else(data: st.DataObject) -> None:
    endpoint, model = data.draw(st.sampled_from(PAIRS))
    fields = table()["endpoints"][endpoint][model]["fields"]
    body = {**smallest_body(endpoint, model), data.draw(st.sampled_from(sorted(fields))): data.draw(junk)}
    with contextlib.suppress(BodyRefused):
        parse(endpoint, body, HTTPS_ONLY)
