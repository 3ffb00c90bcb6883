"""Luma's Dream Machine API with its official SDK, which refuses every answer that is not typed."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx
import lumaai
import pytest
from luma_house import BASE, House, InProcess, clip, picture
from lumaai import LumaAI

from mutoscope.jobs import outbox, queue
from mutoscope.jobs.model import Failure, State
from mutoscope.server import edge
from mutoscope.server.dialects import luma


def detail(error: lumaai.APIStatusError) -> str:
    assert isinstance(error.body, dict)
    assert set(error.body) == {"detail"}
    return str(error.body["detail"])


def test_a_video_from_text(house: House) -> None:
    client = house.client()
    made = client.generations.create(
        prompt="a red ball falls", model="ray-2", resolution="540p", duration="5s"
    )
    assert (made.state, made.model, made.generation_type) == ("queued", "ray-2", "video")
    job = house.job(made.id)
    assert (job.resolved.out_width, job.resolved.out_height) == (960, 540)
    assert job.resolved.seconds == pytest.approx(5, abs=0.3)
    house_job = house.claim()
    assert client.generations.get(made.id or "").state == "dreaming"
    with house.db.write() as tx:
        queue.lose(tx, house_job.id, house_job.fence, "test", crashed=False)
    house.finish()
    done = client.generations.get(made.id or "")
    assert done.state == "completed"
    assert done.assets is not None
    assert done.assets.video is not None
    file = house.http.get(done.assets.video)
    assert file.headers["content-type"] == "video/mp4"
    part = house.http.get(done.assets.video, headers={"range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, file.content[:10])
    assert done.request is not None
    assert done.request.prompt == "a red ball falls"  # type: ignore[union-attr]


def test_keyframes_extension_and_interpolation(house: House) -> None:
    client = house.client()
    first = client.generations.video.create(
        model="ray-2", prompt="it moves", keyframes={"frame0": {"type": "image", "url": picture()}}
    )
    assert "data:image" not in json.dumps(house.job(first.id).vendor)
    assert len(house.job(first.id).spec["keyframes"]) == 1
    done = house.finish()
    more = client.generations.video.create(
        model="ray-flash-2", prompt="it goes on", keyframes={"frame0": {"type": "generation", "id": done.id}}
    )
    spec = house.job(more.id).spec
    assert spec["extend_start"] == {"job": done.id}
    assert house.job(more.id).parent_id == done.id
    back = client.generations.video.create(
        model="ray-2", prompt="it came", keyframes={"frame1": {"type": "generation", "id": done.id}}
    )
    assert house.job(back.id).spec["extend_end"] == {"job": done.id}
    with pytest.raises(lumaai.BadRequestError) as refused:
        client.generations.video.create(
            model="ray-2",
            prompt="too soon",
            keyframes={"frame0": {"type": "generation", "id": more.id or ""}},
        )
    assert "it is queued" in detail(refused.value)


def test_pictures_and_sync(house: House) -> None:
    client = house.client()
    made = client.generations.image.create(
        model="photon-1", prompt="a blue star", aspect_ratio="1:1", image_ref=[{"url": picture(), "weight": 0.5}],
        character_ref={"identity0": {"images": [picture()]}},
    )  # fmt: skip
    job = house.job(made.id)
    assert (job.operation, job.resolved.frames, len(job.spec["references"])) == ("image", 1, 2)
    house.finish()
    done = client.generations.get(made.id or "")
    assert done.assets is not None
    assert done.assets.image is not None
    waited = client.generations.image.create(model="photon-1", prompt="a star", sync=True, sync_timeout=0.3)
    assert waited.state == "queued", "the time was over"


def test_a_waiting_picture_holds_up_nobody(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sync`, with one thread for all requests."""
    monkeypatch.setattr(edge, "_limiter", anyio.CapacityLimiter(1))
    client = house.client()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            client.generations.image.create, model="photon-1", prompt="a star", sync=True, sync_timeout=60
        )
        while not house.job_waits():
            assert not waiting.done()
            assert client.ping.check().message == "pong"
        assert client.ping.check().message == "pong"
        house.finish()
        done = waiting.result(30)
    assert done.state == "completed"
    assert done.assets is not None
    assert done.assets.image is not None


def test_reframe_modify_upscale_audio(house: House) -> None:
    client = house.client()
    wide = client.generations.video.reframe(
        generation_type="reframe_video", model="ray-2", media={"url": "https://example.com/a.mp4"},
        aspect_ratio="9:16", prompt="a wall",
    )  # fmt: skip
    assert house.job(wide.id).spec["reframe"] == "fit"
    bounds = client.generations.image.reframe(
        generation_type="reframe_image", model="photon-1", media={"url": picture()}, aspect_ratio="16:9",
        x_start=-32, x_end=96, y_start=0, y_end=48, resized_width=64, resized_height=48,
    )  # fmt: skip
    assert house.job(bounds.id).spec["outpaint"] == {"left": 0.5, "right": 0.5}
    modes = {}
    for mode in ("adhere_1", "flex_2", "reimagine_3"):
        modified = client.generations.video.modify(
            generation_type="modify_video", model="ray-2", media={"url": "https://example.com/a.mp4"}, mode=mode,  # type: ignore[arg-type]
            prompt="in winter",
        )  # fmt: skip
        modes[mode] = house.job(modified.id).spec.get("strength", 1.0)
    assert modes["adhere_1"] > modes["flex_2"] > modes["reimagine_3"] > 0
    made = client.generations.create(prompt="a red ball", model="ray-2")
    with pytest.raises(lumaai.BadRequestError):
        client.generations.upscale(made.id or "")
    while house.job(made.id).state is not State.SUCCEEDED:
        house.finish()
    larger = client.generations.upscale(made.id or "", resolution="1080p")
    job = house.job(larger.id)
    assert (job.operation, job.spec["width"], job.spec["height"]) == ("upscale", 2160, 1080)
    with pytest.raises(lumaai.BadRequestError) as refused:
        client.generations.audio(made.id or "")
    assert "no model here makes sound" in detail(refused.value)


