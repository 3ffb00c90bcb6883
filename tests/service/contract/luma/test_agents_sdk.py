"""Luma's Agents API with its official SDK, which refuses every answer that is not typed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import luma_agents
import pytest
import sqlalchemy as sa
from luma_agents import Luma
from luma_house import AGENTS, FPS, FRAMES, House, InProcess, clip, picture

from mutoscope.jobs import accounts, queue, schema
from mutoscope.jobs.model import Failure, State
from mutoscope.server.dialects import luma_agents as dialect

PNG = {"data": picture().partition(",")[2], "media_type": "image/png"}


def detail(error: luma_agents.APIStatusError) -> str:
    assert isinstance(error.body, dict)
    assert set(error.body) == {"detail"}
    return str(error.body["detail"])


def test_a_video_from_the_prompt_to_the_file(house: House) -> None:
    client = house.agents()
    made = client.generations.create(
        prompt="a red ball falls", model="ray-3.2", aspect_ratio="1:1", user_id="u-1",
        video={"resolution": "540p", "duration": "5s"},
    )  # fmt: skip
    assert (made.state, made.model, made.type, made.output) == ("queued", "ray-3.2", "video", None)
    job = house.job(made.id)
    assert (job.resolved.out_width, job.resolved.out_height) == (540, 540)
    assert job.resolved.seconds == pytest.approx(5, abs=0.3)
    assert job.metadata == {"user_id": "u-1"}
    claimed = house.claim()
    assert client.generations.get(made.id).state == "processing"
    with house.db.write() as tx:
        queue.lose(tx, claimed.id, claimed.fence, "test", crashed=False)
    house.finish()
    done = client.generations.get(made.id)
    assert (done.state, done.failure_code) == ("completed", None)
    assert done.output is not None
    assert [o.type for o in done.output] == ["video"]
    file = house.http.get(done.output[0].url)
    assert (file.status_code, file.headers["content-type"]) == (200, "video/mp4")
    part = house.http.get(done.output[0].url, headers={"range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, file.content[:10])
    raw = house.http.get(f"{AGENTS}/generations/{made.id}", headers=house.headers)
    assert raw.headers["x-api-version"] == "2026-04-01"
    assert raw.headers["x-request-id"]


def test_pictures_and_edits_of_them(house: House) -> None:
    client = house.agents()
    made = client.generations.create(
        prompt="a star", image_ref=[PNG], style="manga", output_format="jpeg", aspect_ratio="3:2"  # type: ignore[list-item]
    )  # fmt: skip
    assert (made.type, made.model) == ("image", "uni-1")
    job = house.job(made.id)
    assert (job.operation, job.resolved.frames, len(job.spec["references"])) == ("image", 1, 1)
    assert job.spec["format"] == "jpeg"
    assert job.spec["prompt"].startswith("a star, ")
    assert "manga" in job.spec["prompt"]
    done = house.finish()
    edited = client.generations.create(
        prompt="in the rain", type="image_edit", model="uni-1-max", source={"generation_id": done.id}
    )
    job = house.job(edited.id)
    assert job.spec["references"] == [{"media": {"job": done.id}}]
    assert job.spec["aspect_ratio"] == "2:1", "the source has 64 x 32 pixels"
    house.finish()
    finished = client.generations.get(edited.id)
    assert finished.output is not None
    assert [o.type for o in finished.output] == ["image"]


def test_frames_keyframes_loops_and_extensions(house: House) -> None:
    client = house.agents()

    def spec(**video: Any) -> dict[str, Any]:
        made = client.generations.create(prompt="it moves", type="video", video=video)  # type: ignore[arg-type]
        return house.job(made.id).spec

    first = spec(start_frame=PNG, end_frame=PNG)
    assert [k.get("at", 0.0) for k in first["keyframes"]] == [0.0, 1.0]
    assert spec(start_frame=PNG, loop=True)["loop"] is True
    placed = spec(
        keyframes=[PNG, {"url": "https://example.com/a.png"}], keyframe_indexes=[0, 60], duration="10s"
    )
    assert [k.get("at", 0.0) for k in placed["keyframes"]] == [0.0, 0.25]
    while house.job_waits():
        done = house.finish()
    assert spec(start_frame={"generation_id": done.id})["extend_start"] == {"job": done.id}
    assert spec(end_frame={"generation_id": done.id})["extend_end"] == {"job": done.id}
    draft = spec(resolution="360p")
    assert (draft["quality"], draft["resolution"]) == ("draft", "360p")
    assert spec(hdr=True, resolution="720p")["hdr"] is True
    with pytest.raises(luma_agents.UnprocessableEntityError, match="extensions are not HDR"):
        spec(start_frame={"generation_id": done.id}, hdr=True)


def test_edits_and_reframing_of_clips(house: House, tmp_path: Path) -> None:
    client = house.agents()
    data = {"data": base64.b64encode(clip(tmp_path)).decode(), "media_type": "video/mp4"}
    strengths = {}
    for strength in ("adhere_1", "flex_2", "reimagine_3"):
        made = client.generations.create(
            prompt="in winter", type="video_edit", source=data,  # type: ignore[arg-type]
            video={"edit": {"strength": strength, "keyframes": [PNG], "keyframe_indexes": [15]}},  # type: ignore[dict-item, list-item, typeddict-item]
        )  # fmt: skip
        job = house.job(made.id)
        strengths[strength] = job.spec.get("strength", 1.0)
    assert strengths["adhere_1"] > strengths["flex_2"] > strengths["reimagine_3"] > 0
    assert (job.spec["control_kind"], job.spec["seconds"], job.spec["aspect_ratio"]) == ("gray", 2.0, "3:4")
    assert job.spec["keyframes"][0]["at"] == 1.0
    fitted = client.generations.create(
        prompt="a wall", type="video_reframe", aspect_ratio="16:9",
        source={"url": "https://example.com/a.mp4", "media_type": "video/mp4"},
    )  # fmt: skip
    assert house.job(fitted.id).spec["reframe"] == "fit"
    placed = client.generations.create(
        prompt="a wall", type="video_reframe", aspect_ratio="16:9", source=data,  # type: ignore[arg-type]
        video={"source_position": {"x_norm": 0.25, "y_norm": 0.0, "w_norm": 0.5, "h_norm": 1.0}},
    )  # fmt: skip
    assert house.job(placed.id).spec["outpaint"] == {"left": 0.5, "right": 0.5}
    first = house.job(client.generations.create(prompt="a ball", type="video").id)
    while house.job(first.id).state is not State.SUCCEEDED:
        house.finish()
    chained = client.generations.create(
        prompt="of glass", type="video_edit", source={"generation_id": first.id}
    )
    job = house.job(chained.id)
    assert job.spec["control"] == {"job": first.id}
    assert job.spec["seconds"] == FRAMES / FPS


def test_a_file_is_announced_put_and_used(house: House, tmp_path: Path) -> None:
    client, data = house.agents(), clip(tmp_path)
    made = client.files.create(
        mime_type="video/mp4", size_bytes=len(data), filename="a.mp4", purpose="input", user_id="u-1"
    )
    assert (made.state, made.file.size_bytes, made.file.mime_type) == ("pending", len(data), "video/mp4")
    assert made.upload is not None
    assert made.upload.method == "PUT"
    with pytest.raises(luma_agents.UnprocessableEntityError, match="No usable bytes"):
        client.files.complete(made.id)
    with pytest.raises(luma_agents.BadRequestError, match="not uploaded yet"):
        client.generations.create(prompt="it", type="video_edit", source={"file_id": made.id})
    sent = house.http.put(made.upload.url, content=data, headers=made.upload.headers)
    assert sent.status_code == 200
    ready = client.files.complete(made.id)
    assert (ready.state, ready.mime_type, ready.filename, ready.user_id) == (
        "ready",
        "video/mp4",
        "a.mp4",
        "u-1",
    )
    assert client.files.get(made.id) == ready
    used = client.generations.create(prompt="in winter", type="video_edit", source={"file_id": made.id})
    assert house.job(used.id).spec["control"] == {"asset": made.id}
    with pytest.raises(luma_agents.UnprocessableEntityError, match=r"image/\* expected"):
        client.generations.create(prompt="in winter", image_ref=[{"file_id": made.id}])
    client.files.delete(made.id)
    with pytest.raises(luma_agents.NotFoundError):
        client.files.get(made.id)


def test_a_file_as_a_form_and_what_is_refused(house: House) -> None:
    client = house.agents()
    data = base64.b64decode(PNG["data"])
    form = {"purpose": "reference", "user_id": "u-2"}
    sent = house.http.post(
        f"{AGENTS}/files", files={"file": ("a.png", data)}, data=form, headers=house.headers
    )
    assert sent.status_code == 201
    body = sent.json()
    assert (body["state"], body["upload"]) == ("ready", None)
    assert client.files.get(body["id"]).purpose == "reference"
    bad = house.http.post(f"{AGENTS}/files", files={"file": ("a.png", b"no picture")}, headers=house.headers)
    assert (bad.status_code, set(bad.json())) == (422, {"detail"})
    shorter = client.files.create(mime_type="image/png", size_bytes=len(data) + 1)
    assert shorter.upload is not None
    assert house.http.put(shorter.upload.url, content=data).status_code == 200
    with pytest.raises(luma_agents.UnprocessableEntityError, match="were announced"):
        client.files.complete(shorter.id)
    for options, status in (
        ({"mime_type": "audio/mpeg", "size_bytes": 10}, 400),
        ({"mime_type": "video/mp4", "size_bytes": 0}, 400),
        ({"mime_type": "video/mp4", "size_bytes": 5 * 2**30}, 413),
        ({"mime_type": "video/mp4", "size_bytes": 10, "expires_at": "2001-01-01T00:00:00Z"}, 400),
        ({"mime_type": "video/mp4", "size_bytes": 10, "purpose": "fun"}, 400),
    ):
        with pytest.raises(luma_agents.APIStatusError) as refused:
            client.files.create(**options)  # type: ignore[arg-type]
        assert refused.value.status_code == status
        assert detail(refused.value)


def test_files_come_in_pages(house: House) -> None:
    client = house.agents()
    ids = [
        client.files.create(
            mime_type="image/png", size_bytes=10, purpose="reference" if i == 1 else "input"
        ).id
        for i in range(5)
    ]
    seen: list[str] = []
    page = client.files.list(limit=2)
    seen += [f.id for f in page.data]
    while page.has_more:
        assert page.next_cursor
        page = client.files.list(limit=2, cursor=page.next_cursor)
        seen += [f.id for f in page.data]
    assert seen == ids[::-1]
    assert [f.id for f in client.files.list(purpose="reference").data] == [ids[1]]
    assert client.files.list(state="ready").data == []
    assert client.files.list(state="deleted").data == []
    for query in ("limit=0", "limit=101", "cursor=x", "state=odd", "purpose=odd"):
        assert house.http.get(f"{AGENTS}/files?{query}", headers=house.headers).status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 400, "prompt: Field required"),
        ({"prompt": ""}, 400, "prompt: "),
        ({"prompt": "  "}, 400, "prompt: is empty"),
        ({"prompt": "a" * 6001}, 400, "prompt: "),
        ({"prompt": "a", "seed": 1}, 400, "seed: is not a field here"),
        ({"prompt": "a", "model": "uni-9"}, 400, "model: "),
        ({"prompt": "a", "type": "layering", "source": PNG}, 422, "layering: "),
        ({"prompt": "a", "web_search": True}, 422, "web_search: "),
        ({"prompt": "a", "type": "video", "model": "uni-1"}, 422, "model: uni-1 does not make type video"),
        ({"prompt": "a", "video": {}}, 422, "video: is not for type image"),
        ({"prompt": "a", "type": "image_edit"}, 422, "source: is required"),
        ({"prompt": "a", "source": PNG}, 422, "source: is not for type image"),
        ({"prompt": "a", "image_ref": [PNG] * 10}, 422, "image_ref: at most 9"),
        ({"prompt": "a", "image_ref": [{}]}, 400, "image_ref.0: exactly one"),
        ({"prompt": "a", "image_ref": [{"data": "AAAA"}]}, 400, "image_ref.0.media_type: is required"),
        ({"prompt": "a", "image_ref": [{"data": "AAAA", "media_type": "image/png"}]}, 422, "image_ref.0 "),
        ({"prompt": "a", "image_ref": [{"url": "http://127.0.0.1/a.png"}]}, 400, "image_ref.0: the URL "),
        ({"prompt": "a", "image_ref": [{"file_id": "nobody"}]}, 400, "image_ref.0.file_id: No file"),
        ({"prompt": "a", "image_ref": [{"generation_id": "nobody"}]}, 400, "image_ref.0.generation_id"),
        ({"prompt": "a", "type": "video", "aspect_ratio": "3:1"}, 422, "aspect_ratio: "),
        ({"prompt": "a", "type": "video", "output_format": "png"}, 422, "output_format: "),
        ({"prompt": "a", "type": "video", "video": {"loop": True}}, 422, "video.loop: a loop here needs"),
        ({"prompt": "a", "type": "video", "video": {"loop": True, "duration": "10s"}}, 422, "video.loop: "),
        ({"prompt": "a", "type": "video", "video": {"exr_export": True}}, 422, "video.exr_export: needs hdr"),
        ({"prompt": "a", "type": "video", "video": {"exr_export": True, "hdr": True}}, 422, "video.exr_export: a job"),
        ({"prompt": "a", "type": "video", "video": {"hdr": True, "resolution": "540p"}}, 422, "video.hdr: "),
        ({"prompt": "a", "type": "video", "video": {"hdr": True, "duration": "10s"}}, 422, "video.hdr: is for 5s"),
        ({"prompt": "a", "type": "video", "video": {"start_frame": PNG, "duration": "10s"}}, 422, "video.duration: "),
        ({"prompt": "a", "type": "video", "video": {"keyframes": [PNG]}}, 422, "video.keyframe_indexes: as many"),
        ({"prompt": "a", "type": "video", "video": {"keyframes": [PNG], "keyframe_indexes": [121]}}, 422,
         "video.keyframe_indexes: 0 to 120"),
        ({"prompt": "a", "type": "video", "video": {"keyframes": [PNG, PNG], "keyframe_indexes": [3, 3]}}, 422,
         "video.keyframe_indexes: two are the same"),
        ({"prompt": "a", "type": "video", "video": {"edit": {}}}, 422, "video.edit: is for type video_edit"),
        ({"prompt": "a", "type": "video_edit", "source": PNG}, 422, "source: is declared as image/png"),
        ({"prompt": "a", "type": "video_edit", "source": {"url": "https://example.com/a.mp4"}}, 400,
         "source.media_type: is required"),
        ({"prompt": "a", "type": "video_edit", "source": {"url": "https://example.com/a", "media_type": "video/mp4"},
          "video": {"edit": {"controls": {"pose": {"enabled": True}}}}}, 422, "video.edit.controls.pose: no model"),
        ({"prompt": "a", "type": "video_edit", "source": {"url": "https://example.com/a", "media_type": "video/mp4"},
          "video": {"edit": {"keyframes": [PNG], "keyframe_indexes": [3]}}}, 422, "video.edit.keyframe_indexes: how"),
        ({"prompt": "a", "type": "video_reframe",
          "source": {"url": "https://example.com/a", "media_type": "video/mp4"}}, 422, "aspect_ratio: is required"),
        ({"prompt": "a", "type": "video_reframe", "aspect_ratio": "1:1",
          "source": {"url": "https://example.com/a", "media_type": "video/mp4"},
          "video": {"source_position": {"x_norm": -0.5, "y_norm": 0, "w_norm": 1, "h_norm": 1}}}, 422,
         "video.source_position: the source reaches beyond"),
        ({"prompt": "a", "type": "video_reframe", "aspect_ratio": "9:16",
          "source": {"url": "https://example.com/a", "media_type": "video/mp4"}, "video": {"resolution": "1080p"}},
         422, "video.resolution: 1080p is not available"),
        ([], 400, "The body must be a JSON object"),
    ],
)  # fmt: skip
def test_what_is_refused_and_how(strict: House, body: Any, status: int, told: str) -> None:
    answer = strict.http.post(f"{AGENTS}/generations", json=body, headers=strict.headers)
    assert (answer.status_code, set(answer.json())) == (status, {"detail"})
    assert answer.json()["detail"].startswith(told)
    with strict.db.read() as tx:
        assert queue.listing(tx, "test").jobs == ()


def test_every_failure_has_a_code_of_lumas(house: House) -> None:
    client = house.agents()
    for failure in Failure:
        made = client.generations.create(prompt="a red ball", type="video")
        house.fail(failure, "It went wrong.")
        failed = client.generations.get(made.id)
        assert (failed.state, failed.failure_reason, failed.output) == ("failed", "It went wrong.", None)
        assert failed.failure_code == dialect.FAILURE_CODE[failure]


def test_a_job_that_is_cancelled_elsewhere_has_failed(house: House) -> None:
    client = house.agents()
    made = client.generations.create(prompt="a red ball", type="video")
    assert house.http.post(f"/api/v1/jobs/{made.id}/cancel", headers=house.headers).status_code == 200
    cancelled = client.generations.get(made.id)
    assert (cancelled.state, cancelled.failure_reason) == ("failed", "Cancelled.")


def test_jobs_of_other_apis_are_not_generations(house: House) -> None:
    other = house.client().generations.create(prompt="a red ball", model="ray-2")
    with pytest.raises(luma_agents.NotFoundError):
        house.agents().generations.get(other.id or "")


def test_keys_plans_and_limits(house: House) -> None:
    stranger = Luma(auth_token="nobody", base_url=AGENTS, max_retries=0,
                    http_client=httpx.Client(transport=InProcess(house.http)))  # fmt: skip
    with pytest.raises(luma_agents.AuthenticationError):
        stranger.generations.get("a")
    client = house.agents()
    with house.db.write() as tx:
        accounts.change(tx, "test", plan="plus", limits={})
    with pytest.raises(luma_agents.PermissionDeniedError, match="not part of the plan"):
        client.generations.create(prompt="a ball", type="video")
    with house.db.write() as tx:
        accounts.change(tx, "test", plan="unlimited", limits={"overdraft": False})
        tx.run(sa.update(schema.accounts).values(balance=0))  # spent elsewhere
    with pytest.raises(luma_agents.APIStatusError) as poor:
        client.generations.create(prompt="a ball", type="video")
    assert poor.value.status_code == 402
    with house.db.write() as tx:
        accounts.change(tx, "test", limits={"concurrency": 1, "daily_jobs": 2})
    states = [client.generations.create(prompt="a ball", type="video").state for _ in range(2)]
    assert states == ["queued", "queued"], "what is above the concurrency waits"
    with pytest.raises(luma_agents.RateLimitError) as many:
        client.generations.create(prompt="a ball", type="video")
    assert int(many.value.response.headers["retry-after"]) > 60
    assert many.value.response.headers["x-should-retry"] == "false"


def test_the_same_key_gets_the_same_generation(house: House) -> None:
    client = house.agents()
    with_key = {"Idempotency-Key": "once"}
    first = client.generations.create(prompt="a ball", type="video", extra_headers=with_key)
    again = client.generations.create(prompt="a ball", type="video", extra_headers=with_key)
    assert first.id == again.id
    with pytest.raises(luma_agents.UnprocessableEntityError):
        client.generations.create(prompt="another", type="video", extra_headers=with_key)


def test_tables_are_total() -> None:
    assert set(dialect.STATUS) == set(State)
    assert set(dialect.STATUS.values()) == {"queued", "processing", "completed", "failed"}
    assert set(dialect.FAILURE_CODE) == set(Failure)
