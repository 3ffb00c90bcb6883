"""Luma's Dream Machine API under /dream-machine/v1, as the `lumaai` SDKs speak it; docs/luma.md has examples.

Pure: `to_spec` and its kin (`luma_bodies`), `from_job`, `error`. A generation's `request` is given back as it was sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from mutoscope.jobs import plans, queue
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.inline import Inline
from mutoscope.jobs.model import Caller, Failure, Job, Output, State
from mutoscope.jobs.outbox import Delivery
from mutoscope.jobs.service import finished
from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.context import Context
from mutoscope.server.dialects import inputs
from mutoscope.server.dialects.coverage import IGNORED, REFUSED, SUPPORTED, Part, Route
from mutoscope.server.dialects.inputs import File, Named
from mutoscope.server.dialects.luma_bodies import (
    CAMERA_MOTIONS,
    CONCEPTS,
    Body,
    Files,
    ImageBody,
    ModifyBody,
    ReframeBody,
    UpscaleBody,
    VideoBody,
    body_of,
    image_spec,
    modify_spec,
    reframe_spec,
    upscale_spec,
    video_spec,
)
from mutoscope.server.edge import Dialect, Reply

PREFIX = "/dream-machine/v1"
NAME = "luma"
B = TypeVar("B", bound=Body)
NO_AUDIO = "Audio is not supported: no model here makes sound."
LOOK_S = 0.25

STATUS: dict[State, str] = {
    State.QUEUED: "queued",
    State.THROTTLED: "queued",
    State.RUNNING: "dreaming",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "failed",
}
REASONS: dict[Failure, str] = {
    Failure.INPUT_INVALID: "Failed to read user input frames",
    Failure.INPUT_UNREACHABLE: "Failed to read user input frames",
    Failure.REQUEST_INVALID: "Prompt processing failed",
}
"""Luma's documented words; our own sentence follows. All other failures have only that."""
ECHOED = ("ray-2", "ray-flash-2", "photon-1", "photon-flash-1")
"""Requests for other models are not echoed: the SDKs' types know no others."""


# -- pure ----------------------------------------------------------------------------------------------------


def error(exc: Exception) -> Reply:
    """{"detail": "..."}"""
    return Reply(edge.status_of(exc), {"detail": edge.sentence(exc)})


DIALECT = Dialect(NAME, error)


def from_job(job: Job, link: Callable[[Job, Output], str]) -> dict[str, Any]:
    """A Generation."""
    kind = "image" if job.operation == "image" else "video"
    main = next((o for o in job.outputs if o.role == kind), None) if job.state is State.SUCCEEDED else None
    request = job.vendor.get("request")
    return {
        "id": job.id,
        "generation_type": kind,
        "state": STATUS[job.state],
        "failure_reason": failure_reason(job),
        "created_at": iso(job.created_at),
        "assets": {kind: link(job, main)} if main is not None else None,
        "model": job.model_asked,
        "request": request if request and request.get("model", "ray-2") in ECHOED else None,
    }


def failure_reason(job: Job) -> str | None:
    """Why it failed, in Luma's words where it has some."""
    if job.state is State.CANCELLED:
        return "Cancelled"
    if job.failure is None:
        return None
    words = REASONS.get(job.failure)
    return f"{words}: {job.message}" if words else job.message


def callback_body(tx: Tx, ctx: Context, delivery: Delivery) -> str:
    """What goes to a callback_url: the Generation with the state that the event was about, and fresh links."""
    assert delivery.job_id is not None
    generation = from_job(queue.get(tx, delivery.job_id, deleted=True), ctx.links().output)
    if delivery.event == "job.running":
        generation |= {"state": "dreaming", "assets": None, "failure_reason": None}
    return json.dumps(generation)


# -- routes --------------------------------------------------------------------------------------------------


def router(ctx: Context) -> APIRouter:
    """All routes."""
    api = APIRouter(prefix=PREFIX)
    _creating(api, ctx)
    _working_on(api, ctx)
    _watching(api, ctx)
    return api