def test_a_modified_clip_stays_as_long_and_as_large(house: House, tmp_path: Path) -> None:
    data = "data:video/mp4;base64," + base64.b64encode(clip(tmp_path)).decode()
    made = house.client().generations.video.modify(
        generation_type="modify_video", model="ray-2", media={"url": data}, mode="flex_1", prompt="in winter"
    )
    spec = house.job(made.id).spec
    assert (spec["width"], spec["height"], spec["seconds"]) == (32, 48, 2.0)
    by_url = house.client().generations.video.modify(
        generation_type="modify_video",
        model="ray-2",
        media={"url": "https://example.com/a.mp4"},
        mode="flex_1",
    )
    assert house.job(by_url.id).spec["resolution"] == "720p"


def test_listing_deleting_and_the_rest(house: House) -> None:
    client = house.client()
    ids = [client.generations.create(prompt=f"ball {i}", model="ray-2").id for i in range(3)]
    page = client.generations.list(limit=2, offset=0)
    assert [g.id for g in page.generations] == [ids[2], ids[1]]
    assert (page.has_more, page.count) == (True, 2)
    assert [g.id for g in client.generations.list(limit=2, offset=2).generations] == [ids[0]]
    client.generations.delete(ids[0] or "")
    assert house.job(ids[0]).state is State.CANCELLED
    with pytest.raises(lumaai.NotFoundError):
        client.generations.get(ids[0] or "")
    assert "zoom_in" in client.generations.concepts.list()
    assert client.credits.get().credit_balance > 0
    assert client.ping.check().message == "pong"
    camera = house.http.get(
        f"{BASE}/generations/camera_motion/list", headers={"authorization": f"Bearer {house.key}"}
    )
    assert "camera zoom in" in camera.json()


def test_failures_are_told(house: House) -> None:
    client = house.client()
    made = client.generations.create(prompt="a red ball", model="ray-2")
    house.fail(Failure.INPUT_INVALID, "keyframes.frame0: not a picture.")
    failed = client.generations.get(made.id or "")
    assert failed.state == "failed"
    assert failed.failure_reason == "Failed to read user input frames: keyframes.frame0: not a picture."


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"model": "ray-2"}, "Prompt is required"),
        ({"model": "ray-2", "prompt": "a"}, "Prompt is too short, minimum length is 3 characters"),
        ({"model": "ray-2", "prompt": "a" * 5001}, "Prompt is too long, maximum length is 5000 characters"),
        ({"model": "ray-2", "prompt": "abc", "keyframes": {}}, "No keyframes provided"),
        ({"model": "ray-2", "prompt": "abc", "foo": 1}, "foo: is not a field here"),
        ({"model": "ray-9", "prompt": "abc"}, "model: "),
        ({"model": "ray-2", "prompt": "abc", "concepts": [{"key": "dolly"}]}, "Unknown concept 'dolly'"),
        ({"model": "ray-2", "prompt": "abc", "duration": "a"}, "duration 'a' is not"),
        ({"model": "ray-2", "prompt": "abc", "loop": True,
          "keyframes": {"frame1": {"type": "image", "url": "https://example.com/a.png"}}},
         "Loop is not supported for end frame"),
        ({"model": "ray-2", "prompt": "abc",
          "keyframes": {"frame0": {"type": "image", "url": "http://127.0.0.1/a.png"}}}, "keyframes.frame0.url"),
    ],
)  # fmt: skip
def test_bad_requests_in_lumas_words(strict: House, body: dict[str, Any], told: str) -> None:
    answer = strict.http.post(f"{BASE}/generations/video", json=body, headers=strict.headers)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(told)


def test_who_asks(house: House) -> None:
    stranger = LumaAI(auth_token="nobody", base_url=BASE, max_retries=0,
                      http_client=httpx.Client(transport=InProcess(house.http)))  # fmt: skip
    with pytest.raises(lumaai.AuthenticationError) as refused:
        stranger.ping.check()
    assert "not known" in detail(refused.value)
    nowhere = house.http.get(f"{BASE}/nowhere")
    assert (nowhere.status_code, set(nowhere.json())) == (404, {"detail"})


def test_callbacks_have_lumas_body(house: House) -> None:
    client = house.client()
    made = client.generations.create(prompt="a ball", model="ray-2", callback_url="https://example.com/hook")
    house.finish()
    with house.db.read() as tx:
        sent = outbox.listing(tx, "test", job_id=made.id)
        bodies = {d.event: json.loads(luma.callback_body(tx, house.app.state.ctx, d)) for d in sent}
    assert {d.style for d in sent} == {"luma"}
    assert bodies["job.running"]["state"] == "dreaming"
    assert bodies["job.succeeded"]["state"] == "completed"
    assert bodies["job.succeeded"]["assets"]["video"].startswith("http")


def test_every_state_has_a_name() -> None:
    assert set(luma.STATUS) == set(State)
    assert set(luma.STATUS.values()) == {"queued", "dreaming", "completed", "failed"}
