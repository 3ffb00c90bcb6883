"""OpenAI's Videos API with its official SDK, which refuses every answer that is not typed."""

from __future__ import annotations

import base64
import io
import threading
from pathlib import Path

import av
import openai
import pytest
from openai.types import Video
from openai_house import House
from PIL import Image

from mutoscope.jobs import queue
from mutoscope.jobs.model import Failure, State
from mutoscope.server.dialects import openai_videos

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")


def test_a_video_from_text(house: House) -> None:
    client = house.client()
    made = client.videos.create(prompt="a red ball falls", model="sora-2-pro", seconds="8", size="1280x720")
    assert (made.status, made.model, made.seconds, made.size) == ("queued", "sora-2-pro", "8", "1280x720")
    assert (made.object, made.progress, made.prompt) == ("video", 0, "a red ball falls")
    assert (made.completed_at, made.expires_at, made.error, made.remixed_from_video_id) == (None,) * 4
    job = house.job(made.id)
    assert (job.resolved.out_width, job.resolved.out_height) == (1280, 720)
    assert job.resolved.seconds == pytest.approx(8, abs=0.2)
    running = house.claim()
    house.progress(running, 0.426)
    seen = client.videos.retrieve(made.id)
    assert (seen.status, seen.progress) == ("in_progress", 42)
    with house.db.write() as tx:
        queue.lose(tx, running.id, running.fence, "test", crashed=False)
    ended = house.finish()
    done = client.videos.retrieve(made.id)
    assert (done.status, done.progress) == ("completed", 100)
    assert ended.finished_at is not None
    assert done.completed_at == int(ended.finished_at)
    assert done.expires_at == int(ended.finished_at + house.settings.retention_days * 86400)


def test_defaults_are_openais(house: House) -> None:
    made = house.client().videos.create(prompt="a red ball")
    assert (made.model, made.seconds, made.size) == ("sora-2", "4", "720x1280")


