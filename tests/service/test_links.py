"""Links to finished files: whoever holds one may read that one file, in parts too, until it expires."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.contract.runway.runway_house import House
from tests.service.databases import Clock


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, url_ttl_s=3600)
    with made.http:
        yield made
    made.db.close()


def finished(house: House) -> tuple[str, httpx.URL]:
    """A job and the link to its file."""
    headers = {"authorization": f"Bearer {house.key}"}
    made = house.http.post("/api/v1/jobs", json={"prompt": "a ball"}, headers=headers).json()
    house.succeed(house.claim())
    shown = house.http.get(f"/api/v1/jobs/{made['id']}", headers=headers).json()
    return made["id"], httpx.URL(shown["outputs"][0]["url"])


def test_a_link_needs_no_key_and_takes_ranges(house: House) -> None:
    _, link = finished(house)
    whole = house.http.get(str(link))
    assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp4")
    assert whole.headers["accept-ranges"] == "bytes"
    head = house.http.head(str(link))
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)
    for asked, (first, last) in {
        "bytes=0-9": (0, 9),
        "bytes=-5": (-5, None),
        "bytes=100-": (100, None),
    }.items():
        part = house.http.get(str(link), headers={"range": asked})
        assert part.status_code == 206
        assert part.content == whole.content[first : last + 1 if last is not None else None]
    beyond = house.http.get(str(link), headers={"range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416


@pytest.mark.parametrize(
    "change",
    [
        lambda link: link.copy_with(query=None),
        lambda link: link.copy_set_param("expires", "9999999999"),
        lambda link: link.copy_set_param("signature", "0" * 64),
        lambda link: link.copy_with(path=link.path.replace("video.mp4", "other.mp4")),
        lambda link: link.copy_with(path="/files/mutoscope.db"),
        lambda link: link.copy_with(path="/files/outputs/../mutoscope.db"),
        lambda link: link.copy_with(path=link.path.replace("/files/outputs/", "/uploads/")),
    ],
)
def test_a_link_opens_nothing_else(house: House, change: Any) -> None:
    _, link = finished(house)
    assert house.http.get(str(change(link))).status_code in (403, 404, 405)
    assert house.http.get(str(link)).status_code == 200


def test_a_link_expires_and_each_answer_has_a_fresh_one(house: House) -> None:
    clock = Clock()
    house.app.state.ctx.db.clock = clock
    job_id, link = finished(house)
    clock.forward(3599)
    assert house.http.get(str(link)).status_code == 200
    clock.forward(2)
    over = house.http.get(str(link))
    assert (over.status_code, over.json()["error"]["code"]) == (403, "forbidden")
    assert "expired" in over.json()["error"]["message"]
    headers = {"authorization": f"Bearer {house.key}"}
    fresh = house.http.get(f"/api/v1/jobs/{job_id}", headers=headers).json()["outputs"][0]["url"]
    assert fresh != str(link)
    assert house.http.get(fresh).status_code == 200


def test_a_link_to_a_deleted_job_leads_nowhere(house: House) -> None:
    job_id, link = finished(house)
    assert house.http.delete(
        f"/api/v1/jobs/{job_id}", headers={"authorization": f"Bearer {house.key}"}
    ).is_success
    assert house.http.get(str(link)).status_code == 404
