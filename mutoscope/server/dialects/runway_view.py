"""From jobs and errors to Runway's bodies. Pure.

Every error has one shape: `{"error": sentence}`, for a refused body with `issues: [{path, message}]` and `docUrl`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mutoscope.errors import MediaError, MutoscopeError, RequestError
from mutoscope.jobs.errors import InvalidRequest, JobsError, LimitExceeded, OutOfCredits
from mutoscope.jobs.model import Failure, Job, Output, State
from mutoscope.jobs.registry import AUTO
from mutoscope.server import edge
from mutoscope.server.dialects.runway_rules import BodyRefused

DOC_URL = "https://docs.dev.runwayml.com/api"

STATUS: dict[State, str] = {
    State.QUEUED: "PENDING",
    State.THROTTLED: "THROTTLED",
    State.RUNNING: "RUNNING",
    State.SUCCEEDED: "SUCCEEDED",
    State.FAILED: "FAILED",
    State.CANCELLED: "CANCELLED",
}

FAILURE_CODE: dict[Failure, str] = {
    Failure.INPUT_INVALID: "ASSET.INVALID",
    Failure.INPUT_UNREACHABLE: "ASSET.INVALID",
    Failure.REQUEST_INVALID: "INPUT_PREPROCESSING.INVALID",
    Failure.MODEL_UNAVAILABLE: "INTERNAL.MODEL_UNAVAILABLE",
    Failure.OUT_OF_MEMORY: "INTERNAL.OUT_OF_MEMORY",
    Failure.TIME_LIMIT: "INTERNAL.TIME_LIMIT",
    Failure.WORKER_LOST: "INTERNAL.WORKER_LOST",
    Failure.BAD_OUTPUT: "INTERNAL.BAD_OUTPUT",
    Failure.STORAGE: "INTERNAL.STORAGE",
    Failure.INTERNAL: "INTERNAL",
}
"""Runway documents families (ASSET.INVALID, INPUT_PREPROCESSING.*, INTERNAL.*); the last part is ours."""

LONGEST_RETRY_S = 60
"""The SDKs wait no longer than that; after a longer Retry-After they would only knock in vain."""


def created(job: Job, warnings: list[str]) -> dict[str, Any]:
    """The answer to a create call. `warnings` is ours: what was accepted and has no effect."""
    body: dict[str, Any] = {"id": job.id, "estimatedCost": {"credits": job.cost}}
    return {**body, "warnings": warnings} if warnings else body


def from_job(
    job: Job, *, link: Callable[[Output], str], position: int | None = None, now: float | None = None
) -> dict[str, Any]:
    """A task. `link` signs the URL of an output. Ours: `queuePosition`, `etaSeconds`, `stage`, `model` and `seed`."""
    body: dict[str, Any] = {"id": job.id, "createdAt": iso(job.created_at), "status": STATUS[job.state]}
    if job.is_terminal:
        body["cost"] = {"credits": job.cost_captured}
    else:
        body["estimatedCost"] = {"credits": job.cost}
    if job.state is State.RUNNING:
        body |= {"progress": min(1.0, max(0.0, job.progress)), "stage": job.stage}
    if job.state is State.SUCCEEDED:
        body["output"] = [link(o) for o in job.outputs if o.role in ("video", "image")]
    if job.state is State.FAILED:
        failure = job.failure or Failure.INTERNAL
        body |= {"failure": job.message or failure.value, "failureCode": FAILURE_CODE[failure]}
    if position is not None:
        body["queuePosition"] = position
    if not job.is_terminal and job.eta_at is not None and now is not None:
        body["etaSeconds"] = max(0, math.ceil(job.eta_at - now))
    return body | {
        "model": job.model if job.model_asked == AUTO else job.model_asked,
        "seed": job.resolved.seed,
    }


def error(exc: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for what went wrong. What a repeat cannot change says so to the SDKs."""
    status = edge.status_of(exc)
    if isinstance(exc, OutOfCredits):
        status = 400  # Runway has no 402
    elif isinstance(exc, MutoscopeError) and not isinstance(exc, JobsError | RequestError | MediaError):
        status = 500
    headers = {} if status in (429, 500, 503) else {"x-should-retry": "false"}
    body: dict[str, Any] = {"error": edge.sentence(exc)}
    if isinstance(exc, BodyRefused):
        body["error"] = f"Validation of body failed. {body['error']}"
        body["issues"] = [{"path": list(i.path), "message": i.message} for i in exc.issues]
        body["docUrl"] = DOC_URL
    elif isinstance(exc, InvalidRequest) and exc.field:
        body["issues"] = [{"path": [exc.field], "message": exc.message}]
        body["docUrl"] = DOC_URL
    if isinstance(exc, LimitExceeded):
        wait_s = max(1, math.ceil(exc.retry_after_s))
        headers["retry-after"] = str(wait_s)
        if wait_s > LONGEST_RETRY_S:
            headers["x-should-retry"] = "false"
    return status, body, headers


def iso(at: float) -> str:
    """2026-07-27T12:00:00.000Z"""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
