"""The official Python SDK, strict, against the app: every route, every state, every error."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runwayml
from runway_house import House
from runwayml import RunwayML
from runwayml.lib import polling

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.model import Failure

NEWEST = "RUNWAY_SDK" not in os.environ
MADE: dict[str, Any] = {"model": "gen4.5", "prompt_text": "a ball", "ratio": "1280:720", "duration": 2}
IMAGE = "https://example.com/a.png"
CLIP = "https://example.com/a.mp4"


def test_the_sdk_is_the_one_meant() -> None:
    """test_runway_older_sdk.py runs this file with another one."""
    assert runwayml.__version__ == os.environ.get("RUNWAY_SDK", "5.24.0")


def data_uri(path: Path) -> str:
    kind = "image/png" if path.suffix == ".png" else "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


CREATES: dict[str, Callable[[RunwayML], Any]] = {
    "text_to_video": lambda c: c.text_to_video.create(**MADE),
    "image_to_video": lambda c: c.image_to_video.create(model="gen4_turbo", prompt_image=IMAGE, ratio="1280:720"),
    "image_to_video positions": lambda c: c.image_to_video.create(
        model="veo3.1", ratio="1280:720", duration=4,
        prompt_image=[{"uri": IMAGE, "position": "first"}, {"uri": IMAGE + "?2", "position": "last"}],
    ),
    "video_to_video": lambda c: c.video_to_video.create(
        model="aleph2", video_uri=CLIP, prompt_text="at night", keyframes=[{"at": 0.5, "uri": IMAGE}]
    ),
    "text_to_image": lambda c: c.text_to_image.create(
        model="gen4_image", prompt_text="@ball", ratio="1024:1024", reference_images=[{"uri": IMAGE, "tag": "ball"}]
    ),
    "character_performance": lambda c: c.character_performance.create(
        model="act_two", character={"type": "image", "uri": IMAGE}, reference={"type": "video", "uri": CLIP}
    ),
    "video_upscale": lambda c: c.video_upscale.create(model="magnific_video_upscaler_creative", video_uri=CLIP),
    "video_upscale rate": lambda c: c.video_upscale.create(  # 5.13.0 does not know the argument
        model="enhance_frame_rate", video_uri=CLIP, extra_body={"targetFramerate": "60"}
    ),
    "image_upscale": lambda c: c.image_upscale.create(model="magnific_precision_upscaler_v2", image_uri=IMAGE),
    "video_to_hdr": lambda c: c.video_to_hdr.create(model="ruby", video_uri=CLIP, output_format="hlg"),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in CREATES if hasattr(RunwayML, n.split()[0])])
def test_every_create_route_makes_a_task(house: House, name: str) -> None:
    client = house.client()
    made = CREATES[name](client)
    estimate = {"credits": house.job(made.id).cost}
    task = client.tasks.retrieve(made.id).to_dict()
    assert made.to_dict()["estimatedCost"] == task["estimatedCost"] == estimate
    assert (task["status"], task["id"]) == ("PENDING", made.id)
    house.succeed(house.claim())
    done: Any = client.tasks.retrieve(made.id).to_dict()
    assert (done["status"], done["cost"]) == ("SUCCEEDED", estimate)
    assert house.http.get(done["output"][0]).status_code == 200


def test_a_task_through_all_of_its_states(house: House) -> None:
    client = house.client()
    made = client.text_to_video.create(**MADE, seed=7)
    waiting: Any = client.tasks.retrieve(made.id)
    assert (waiting.status, waiting.queuePosition, waiting.model, waiting.seed) == ("PENDING", 0, "gen4.5", 7)
    job = house.claim()
    house.progress(job, 0.25)
    running: Any = client.tasks.retrieve(made.id)
    assert (running.status, running.progress, running.stage) == ("RUNNING", 0.25, "denoise")
    assert 0 <= running.etaSeconds <= 30
    house.succeed(job)
    done: Any = client.tasks.retrieve(made.id)
    assert len(done.output) == 1
    whole = house.http.get(done.output[0])
    part = house.http.get(done.output[0], headers={"range": "bytes=4-7"})
    assert whole.content[4:8] == part.content == b"ftyp"
    assert (part.status_code, whole.headers["content-type"]) == (206, "video/mp4")


def test_waiting_for_the_output(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's own loop; the worker works while it sleeps."""
    client = house.client()
    steps = iter([lambda job: None, lambda job: house.progress(job, 0.5), lambda job: house.succeed(job)])
    claimed: list[Any] = []

    def work(seconds: float) -> None:
        claimed.append(claimed[0] if claimed else house.claim())
        next(steps)(claimed[0])

    monkeypatch.setattr(polling.time, "sleep", work)
    task = client.text_to_video.create(**MADE).wait_for_task_output()
    assert task.status == "SUCCEEDED"
    assert next(steps, None) is None


