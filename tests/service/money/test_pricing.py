"""The price list: the numbers of the product that it follows, and how a job's price comes from it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from mutoscope.errors import FileError
from mutoscope.jobs import plans
from mutoscope.jobs.pricing import TABLES, TIERS, Prices, table_of
from mutoscope.jobs.resolve import resolve
from mutoscope.jobs.spec import JobSpec
from tests.service.making import make_model, resolved

SHIPPED = Path(plans.__file__).parent / "prices.toml"
DOC = Path(__file__).parents[3] / "docs" / "credits.md"
CLIP = {"job": "00000000-0000-0000-0000-000000000000"}


def price(spec: dict[str, Any], factor: float = 1.0, **numbers: Any) -> int:
    return Prices.load().price(JobSpec(**spec), resolved(**numbers), factor)


FIVE_SECONDS = {"frames": 81, "fps": 16.0}


@pytest.mark.parametrize(
    ("tier", "spec", "credits"),
    [
        ("draft", {"prompt": "x"}, 4),
        ("1080p", {"prompt": "x"}, 80),
        ("draft", {"prompt": "x", "source": CLIP}, 12),
        ("1080p", {"prompt": "x", "source": CLIP}, 192),
        ("1080p", {"prompt": "x", "control": CLIP}, 192),
        ("1080p", {"prompt": "x", "extend_start": CLIP}, 80),
        ("draft", {"prompt": "x", "hdr": True}, 16),
        ("1080p", {"prompt": "x", "hdr": True}, 320),
        ("draft", {"prompt": "x", "source": CLIP, "hdr": True}, 48),
        ("1080p", {"prompt": "x", "source": CLIP, "hdr": True}, 768),
    ],
)
def test_the_published_numbers(tier: str, spec: dict[str, Any], credits: int) -> None:
    """Draft 4, 1080p 80; video to video 12 and 192; HDR four times as much, up to 768."""
    assert price(spec, tier=tier, **FIVE_SECONDS) == credits


def test_the_other_published_numbers() -> None:
    prices = Prices.load()
    assert prices.other == {"background_removal": 1}
    paid = {name: plan for name, plan in plans.PLANS.items() if plan.usd_per_month}
    assert {name: plan.usd_per_month for name, plan in paid.items()} == {"plus": 30, "pro": 90, "ultra": 300}
    assert {name: plan.multiplier for name, plan in paid.items()} == {"plus": 1, "pro": 4, "ultra": 15}
    assert {name: plan.usd_per_year for name, plan in paid.items()} == {
        "plus": 288,
        "pro": 864,
        "ultra": 2880,
    }
    for plan in paid.values():
        assert plan.credits_per_month == plan.multiplier * plans.BASE_CREDITS
    assert [n for n, p in plans.PLANS.items() if not p.commercial] == ["free"]
    assert [n for n, p in plans.PLANS.items() if not p.agents] == ["free", "plus"]


def test_every_table_rises_with_the_size() -> None:
    prices = Prices.load()
    for name in TABLES:
        row = [prices.tables[name][tier] for tier in TIERS]
        assert row == sorted(row), name


def test_the_file_says_which_numbers_are_whose() -> None:
    marked = re.findall(r"^(\w+) = (\S+) +# seed", SHIPPED.read_text("utf-8"), re.MULTILINE)
    assert marked == [
        ("hdr_factor", "4"), ("draft", "4"), ("1080p", "80"), ("draft", "12"), ("1080p", "192"),
        ("background_removal", "1"),
    ]  # fmt: skip


def test_the_page_shows_the_list() -> None:
    """docs/credits.md has the numbers of the shipped list and of the plans."""
    text, prices = DOC.read_text("utf-8"), Prices.load()
    for name in TABLES:
        row = " | ".join(str(prices.tables[name][tier]) for tier in TIERS)
        assert f"| `{name}` | {row} |" in text
    for plan in plans.PLANS.values():
        assert f"| `{plan.name}` | {plan.usd_per_month:g} | {plan.credits_per_month:,} |" in text


@pytest.mark.parametrize(
    ("frames", "fps", "blocks"),
    [(1, 16.0, 1), (17, 8.0, 1), (41, 8.0, 1), (81, 16.0, 1), (82, 16.0, 2), (161, 16.0, 2), (145, 16.0, 2)],
)
def test_begun_blocks_of_five_seconds_count_whole(frames: int, fps: float, blocks: int) -> None:
    assert price({"prompt": "x"}, tier="draft", frames=frames, fps=fps) == 4 * blocks


def test_a_models_factor_and_rounding() -> None:
    assert price({"prompt": "x"}, 0.5, tier="draft") == 2
    assert price({"prompt": "x"}, 0.3, tier="draft") == 2  # 1.2: never less than it costs
    assert price({"prompt": "x"}, 0.0, tier="1080p") == 0
    assert price({"prompt": "x"}, 1.1, tier="540p") == 22  # and not 23 for 22.000000000000004


@pytest.mark.parametrize("operation", ["image", "upscale", "reframe_rate", "hdr"])
def test_other_operations_have_tables_of_their_own(operation: str) -> None:
    spec = {"operation": operation, "prompt": "x"} | ({} if operation == "image" else {"source": CLIP})
    assert table_of(JobSpec(**spec)) == operation
    assert price(spec, tier="1080p", **FIVE_SECONDS) == Prices.load().tables[operation]["1080p"]


@pytest.mark.parametrize(
    ("asked", "tier"),
    [
        ({"quality": "draft", "resolution": "1080p"}, "draft"),
        ({"resolution": "540p"}, "540p"),
        ({"width": 1280, "height": 720}, "720p"),
        ({"width": 720, "height": 1280}, "720p"),
        ({"width": 1282, "height": 722}, "1080p"),
        ({"width": 4096, "height": 4096}, "4k"),
        ({}, "360p"),  # the model's own size
    ],
)
def test_the_tier_is_that_of_the_delivered_file(asked: dict[str, Any], tier: str) -> None:
    assert resolve(JobSpec(prompt="x", **asked), make_model()).tier == tier


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(SHIPPED.read_text("utf-8").replace("draft = 4 ", "draft = 5 "))
    assert Prices.load(path).price(JobSpec(prompt="x"), resolved(tier="draft")) == 5
    assert Prices.load(path).usd(250) == 2.5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[image]", "[picture]", "image, picture: unknown or missing"),
        ("540p = 20", "540p = 20.5", "whole number"),
        ("540p = 20", "540p = true", "whole number"),
        ("540p = 20\n", "", "expected a whole number for each of draft"),
        ("hdr_factor = 4", "hdr_factor = 0", "above 0"),
        ("hdr_factor = 4", "hdr_factor = ", "not a readable TOML"),
    ],
)
def test_a_list_that_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(SHIPPED.read_text("utf-8").replace(old, new, 1))
    with pytest.raises(FileError, match=said):
        Prices.load(path)


def test_plans_are_data() -> None:
    """`limits` of an account can override what the page says they can."""
    known = {field.name for field in dataclasses.fields(plans.Plan)}
    assert set(plans.OVERRIDES) <= known