def _creating(api: APIRouter, ctx: Context) -> None:
    def route(path: str, kind: type[B], to_spec: Callable[[B, Files], JobSpec]) -> None:
        async def create(request: Request) -> Response:
            def parse(value: Any) -> tuple[B, dict[str, Any], dict[str, Inline]]:
                body = body_of(kind, value)
                named = list(body.named())
                to_spec(
                    body, {one.uri: File(_PLACEHOLDER, one.kind) for one in named}
                )  # refused before files are looked into
                return body, value, inputs.look(named, ctx.settings)

            def act(tx: Tx, caller: Caller, parsed: tuple[B, dict[str, Any], dict[str, Inline]]) -> Reply:
                body, value, found = parsed
                named: list[Named] = list(body.named())
                files = inputs.keep(tx, caller.account.id, named, found, ctx.settings)
                job = ctx.service.submit(
                    tx, caller, to_spec(body, files), dialect=NAME, vendor={"request": _echo(value)}
                )
                return Reply(201, from_job(job, ctx.links(request).output))

            async def until_done(reply: Reply) -> None:
                """`sync`: the answer waits for the picture; its body is what it is then."""
                wait = (reply.body or {}).get("request") or {}
                if wait.get("sync"):
                    await _wait(ctx, request, reply, float(wait.get("sync_timeout", 60)))

            return await edge.write(ctx, request, parse, act, DIALECT, after=until_done)

        api.add_api_route(path, create, methods=["POST"], name=f"luma {path}")

    route("/generations", VideoBody, video_spec)
    route("/generations/video", VideoBody, video_spec)
    route("/generations/image", ImageBody, image_spec)
    route("/generations/image/reframe", ReframeBody, reframe_spec)
    route("/generations/video/reframe", ReframeBody, reframe_spec)
    route("/generations/video/modify", ModifyBody, modify_spec)