def test_a_failed_task_raises_while_waiting(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    client = house.client()
    made = client.image_to_video.create(model="gen4_turbo", prompt_image=IMAGE, ratio="1280:720")
    house.fail(house.claim(), Failure.INPUT_UNREACHABLE, "https://example.com/a.png answered 404.")
    monkeypatch.setattr(polling.time, "sleep", lambda seconds: None)
    with pytest.raises(runwayml.TaskFailedError) as caught:
        made.wait_for_task_output()
    details = caught.value.task_details.to_dict()
    assert (details["status"], details["failureCode"], details["cost"]) == (
        "FAILED",
        "ASSET.INVALID",
        {"credits": 0},
    )
    assert details["failure"] == "https://example.com/a.png answered 404."


def test_over_the_limit_of_the_plan_tasks_are_throttled(house: House) -> None:
    with house.db.write() as tx:
        accounts.change(tx, house.account.id, limits={"concurrency": 1})
    client = house.client()
    first, second = client.text_to_video.create(**MADE), client.text_to_video.create(**MADE)
    assert client.tasks.retrieve(first.id).status == "PENDING"
    assert client.tasks.retrieve(second.id).status == "THROTTLED"
    house.succeed(house.claim())
    assert client.tasks.retrieve(second.id).status == "PENDING"


def test_a_deleted_task_is_gone_whatever_its_state(house: House) -> None:
    client = house.client()
    waiting = client.text_to_video.create(**MADE)
    client.tasks.delete(waiting.id)
    assert house.job(waiting.id).cost_captured == 0
    running = client.text_to_video.create(**MADE)
    job = house.claim()
    client.tasks.delete(running.id)
    assert house.job(running.id).cancel_asked_at is not None
    with house.db.write() as tx:
        assert queue.cancelled(tx, job.id, job.fence)
    done = client.text_to_video.create(**MADE)
    house.succeed(house.claim())
    client.tasks.delete(done.id)
    for task_id in (waiting.id, running.id, done.id):
        with pytest.raises(runwayml.NotFoundError, match=task_id):
            client.tasks.retrieve(task_id)
        with pytest.raises(runwayml.NotFoundError):
            client.tasks.delete(task_id)


def test_a_task_cancelled_elsewhere_says_so(house: House) -> None:
    client = house.client()
    made = client.text_to_video.create(**MADE)
    with house.db.write() as tx:
        queue.cancel(tx, made.id)
    task = client.tasks.retrieve(made.id).to_dict()
    assert (task["status"], task["cost"]) == ("CANCELLED", {"credits": 0})


def test_warnings_say_what_has_no_effect(house: House) -> None:
    made: Any = CREATES["character_performance"](house.client())
    assert "lip-sync" in made.warnings[0]


def test_files_inside_of_the_body(house: House, picture: Path, clip: Path) -> None:
    client = house.client()
    made = client.image_to_video.create(model="gen4_turbo", prompt_image=data_uri(picture), ratio="1280:720")
    asset = house.job(made.id).spec["keyframes"][0]["media"]["asset"]
    assert (house.settings.data_dir / "assets" / asset).is_dir()
    client.video_to_video.create(
        model="aleph2", video_uri=data_uri(clip), prompt_text="x", keyframes=[{"seconds": 1, "uri": IMAGE}]
    )


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64,!!!!", "Invalid data URI."),
        ("data:image/png,abc", "Invalid data URI."),
        ("data:image/png;base64," + base64.b64encode(b"nothing").decode(), "Unsupported asset type."),
        ("http://example.com/a.png", "Only HTTPS URLs are allowed."),
        ("https://10.0.0.1/a.png", "URLs must be hosted on a domain."),
        ("runway://9f0b8a50-0000-4000-8000-000000000000", "No file"),
        ("hello", "Invalid URL"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_runways_reasons(
    house: House, uri: str, reason: str
) -> None:
    with pytest.raises(runwayml.BadRequestError) as caught:
        house.client().image_to_video.create(model="gen4_turbo", prompt_image=uri, ratio="1280:720")
    body: Any = caught.value.body
    assert body["issues"][0]["path"] == ["promptImage"]
    assert reason in body["issues"][0]["message"]
    assert "promptImage" in body["error"]


def test_a_clip_is_no_picture(house: House, clip: Path) -> None:
    with pytest.raises(runwayml.BadRequestError, match="promptImage"):
        house.client().image_to_video.create(
            model="gen4_turbo", prompt_image=data_uri(clip), ratio="1280:720"
        )


def test_a_refused_body_names_every_issue_and_is_not_repeated(house: House) -> None:
    client = house.client()
    with pytest.raises(runwayml.BadRequestError) as caught:
        client.text_to_video.create(**{**MADE, "duration": 99, "prompt_text": ""}, extra_body={"sead": 1})
    body: Any = caught.value.body
    assert {tuple(i["path"]) for i in body["issues"]} == {("duration",), ("promptText",), ("sead",)}
    assert body["docUrl"].startswith("https://")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_keys(house: House) -> None:
    for key in ("My API Key", "key_" + "0" * 128):
        with pytest.raises(runwayml.AuthenticationError) as caught:
            house.client().with_options(api_key=key).text_to_video.create(**MADE)
        assert set(caught.value.body) == {"error"}  # type: ignore[call-overload]
    with house.db.write() as tx:
        accounts.create_key(tx, house.account.id, "imported", value="My API Key with spaces")
    house.client().with_options(api_key="My API Key with spaces").text_to_video.create(**MADE)
    with house.db.write() as tx:
        other = accounts.create(tx, "other")
        _, stranger = accounts.create_key(tx, other.id, "other")
    made = house.client().text_to_video.create(**MADE)
    with pytest.raises(runwayml.NotFoundError):
        house.client().with_options(api_key=stranger).tasks.retrieve(made.id)


@pytest.mark.parametrize("version", ["2024-09-13", "latest", ""])
def test_the_version_header_is_required(house: House, version: str) -> None:
    with pytest.raises(runwayml.BadRequestError, match="2024-11-06"):
        house.client(runway_version=version).text_to_video.create(**MADE)
    bare = house.http.get("/v1/organization", headers={"authorization": f"Bearer {house.key}"})
    assert bare.status_code == 400
    assert "X-Runway-Version" in bare.json()["error"]


def test_daily_limits_say_when_to_come_back(house: House) -> None:
    with house.db.write() as tx:
        accounts.change(tx, house.account.id, limits={"daily_jobs": 1})
    client = house.client(max_retries=0)
    client.text_to_video.create(**MADE)
    with pytest.raises(runwayml.RateLimitError) as caught:
        client.text_to_video.create(**MADE)
    assert int(caught.value.response.headers["retry-after"]) > 3600
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_too_few_credits(house: House) -> None:
    with house.db.write() as tx:
        accounts.change(tx, house.account.id, limits={"overdraft": False})
    with pytest.raises(runwayml.BadRequestError, match="credits"):
        house.client().text_to_video.create(**MADE)


REFUSED: dict[str, Callable[[RunwayML], Any]] = {
    "speech": lambda c: c.text_to_speech.create(
        model="eleven_multilingual_v2", prompt_text="a", voice={"type": "runway-preset", "preset_id": "Maya"}
    ),
    "sound": lambda c: c.sound_effect.create(model="eleven_text_to_sound_v2", prompt_text="a"),
    "isolation": lambda c: c.voice_isolation.create(
        model="eleven_voice_isolation", audio_uri="https://a.b/c.mp3"
    ),
    "avatars": lambda c: c.avatars.list(limit=5),
    "avatar": lambda c: c.avatars.retrieve("1"),
    "voices": lambda c: c.voices.list(limit=5),
    "documents": lambda c: c.documents.create(name="a", content="b"),
    "workflows": lambda c: c.workflows.list(),
    "workflow": lambda c: c.workflows.retrieve("1"),
    "invocation": lambda c: c.workflow_invocations.retrieve("1"),
}


@pytest.mark.parametrize("name", [n for n in REFUSED if n not in ("workflow", "invocation") or NEWEST])
def test_what_is_not_here_is_refused_with_a_sentence(house: House, name: str) -> None:
    with pytest.raises(runwayml.BadRequestError, match="is not supported: ") as caught:
        REFUSED[name](house.client())
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_wrong_methods_and_paths(house: House) -> None:
    wrong = house.http.put("/v1/text_to_video")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "takes POST" in wrong.json()["error"]
    unknown = house.http.get("/v1/tusks/1")
    assert unknown.status_code == 404
    assert "/v1/tusks/1" in unknown.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"null", b'{"model": NaN}'])
def test_bodies_that_are_no_json_objects(house: House, content: bytes) -> None:
    headers = {"authorization": f"Bearer {house.key}", "x-runway-version": "2024-11-06",
               "content-type": "application/json"}  # fmt: skip
    got = house.http.post("/v1/text_to_video", content=content, headers=headers)
    assert got.status_code == 400
    assert isinstance(got.json()["error"], str)
