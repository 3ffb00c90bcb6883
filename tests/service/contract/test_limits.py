"""What every vendor's client gets at the limits of its plan: it waits, or is told when to come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.model import State
from mutoscope.jobs.schema import accounts as accounts_table
from tests.service.contract.runway.runway_house import House


@dataclass(frozen=True)
class Vendor:
    """How a dialect makes a video, shows it, and says that something went wrong."""

    create: str
    body: dict[str, Any]
    show: str
    word: str  # the field of the state
    waits: str  # and what it says of a throttled job
    poor: int  # status of too few credits
    sentence: Callable[[Any], str]


VENDORS = {
    "runway": Vendor("/v1/text_to_video",
                     {"model": "gen4.5", "promptText": "a ball", "ratio": "1280:720", "duration": 2},
                     "/v1/tasks/{}", "status", "THROTTLED", 400, lambda body: body["error"]),
    "luma": Vendor("/dream-machine/v1/generations", {"model": "ray-2", "prompt": "a ball"},
                   "/dream-machine/v1/generations/{}", "state", "queued", 402, lambda body: body["detail"]),
    "luma_agents": Vendor("/agents/v1/generations", {"type": "video", "prompt": "a ball"},
                          "/agents/v1/generations/{}", "state", "queued", 402, lambda body: body["detail"]),
    "openai": Vendor("/openai/v1/videos", {"prompt": "a ball"}, "/openai/v1/videos/{}", "status", "queued", 429,
                     lambda body: body["error"]["message"]),
    "api": Vendor("/api/v1/jobs", {"prompt": "a ball"}, "/api/v1/jobs/{}", "state", "throttled", 402,
                  lambda body: body["error"]["message"]),
}  # fmt: skip


@pytest.mark.parametrize("name", VENDORS)
def test_the_limits_of_a_plan(tmp_path: Path, name: str) -> None:
    house, vendor = House(tmp_path), VENDORS[name]

    def create() -> httpx.Response:
        return house.http.post(vendor.create, json=vendor.body, headers=headers)

    with house.http:
        headers = {"authorization": f"Bearer {house.key}", "x-runway-version": "2024-11-06"}
        with house.db.write() as tx:
            accounts.change(tx, house.account.id, limits={"concurrency": 1, "daily_jobs": 2})
        ids = [create().json()["id"] for _ in range(2)]
        assert house.job(ids[1]).state is State.THROTTLED
        assert house.http.get(vendor.show.format(ids[1]), headers=headers).json()[vendor.word] == vendor.waits
        house.succeed(house.claim())
        assert house.job(ids[1]).state is State.QUEUED, "first come, first served"
        many = create()
        assert many.status_code == 429
        assert 60 < int(many.headers["retry-after"]) <= 24 * 3600
        assert many.headers["x-should-retry"] == "false", "SDKs wait no longer than a minute"
        assert "24 hours" in vendor.sentence(many.json())
        with house.db.write() as tx:
            accounts.change(tx, house.account.id, limits={"overdraft": False})
            tx.run(sa.update(accounts_table).values(balance=0))
        poor = create()
        assert poor.status_code == vendor.poor
        assert poor.headers.get("x-should-retry", "false") == "false"
        assert "credits" in vendor.sentence(poor.json())
        with house.db.read() as tx:
            assert [job.id for job in queue.listing(tx, house.account.id).jobs] == ids[::-1]
    house.db.close()