def _working_on(api: APIRouter, ctx: Context) -> None:
    @api.post("/generations/{generation_id}/upscale")
    async def upscale(request: Request, generation_id: str) -> Response:
        def act(tx: Tx, caller: Caller, body: UpscaleBody) -> Reply:
            before = finished(tx, caller.account.id, generation_id, field="id")
            file = before.outputs[0]
            spec = upscale_spec(body, generation_id, (file.width, file.height))
            vendor = {"request": body.model_dump(exclude_none=True)}
            job = ctx.service.submit(tx, caller, spec, dialect=NAME, vendor=vendor)
            return Reply(200, from_job(job, ctx.links(request).output))

        return await edge.write(ctx, request, lambda value: body_of(UpscaleBody, value), act, DIALECT)

    @api.post("/generations/{generation_id}/audio")
    async def audio(request: Request, generation_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            ctx.service.get(tx, caller, generation_id)
            raise Unsupported(NO_AUDIO)

        return await edge.write(ctx, request, lambda _: None, act, DIALECT)


def _watching(api: APIRouter, ctx: Context) -> None:
    @api.get("/generations/concepts/list")
    async def concepts(request: Request) -> Response:
        return await edge.read(ctx, request, lambda _tx, _caller: Reply(200, list(CONCEPTS)), DIALECT)

    @api.get("/generations/camera_motion/list")
    async def camera_motion(request: Request) -> Response:
        return await edge.read(ctx, request, lambda _tx, _caller: Reply(200, list(CAMERA_MOTIONS)), DIALECT)

    @api.get("/generations")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            limit, offset = _number(request, "limit", 100, 1, 100), _number(request, "offset", 0, 0, 10**9)
            page = ctx.service.listing(tx, caller, limit=limit, offset=offset, dialects=(NAME,))
            link = ctx.links(request).output
            return Reply(200, {
                "has_more": page.has_more, "count": len(page.jobs), "limit": limit, "offset": offset,
                "generations": [from_job(job, link) for job in page.jobs],
            })  # fmt: skip

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/generations/{generation_id}")
    async def retrieve(request: Request, generation_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, from_job(ctx.service.get(tx, caller, generation_id), ctx.links(request).output))

        return await edge.read(ctx, request, act, DIALECT)

    @api.delete("/generations/{generation_id}")
    async def delete(request: Request, generation_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            ctx.service.delete(tx, caller, generation_id)
            return Reply(204)

        return await edge.write(ctx, request, lambda _: None, act, DIALECT)

    @api.get("/credits")
    async def credits(request: Request) -> Response:
        def act(_tx: Tx, caller: Caller) -> Reply:
            cents = ctx.service.prices.usd_per_credit * 100
            return Reply(200, {"credit_balance": plans.shown_balance(caller.account) * cents})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/ping")
    async def ping(request: Request) -> Response:
        return await edge.read(ctx, request, lambda _tx, _caller: Reply(200, {"message": "pong"}), DIALECT)


async def _wait(ctx: Context, request: Request, reply: Reply, timeout_s: float) -> None:
    """Until the job has ended, or the time is over; then the reply says how it is. Holds no thread."""
    until = time.monotonic() + timeout_s

    def look() -> Job:
        with ctx.db.read() as tx:
            return queue.get(tx, reply.body["id"], deleted=True)

    while True:
        job = await edge.on_thread(look)
        if job.is_terminal or time.monotonic() >= until:
            reply.body.update(from_job(job, ctx.links(request).output))
            return
        await asyncio.sleep(LOOK_S)


def _echo(value: dict[str, Any]) -> dict[str, Any]:
    """The request as it is given back. Data inside of it is left out: it is large, and kept elsewhere."""

    def short(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: short(v) for k, v in node.items()}
        if isinstance(node, list):
            return [short(v) for v in node]
        return "data:" if isinstance(node, str) and node.startswith("data:") else node

    echo: dict[str, Any] = short(value)
    return echo


def _number(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or not low <= int(text[:12]) <= high:
        raise InvalidRequest(f"{name} must be {low} to {high}, got {text!r:.20}", field=name)
    return int(text)


_PLACEHOLDER = Media(asset="not-kept-yet")

_VIDEO = (
    Part("model", SUPPORTED, "ray-2, ray-flash-2 and ray-1-6 lead to a model of yours, see jobs/aliases.toml"),
    Part("prompt", SUPPORTED), Part("aspect_ratio", SUPPORTED), Part("resolution", SUPPORTED),
    Part("duration", SUPPORTED, "1s to 30s"),
    Part("loop", SUPPORTED, "with an image as frame0; refused for text alone"),
    Part("keyframes.frame0", SUPPORTED, "a generation: its end is the first half of the video at most"),
    Part("keyframes.frame1", SUPPORTED, "a generation: its beginning is the last half of the video at most"),
    Part("concepts", SUPPORTED, "camera moves, as words of the prompt"),
    Part("callback_url", SUPPORTED), Part("generation_type", SUPPORTED),
)  # fmt: skip
_REFRAME = (
    Part("model", SUPPORTED), Part("media", SUPPORTED), Part("aspect_ratio", SUPPORTED), Part("prompt", SUPPORTED),
    Part("x_start, x_end, y_start, y_end, resized_width, resized_height", SUPPORTED, "together; not into the source"),
    Part("grid_position_x, grid_position_y", IGNORED, "the crop bounds say where the source lies"),
    Part("callback_url", SUPPORTED), Part("generation_type", SUPPORTED),
)  # fmt: skip
COVERAGE: tuple[Route, ...] = (
    Route("POST", "/generations", SUPPORTED, "older name of /generations/video", _VIDEO),
    Route("POST", "/generations/video", SUPPORTED, "", _VIDEO),
    Route("POST", "/generations/image", SUPPORTED, "", (
        Part("prompt", SUPPORTED), Part("model", SUPPORTED), Part("aspect_ratio", SUPPORTED),
        Part("format", SUPPORTED), Part("image_ref", SUPPORTED, "references"),
        Part("style_ref", SUPPORTED, "a reference like others"),
        Part("character_ref", SUPPORTED, "references"),
        Part("modify_image_ref", SUPPORTED, "a reference; pictures are not edited in place"),
        Part("sync", SUPPORTED), Part("sync_timeout", SUPPORTED), Part("callback_url", SUPPORTED),
        Part("generation_type", SUPPORTED),
    )),
    Route("POST", "/generations/image/reframe", SUPPORTED, "", (*_REFRAME, Part("format", SUPPORTED))),
    Route("POST", "/generations/video/reframe", SUPPORTED, "", (*_REFRAME, Part("first_frame", SUPPORTED))),
    Route("POST", "/generations/video/modify", SUPPORTED, "", (
        Part("mode", SUPPORTED, "how closely the source's brightness is followed: adhere_1 1.0 to reimagine_3 0.2"),
        Part("media", SUPPORTED, "the result is as long, and as large up to 1080p; 720p for a URL, whose size is not "
             "known yet"),
        Part("prompt", SUPPORTED), Part("first_frame", SUPPORTED),
        Part("model", SUPPORTED), Part("callback_url", SUPPORTED), Part("generation_type", SUPPORTED),
    )),
    Route("POST", "/generations/{generation_id}/upscale", SUPPORTED, "a new generation; resampled, nothing is invented",
          (Part("resolution", SUPPORTED), Part("callback_url", SUPPORTED), Part("generation_type", SUPPORTED))),
    Route("POST", "/generations/{generation_id}/audio", REFUSED, NO_AUDIO),
    Route("GET", "/generations", SUPPORTED, "", (Part("limit", SUPPORTED), Part("offset", SUPPORTED))),
    Route("GET", "/generations/{generation_id}", SUPPORTED),
    Route("DELETE", "/generations/{generation_id}", SUPPORTED, "what waits or runs is cancelled"),
    Route("GET", "/generations/concepts/list", SUPPORTED, "camera moves"),
    Route("GET", "/generations/camera_motion/list", SUPPORTED),
    Route("GET", "/credits", SUPPORTED, "in US cents by the price list"),
    Route("GET", "/ping", SUPPORTED),
)  # fmt: skip