def test_content_is_the_video_a_thumbnail_and_a_sheet(house: House, tmp_path: Path) -> None:
    client = house.client()
    made = client.videos.create(prompt="a red ball")
    house.finish()
    got = client.videos.download_content(made.id)
    got.write_to_file(tmp_path / "got.mp4")
    with av.open(str(tmp_path / "got.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    assert got.response.headers["content-type"] == "video/mp4"
    small = client.videos.download_content(made.id, variant="thumbnail")
    with Image.open(io.BytesIO(small.content)) as image:
        assert (image.format, image.size) == ("WEBP", (64, 32))
    sheet = client.videos.download_content(made.id, variant="spritesheet")
    with Image.open(io.BytesIO(sheet.content)) as image:
        assert image.format == "JPEG"
        assert image.size == (4 * 64 + 3 * 2, 3 * 32 + 2 * 2), "9 frames in rows of 4, 2 pixels apart"
    part = house.http.get(f"{openai_videos.PREFIX}/videos/{made.id}/content",
                          headers={**house.headers, "range": "bytes=4-11"})  # fmt: skip
    assert (part.status_code, part.content) == (206, got.content[4:12])


def test_create_and_poll(house: House) -> None:
    """The SDK's own loop, told by the server when to look again."""
    made = threading.Event()
    answered = house.transport.handle_request

    def watched(request):  # type: ignore[no-untyped-def]
        if request.method == "GET" and not made.is_set():
            house.finish()
            made.set()
        return answered(request)

    house.transport.handle_request = watched  # type: ignore[method-assign]
    done = house.client().videos.create_and_poll(prompt="a red ball")
    assert made.is_set()
    assert done.status == "completed"


def test_polling_waits_as_told(house: House) -> None:
    client = house.client()
    made = client.videos.create(prompt="a red ball")
    raw = client.videos.with_raw_response.retrieve(made.id)
    assert 250 <= int(raw.headers["openai-poll-after-ms"]) <= 10_000
    house.finish()
    assert "openai-poll-after-ms" not in client.videos.with_raw_response.retrieve(made.id).headers


# `input_reference` and `video` as objects: the SDK types them, and then asserts that they are files (3.54.0).


def test_a_picture_is_the_first_frame(house: House, picture: Path) -> None:
    client = house.client()
    from_file = client.videos.create(prompt="it moves", input_reference=picture)
    with picture.open("rb") as file:
        from_handle = client.videos.create(prompt="it moves", input_reference=file)
    uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    from_data = client.videos.create(prompt="it moves", extra_body={"input_reference": {"image_url": uri}})
    url = {"image_url": "https://example.com/a.png"}
    from_url = client.videos.create(prompt="it moves", extra_body={"input_reference": url})
    for made in (from_file, from_handle, from_data):
        (frame,) = house.job(made.id).spec["keyframes"]
        assert set(frame["media"]) == {"asset"}
    (frame,) = house.job(from_url.id).spec["keyframes"]
    assert frame["media"] == {"url": "https://example.com/a.png"}
    asset = house.job(from_file.id).spec["keyframes"][0]["media"]["asset"]
    from_id = client.videos.create(prompt="it moves", extra_body={"input_reference": {"file_id": asset}})
    assert house.job(from_id.id).spec["keyframes"][0]["media"] == {"asset": asset}


def test_a_clip_as_reference_is_followed(house: House, clip: Path) -> None:
    client = house.client()
    made = client.videos.create(prompt="in winter", input_reference=clip)
    spec = house.job(made.id).spec
    assert (set(spec["control"]), spec["control_kind"], spec.get("keyframes")) == ({"asset"}, "gray", None)
    again = client.videos.create(
        prompt="in summer", extra_body={"input_reference": {"file_id": spec["control"]["asset"]}}
    )
    assert house.job(again.id).spec["control"] == spec["control"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a", extra_body={"input_reference": {"file_id": "nobody"}})
    assert refused.value.param == "input_reference.file_id"


def test_json_bodies_are_taken_too(house: House) -> None:
    answer = house.http.post(
        f"{openai_videos.PREFIX}/videos", headers=house.headers,
        json={"prompt": "a ball", "seconds": "12", "input_reference": {"image_url": "https://example.com/a.png"}},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert house.job(answer.json()["id"]).resolved.seconds == pytest.approx(12, abs=0.5)


def test_our_own_fields_come_by_extra_body(house: House) -> None:
    ours = {"seed": 7, "negative_prompt": "blur", "num_inference_steps": 5, "guidance_scale": 1.5}
    made = house.client().videos.create(prompt="a ball", extra_body=ours)
    spec = house.job(made.id).spec
    assert (spec["seed"], spec["negative_prompt"], spec["steps"], spec["guidance"]) == (7, "blur", 5, 1.5)
    less = {"cache": "easy=0.1", "guidance_interval": "[0, 0.5]", "guidance_kind": "zero-star=1"}
    spec = house.job(house.client().videos.create(prompt="a ball", extra_body=less).id).spec
    assert {name: spec[name] for name in less} == {**less, "guidance_interval": [0.0, 0.5]}
    for loras, said in (('[{"name": "ink"}]', "LoRA 'ink' is unknown"), ("ink", "Invalid type for 'loras'")):
        with pytest.raises(openai.BadRequestError, match=said) as refused:
            house.client().videos.create(prompt="a ball", extra_body={"loras": loras})
        assert str(refused.value.param).startswith("loras")


def test_remix_keeps_size_length_and_structure(house: House) -> None:
    client = house.client()
    made = client.videos.create(prompt="a red ball", seconds="8", size="1280x720", model="sora-2-pro")
    house.finish()
    remix = client.videos.remix(made.id, prompt="a blue ball")
    assert (remix.remixed_from_video_id, remix.prompt) == (made.id, "a blue ball")
    assert (remix.seconds, remix.size, remix.model) == ("8", "1280x720", "sora-2-pro")
    job = house.job(remix.id)
    assert (job.spec["control"], job.spec["control_kind"]) == ({"job": made.id}, "gray")
    source = house.job(made.id).resolved
    assert (job.resolved.frames, job.resolved.fps) == (source.frames, source.fps)
    assert job.parent_id == made.id


def test_edits_of_a_video_and_of_a_file(house: House, clip: Path) -> None:
    client = house.client()
    made = client.videos.create(prompt="a red ball", size="1024x1792")
    house.finish()
    edit = client.post("/videos/edits", cast_to=Video, body={"prompt": "blue", "video": {"id": made.id}})
    assert (edit.size, edit.seconds, edit.remixed_from_video_id) == ("1024x1792", "4", None)
    assert house.job(edit.id).spec["control"] == {"job": made.id}
    sent = client.videos.edit(prompt="a blue ball", video=clip)
    assert (sent.size, sent.seconds, sent.model) == ("720x1280", "2", "sora-2")
    job = house.job(sent.id)
    assert set(job.spec["control"]) == {"asset"}
    assert (job.resolved.fps, job.resolved.seconds) == (8, pytest.approx(2, abs=0.2))


def test_extensions_are_the_whole_video(house: House, clip: Path) -> None:
    client = house.client()
    made = client.videos.create(prompt="a red ball")
    house.finish()
    body = {"prompt": "it goes on", "video": {"id": made.id}, "seconds": "4"}
    longer = client.post("/videos/extensions", cast_to=Video, body=body)
    assert longer.seconds == "8"
    job = house.job(longer.id)
    assert job.spec["extend_start"] == {"job": made.id}
    assert job.resolved.seconds == pytest.approx(8, abs=0.2)
    sent = client.videos.extend(prompt="it goes on", video=clip, seconds="8")
    assert (sent.seconds, sent.size) == ("10", "720x1280")


def test_listing_pages_in_both_orders(house: House) -> None:
    client = house.client()
    ids = [client.videos.create(prompt=f"ball {i}").id for i in range(5)]
    assert [v.id for v in client.videos.list(limit=2)] == ids[::-1], "the SDK follows the pages"
    assert [v.id for v in client.videos.list(limit=2, order="asc")] == ids
    page = client.videos.list(limit=2, after=ids[3])
    assert [v.id for v in page.data] == [ids[2], ids[1]]
    assert (page.has_more, page.last_id) == (True, ids[1])
    raw = house.http.get(f"{openai_videos.PREFIX}/videos?limit=2", headers=house.headers).json()
    assert (raw["object"], raw["first_id"], raw["last_id"]) == ("list", ids[4], ids[3])


def test_an_empty_list(house: House) -> None:
    page = house.client().videos.list()
    assert (page.data, page.has_more, page.last_id) == ([], False, None)


def test_delete_cancels_and_forgets(house: House) -> None:
    client = house.client()
    waiting, done = client.videos.create(prompt="a"), client.videos.create(prompt="b")
    gone = client.videos.delete(waiting.id)
    assert (gone.id, gone.deleted, gone.object) == (waiting.id, True, "video.deleted")
    assert house.job(waiting.id).state is State.CANCELLED
    house.finish()
    client.videos.delete(done.id)
    assert client.videos.list().data == []


def test_failures_are_told(house: House) -> None:
    client = house.client()
    made = client.videos.create(prompt="a ball")
    house.fail(Failure.OUT_OF_MEMORY, "The device has 8 GiB.")
    failed = client.videos.retrieve(made.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("out_of_memory", "The device has 8 GiB.")
    assert (failed.completed_at, failed.expires_at) == (None, None)
    cancelled = client.videos.create(prompt="a ball")
    with house.db.write() as tx:
        queue.cancel(tx, cancelled.id)
    seen = client.videos.retrieve(cancelled.id)
    assert seen.error is not None
    assert (seen.status, seen.error.code) == ("failed", "cancelled")


def test_every_state_and_failure_has_a_name() -> None:
    assert set(openai_videos.STATUS) == set(State)
    assert set(openai_videos.STATUS.values()) == {"queued", "in_progress", "completed", "failed"}
    assert set(openai_videos.FAILURE_CODE) == set(Failure)
    assert len(set(openai_videos.FAILURE_CODE.values())) == len(Failure)
