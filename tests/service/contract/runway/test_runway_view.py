"""Jobs and errors in Runway's terms: every state, every failure, every error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from runwayml._models import construct_type, validate_type
from runwayml.types import TaskRetrieveResponse

from mutoscope.errors import FileError, RequestError
from mutoscope.jobs import errors
from mutoscope.jobs.model import Failure, Job, Output, Priority, Resolved, State
from mutoscope.server import edge
from mutoscope.server.dialects import runway_view as view
from mutoscope.server.dialects.runway_rules import BodyRefused, Issue

RESOLVED = Resolved(width=64, height=64, frames=17, fps=8, steps=20, passes=2, out_width=1280, out_height=720, seed=7,
                    tier="720p", seconds=2)  # fmt: skip
VIDEO = Output(role="video", path="outputs/a/1/video.mp4", mime="video/mp4", size_bytes=10)
THUMBNAIL = Output(role="thumbnail", path="outputs/a/1/t.jpg", mime="image/jpeg", size_bytes=10)
JOB = Job(
    seq=1, id="17f20503-6c24-4c16-946b-35dbbce2af2f", account_id="a", key_id="k", dialect="runway", operation="video",
    state=State.QUEUED, stage="", step=0, steps=0, progress=0.0, eta_at=None, model="pocket", model_asked="gen4.5",
    candidates=(), spec={}, resolved=RESOLVED, vendor={}, metadata={}, priority=Priority.NORMAL, cost=25,
    cost_captured=0, estimate_s=3, time_limit_s=60, attempt=0, crashes=0, fence=0, worker_id=None, lease_until=None,
    cancel_asked_at=None, created_at=1753617600.25, started_at=None, finished_at=None, deleted_at=None, failure=None,
    message="", outputs=(VIDEO, THUMBNAIL), result={}, batch_id=None, batch_index=None, parent_id=None,
)  # fmt: skip


def task(state: State, **changes: Any) -> dict[str, Any]:
    job = dataclasses.replace(JOB, state=state, **changes)
    return view.from_job(
        job, link=lambda o: f"https://host/{o.path}?sig=1", position=None, now=JOB.created_at
    )


def test_every_state_has_a_status() -> None:
    assert set(view.STATUS) == set(State)
    assert set(view.FAILURE_CODE) == set(Failure)


@pytest.mark.parametrize("state", State)
def test_every_state_is_what_the_newest_sdk_types(state: State) -> None:
    body = task(state)
    parsed = validate_type(type_=TaskRetrieveResponse, value=body)  # type: ignore[arg-type]
    assert parsed.status == view.STATUS[state]
    assert parsed.id == JOB.id
    assert ("estimatedCost" in body) == (state not in (State.SUCCEEDED, State.FAILED, State.CANCELLED))
    assert ("cost" in body) != ("estimatedCost" in body)


def test_running_says_how_far() -> None:
    body = task(State.RUNNING, progress=0.25, stage="denoise", eta_at=JOB.created_at + 9.2)
    assert (body["progress"], body["stage"], body["etaSeconds"]) == (0.25, "denoise", 10)


def test_outputs_are_the_video_and_not_its_thumbnail() -> None:
    assert task(State.SUCCEEDED)["output"] == ["https://host/outputs/a/1/video.mp4?sig=1"]
    assert task(State.SUCCEEDED, cost_captured=25)["cost"] == {"credits": 25}


@pytest.mark.parametrize("failure", Failure)
def test_every_failure_has_a_code_of_a_documented_family(failure: Failure) -> None:
    body = task(State.FAILED, failure=failure, message="The clip is damaged.")
    assert body["failure"] == "The clip is damaged."
    assert body["failureCode"].split(".")[0] in ("ASSET", "INPUT_PREPROCESSING", "INTERNAL")


def test_extras_are_readable_in_the_sdk() -> None:
    job = dataclasses.replace(JOB, state=State.QUEUED)
    body = view.from_job(job, link=lambda o: "", position=3)
    parsed: Any = construct_type(type_=TaskRetrieveResponse, value=body)
    assert (parsed.queuePosition, parsed.model, parsed.seed) == (3, "gen4.5", 7)
    assert view.iso(JOB.created_at) == "2025-07-27T12:00:00.250Z"


@pytest.mark.parametrize(
    ("exc", "status", "retry"),
    [
        (errors.InvalidRequest("seed = -1.", field="seed"), 400, "false"),
        (errors.Unsupported("No sound."), 400, "false"),
        (errors.OutOfCredits("7 credits, 25 needed."), 400, "false"),
        (errors.Unauthorized("No such key."), 401, "false"),
        (errors.Forbidden("Your plan has no 4k."), 403, "false"),
        (errors.NotFound("No task x."), 404, "false"),
        (errors.Conflict("Already running."), 409, "false"),
        (errors.IdempotencyMismatch("Other body."), 422, "false"),
        (errors.LimitExceeded("50 a day.", retry_after_s=12.3), 429, None),
        (errors.LimitExceeded("50 a day.", retry_after_s=3600), 429, "false"),
        (edge.BodyTooLarge("33 MB."), 413, "false"),
        (edge.Busy("The database is busy."), 503, None),
        (RequestError("Bad size."), 400, "false"),
        (FileError("The disk is full."), 500, None),
        (BodyRefused([Issue(("promptImage", 0, "uri"), "Invalid URL")]), 400, "false"),
    ],
)
def test_every_error_has_one_shape(exc: Any, status: int, retry: str | None) -> None:
    got, body, headers = view.error(exc)
    assert got == status
    assert isinstance(body["error"], str)
    assert exc.message in body["error"]
    assert set(body) <= {"error", "issues", "docUrl"}
    assert headers.get("x-should-retry") == retry
    assert ("retry-after" in headers) == (status == 429)


def test_what_nobody_foresaw_is_not_told() -> None:
    status, body, headers = view.error(RuntimeError("secret"))
    assert (status, "secret" in body["error"], headers) == (500, False, {})


def test_issues_name_their_place() -> None:
    _, body, _ = view.error(
        BodyRefused([Issue(("promptImage", 0, "uri"), "Invalid URL"), Issue(("seed",), "No.")])
    )
    assert body["issues"] == [
        {"path": ["promptImage", 0, "uri"], "message": "Invalid URL"},
        {"path": ["seed"], "message": "No."},
    ]
    assert "promptImage[0].uri: Invalid URL" in body["error"]
    _, _, headers = view.error(errors.LimitExceeded("50 a day.", retry_after_s=12.3))
    assert headers["retry-after"] == "13"
