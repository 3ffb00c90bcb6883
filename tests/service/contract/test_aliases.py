"""Vendors' names of models lead to models of ours, by the shipped table and by the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from luma_agents.types import Model as AgentsModel
from openai.types.video_model import VideoModel

from mutoscope.jobs.registry import Registry
from mutoscope.server.dialects.luma_bodies import ImageModel
from mutoscope.server.dialects.luma_bodies import VideoModel as RayModel
from mutoscope.server.dialects.runway_rules import table
from mutoscope.server.dialects.runway_support import REFUSALS
from mutoscope.settings import load
from tests.service.contract.runway.runway_house import House

VIDEO: dict[str, tuple[str, dict[str, Any]]] = {
    "gen4.5": ("/v1/text_to_video", {"promptText": "a ball", "ratio": "1280:720", "duration": 2}),
    "ray-2": ("/dream-machine/v1/generations", {"prompt": "a ball"}),
    "ray-3.2": ("/agents/v1/generations", {"prompt": "a ball", "type": "video"}),
    "sora-2": ("/openai/v1/videos", {"prompt": "a ball"}),
}


def test_every_name_of_every_vendor_has_a_line() -> None:
    runway = {model for models in table()["endpoints"].values() for model in models}
    refused = {name for r in REFUSALS if r.field == "model" for name in r.values}
    named = {*runway, *get_args(RayModel), *get_args(ImageModel), *get_args(AgentsModel)}
    openai = {name for arg in get_args(VideoModel) for name in get_args(arg)}
    assert openai
    assert {*(named - refused), *openai} <= set(Registry().aliases)


@pytest.mark.parametrize("name", VIDEO)
def test_the_settings_say_which_model_does_the_work(tmp_path: Path, name: str) -> None:
    path, body = VIDEO[name]
    for target, status in (("pocket", range(200, 202)), ("wan2.1-vace-14b:q4_k_m", range(400, 401))):
        house = House(tmp_path / target.partition(":")[0], aliases={name: target})
        with house.http:
            headers = {"authorization": f"Bearer {house.key}", "x-runway-version": "2024-11-06"}
            got = house.http.post(path, json={**body, "model": name}, headers=headers)
        assert got.status_code in status, got.text
        if got.status_code == 400:
            assert "is not installed" in got.text
        else:
            job = house.job(got.json()["id"])
            assert (job.model, job.model_asked) == (target, name)
        house.db.close()


def test_the_table_and_the_key_of_clients_in_the_environment() -> None:
    environ = {"MUTOSCOPE_ALIASES": "gen4_turbo=pocket,sora-2=pocket", "MUTOSCOPE_KEY": "mk_of_a_client"}
    assert load(environ=environ).aliases == {"gen4_turbo": "pocket", "sora-2": "pocket"}
