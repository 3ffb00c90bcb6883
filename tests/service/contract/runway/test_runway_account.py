"""Organization, usage, routers and generate/*, through the newest SDK in strict mode."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import runwayml
from runway_house import House

from mutoscope.jobs import accounts, ledger
from mutoscope.jobs import router as routing
from mutoscope.server.dialects import runway_organization as organization
from mutoscope.server.dialects.runway_rules import BodyRefused, table

MADE: dict[str, Any] = {"model": "gen4.5", "prompt_text": "a ball", "ratio": "1280:720", "duration": 2}
TODAY = datetime.date(2026, 3, 31)
IMAGE = "https://example.com/a.png"


def test_the_organization_shows_credits_limits_and_the_day(house: House) -> None:
    client = house.client()
    assert client.organization.retrieve().credit_balance > 10**6, "the unlimited plan needs no credits"
    with house.db.write() as tx:
        accounts.change(tx, house.account.id, limits={"overdraft": False})
        ledger.grant(tx, house.account.id, 100)
    before = client.organization.retrieve()
    assert before.credit_balance == 100
    assert before.tier.models["gen4.5"].max_concurrent_generations is None
    assert before.usage.models["gen4.5"].daily_generations == 0
    made = client.text_to_video.create(**MADE)
    house.succeed(house.claim())
    after = client.organization.retrieve()
    assert before.credit_balance - after.credit_balance == made.estimated_cost.credits
    assert after.usage.models["gen4.5"].daily_generations == 1
    assert set(after.tier.models) == {m for models in table()["endpoints"].values() for m in models}


def test_usage_by_day(house: House) -> None:
    client = house.client()
    empty = client.organization.retrieve_usage()
    assert (empty.results, empty.models) == ([], [])
    first = client.text_to_video.create(**MADE)
    client.video_upscale.create(
        model="magnific_video_upscaler_creative", video_uri="https://example.com/a.mp4",
        extra_body={"model": "upscale_v1"},
    )  # fmt: skip
    failed = client.text_to_video.create(**MADE)
    jobs = [house.claim(), house.claim(), house.claim()]
    for job in jobs:
        if job.id != failed.id:
            house.succeed(job)
    today, days = datetime.date.today(), datetime.timedelta(days=2)
    used = client.organization.retrieve_usage(start_date=today - days, before_date=today + days)
    (day,) = used.results
    amounts = {u.model: u.amount for u in day.used_credits}
    assert used.models == ["gen4.5", "magnific_video_upscaler_creative"]
    assert amounts["gen4.5"] == first.estimated_cost.credits


@pytest.mark.parametrize(
    ("body", "start", "before"),
    [
        (None, "2026-03-01", "2026-03-31"),
        ({}, "2026-03-01", "2026-03-31"),
        ({"startDate": "2026-01-01"}, "2026-01-01", "2026-01-31"),
        ({"startDate": "2026-01-01", "beforeDate": "2026-04-01"}, "2026-01-01", "2026-04-01"),
    ],
)
def test_windows_of_usage(body: Any, start: str, before: str) -> None:
    got = organization.window(body, TODAY)
    assert [d.isoformat() for d in got] == [start, before]


@pytest.mark.parametrize(
    "body",
    [
        {"startDate": "2026-01-01", "beforeDate": "2026-04-02"},
        {"startDate": "2026-01-01", "beforeDate": "2026-01-01"},
        {"beforeDate": "2020-01-01"},
        {"startDate": "yesterday"},
        {"startDate": 7},
        {"from": "2026-01-01"},
        [],
    ],
)
def test_windows_that_are_refused(body: Any) -> None:
    with pytest.raises(BodyRefused):
        organization.window(body, TODAY)


def test_reported_names() -> None:
    assert organization.reported_as("gen4_aleph", "video") == "gen4_aleph"
    assert organization.reported_as("auto", "image") == "gen4_image"
    assert organization.reported_as("pocket", "video") == "gen4.5"


def test_a_router_through_its_life(house: House) -> None:
    client = house.client()
    made = client.routers.create(
        slug="production-video", settings={"optimize_for": "cost"}, description="ours"
    )
    assert (made.version, made.name, made.description) == (1, "production-video", "ours")
    assert client.routers.retrieve(made.id).to_dict() == made.to_dict()
    changed = client.routers.update(
        made.id, name="Production",
        settings={"models": {"mode": "allowlist_only", "ids": ["pocket"]}, "max_credits_per_generation": {"video": 90}},
    )  # fmt: skip
    assert (changed.version, changed.name, changed.description) == (2, "Production", "ours")
    assert changed.settings.optimize_for == "cost"
    assert changed.settings.models is not None
    assert changed.settings.models.ids == ["pocket"]
    again = client.routers.update(made.id, settings={"optimize_for": "latency"}, description=None)
    assert (again.version, again.description) == (3, None)
    assert again.settings.models == changed.settings.models
    uncapped: Any = {"max_credits_per_generation": {"video": None}}
    bare = client.routers.update(made.id, settings=uncapped)
    assert bare.settings.max_credits_per_generation is None
    assert client.routers.update(made.id, name="Same").version == 4
    client.routers.delete(made.id)
    for call in (client.routers.retrieve, client.routers.delete):
        with pytest.raises(runwayml.NotFoundError):
            call(made.id)


def test_lists_of_routers_have_pages(house: House) -> None:
    client = house.client()
    slugs = [f"r{i}" for i in range(5)]
    for slug in slugs:
        client.routers.create(slug=slug)
    first = client.routers.list(limit=2)
    assert ([r.slug for r in first.data], first.next_cursor) == (["r0", "r1"], "2")
    assert [r.slug for r in client.routers.list(limit=2)] == slugs
    for limit in (0, 101, -1):
        with pytest.raises(runwayml.BadRequestError, match="limit"):
            client.routers.list(limit=limit)
    with pytest.raises(runwayml.BadRequestError, match="cursor"):
        client.routers.list(limit=1, cursor="x")


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "slug"),
        ({"slug": "Has Blanks"}, "slug"),
        ({"slug": "a", "settings": {"optimizeFor": "speed"}}, "settings.optimizeFor"),
        ({"slug": "a", "settings": {"models": {"ids": ["pocket"]}}}, "settings.models.mode"),
        (
            {"slug": "a", "settings": {"models": {"mode": "allowlist_only", "ids": ["gpt"]}}},
            "settings.models.ids[0]",
        ),
        (
            {"slug": "a", "settings": {"maxCreditsPerGeneration": {"video": 0}}},
            "settings.maxCreditsPerGeneration.video",
        ),
        ({"slug": "a", "settings": {"fallback": {"onCapacity": "yes"}}}, "settings.fallback.onCapacity"),
        ({"slug": "a", "colour": "red"}, "colour"),
    ],
)
def test_routers_are_checked(house: House, body: dict[str, Any], where: str) -> None:
    with pytest.raises(runwayml.BadRequestError) as caught:
        house.client().post("/v1/routers", body=body, cast_to=object)
    assert where in str(caught.value.body)


def test_a_slug_is_taken_once(house: House) -> None:
    client = house.client()
    client.routers.create(slug="mine")
    with pytest.raises(runwayml.ConflictError):
        client.routers.create(slug="mine")


def test_generate_is_routed_and_the_decision_is_kept(house: House) -> None:
    client = house.client()
    router = client.routers.create(slug="mine", settings={"optimize_for": "quality",
                                                          "max_credits_per_generation": {"video": 5000}})  # fmt: skip
    made = client.generate.video.create(
        config_id="mine",
        input={"prompt_text": "a ball", "aspect_ratio": "16:9", "resolution": "720p", "duration": 2,
               "reference_images": [{"uri": IMAGE, "role": "first"}]},
    )  # fmt: skip
    assert (made.routing.model, made.routing.config_id, made.routing.provider) == (
        "pocket",
        "mine",
        "mutoscope",
    )
    assert (made.routing.resolved_input.ratio, made.routing.resolved_input.resolution) == ("1280:720", "720p")
    assert made.routing.resolved_settings.price_ceiling == 5000
    assert made.routing.estimated_cost.credits == house.job(made.id).cost
    task: Any = client.tasks.retrieve(made.id)
    assert (task.status, task.model) == ("PENDING", "pocket")
    picture = client.generate.image.create(config_id="mine", input={"prompt_text": "a ball"})
    assert picture.routing.resolved_settings.price_ceiling is None
    newest, oldest = client.routers.list_requests(router.id, limit=10).data
    assert (newest.task_id, oldest.task_id) == (picture.id, made.id)
    assert (oldest.status, oldest.model, oldest.reason_code) == ("routed", "pocket", "only_eligible_model")
    assert [step.type for step in oldest.pipeline] == ["filter", "filter", "filter", "rank"]
    pages = client.routers.list_requests(router.id, limit=1)
    assert [r.task_id for r in pages] == [picture.id, made.id]
    house.succeed(house.claim())
    house.succeed(house.claim())
    assert {client.tasks.retrieve(t).status for t in (made.id, picture.id)} == {"SUCCEEDED"}


def test_generate_without_a_router_or_a_model(house: House) -> None:
    client = house.client()
    with pytest.raises(runwayml.NotFoundError, match="nobody"):
        client.generate.video.create(config_id="nobody", input={"prompt_text": "a"})
    client.routers.create(slug="none", settings={"models": {"mode": "allowlist_only", "ids": []}})
    with pytest.raises(runwayml.BadRequestError, match="the router leaves it out"):
        client.generate.video.create(config_id="none", input={"prompt_text": "a"})
    client.routers.create(slug="poor", settings={"max_credits_per_generation": {"video": 1}})
    with pytest.raises(runwayml.BadRequestError, match="at most 1"):
        client.generate.video.create(config_id="poor", input={"prompt_text": "a", "duration": 2})


def test_runways_names_in_a_router(house: House) -> None:
    client = house.client()
    made = client.routers.create(
        slug="theirs", settings={"models": {"mode": "allowlist_only", "ids": ["gen4.5"]}}
    )
    assert made.settings.models is not None
    assert made.settings.models.ids == ["gen4.5"]  # as it was given; every model of ours may answer to it
    client.generate.video.create(config_id="theirs", input={"prompt_text": "a ball", "duration": 2})


def test_a_router_that_was_made_elsewhere_is_shown(house: House) -> None:
    rules = routing.Rules(optimize_for="latency", ids=("slow",), max_credits={"video": 9})
    with house.db.write() as tx:
        routing.create(tx, house.account.id, slug="own", name="Own", rules=rules)
    (shown,) = house.client().routers.list(limit=5).data
    assert (shown.settings.optimize_for, shown.version) == ("latency", 1)
    assert shown.settings.max_credits_per_generation is not None
    assert shown.settings.max_credits_per_generation.video == 9
