"""Luma's Agents API under /agents/v1, as the `luma-agents` SDK speaks it; docs/luma.md has examples.

Pure: the specs (`luma_agents_bodies`), `from_job`, `from_asset`, `error`. A generation here is a job that was made
through this API. Its files are in `luma_agents_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from mutoscope.jobs import assets
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, NotFound
from mutoscope.jobs.inline import Inline
from mutoscope.jobs.model import Caller, Failure, Job, Output, State
from mutoscope.jobs.service import finished
from mutoscope.jobs.spec import Media
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.context import Context
from mutoscope.server.dialects import inputs, luma_agents_files
from mutoscope.server.dialects.coverage import IGNORED, REFUSED, SUPPORTED, Part, Route
from mutoscope.server.dialects.inputs import File
from mutoscope.server.dialects.luma_agents_bodies import (
    FOLLOWED,
    GenerationBody,
    ImageRef,
    Impossible,
    Named,
    check,
    spec_of,
)
from mutoscope.server.dialects.luma_agents_files import error
from mutoscope.server.dialects.luma_bodies import body_of
from mutoscope.server.edge import Dialect, Reply

__all__ = ["COVERAGE", "DIALECT", "PREFIX", "STATUS", "error", "from_job", "router"]

PREFIX = "/agents/v1"
NAME = "luma_agents"

STATUS: dict[State, str] = {
    State.QUEUED: "queued",
    State.THROTTLED: "queued",
    State.RUNNING: "processing",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "failed",
}
FAILURE_CODE: dict[Failure, str] = {
    Failure.INPUT_INVALID: "corrupt_input",
    Failure.INPUT_UNREACHABLE: "invalid_request",
    Failure.REQUEST_INVALID: "invalid_request",
    Failure.MODEL_UNAVAILABLE: "generation_failed",
    Failure.OUT_OF_MEMORY: "generation_failed",
    Failure.TIME_LIMIT: "generation_failed",
    Failure.WORKER_LOST: "generation_failed",
    Failure.BAD_OUTPUT: "generation_failed",
    Failure.STORAGE: "generation_failed",
    Failure.INTERNAL: "generation_failed",
}
"""Luma's nine codes are a closed list; our sentence says the rest."""
DIALECT = Dialect(NAME, error)


# -- pure ----------------------------------------------------------------------------------------------------


def from_job(job: Job, link: Callable[[Job, Output], str]) -> dict[str, Any]:
    """A Generation."""
    made = [o for o in job.outputs if o.role in ("video", "image")]
    output = [{"type": o.role, "url": link(job, o)} for o in made] if job.state is State.SUCCEEDED else None
    code, reason = failure(job)
    return {
        "id": job.id,
        "type": job.vendor["type"],
        "state": STATUS[job.state],
        "model": job.model_asked,
        "created_at": iso(job.created_at),
        "output": output,
        "failure_reason": reason,
        "failure_code": code,
    }


def failure(job: Job) -> tuple[str | None, str | None]:
    """Code and sentence."""
    if job.state is State.CANCELLED:
        return "generation_failed", "Cancelled."
    if job.state is State.SUCCEEDED and not job.outputs:
        return "output_not_found", "The files were deleted: their time was over."
    if job.failure is None:
        return None, None
    return FAILURE_CODE[job.failure], job.message or job.failure.value


# -- routes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A body with the files inside of it looked into."""

    body: GenerationBody
    named: tuple[Named, ...]
    found: Mapping[str, Inline]


def router(ctx: Context) -> APIRouter:
    """All routes."""
    api = APIRouter(prefix=PREFIX)

    @api.post("/generations", name="agents_create")
    async def create(request: Request) -> Response:
        def parse(value: Any) -> Asked:
            body = body_of(GenerationBody, value)
            check(body)
            named = tuple(body.named())
            spec_of(
                body, {n.ref: File(_PLACEHOLDER, n.kind, frames=10**9) for n in named}
            )  # refused before a look
            return Asked(body, named, inputs.look(_inside(named), ctx.settings))

        def act(tx: Tx, caller: Caller, asked: Asked) -> Reply:
            files = _files(ctx, tx, caller, asked)
            spec = spec_of(asked.body, files)
            job = ctx.service.submit(tx, caller, spec, dialect=NAME, vendor={"type": asked.body.kind})
            return _told(201, from_job(job, ctx.links(request).output))

        return await edge.write(ctx, request, parse, act, DIALECT)

    @api.get("/generations/{generation_id}", name="agents_retrieve")
    async def retrieve(request: Request, generation_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            job = ctx.service.get(tx, caller, generation_id)
            if job.dialect != NAME:
                raise NotFound(
                    f"No generation {generation_id:.100}.",
                    hint="Jobs of other APIs are shown by those, and by /api/v1/jobs.",
                )
            return _told(200, from_job(job, ctx.links(request).output))

        return await edge.read(ctx, request, act, DIALECT)

    luma_agents_files.add(api, ctx, DIALECT)
    return api


def _told(status: int, body: Any) -> Reply:
    return Reply(status, body, luma_agents_files.HEADERS)


def _inside(named: tuple[Named, ...]) -> list[inputs.Named]:
    """The URLs and data of a body."""
    return [inputs.Named(one.field, one.ref.uri, one.kind) for one in named if one.ref.uri is not None]


def _files(ctx: Context, tx: Tx, caller: Caller, asked: Asked) -> dict[ImageRef, File]:
    """Every reference as a file; data become assets.

    Raises:
        InvalidRequest: a file or generation that is not there, or has not been finished.
        Impossible: one that is not of the expected kind.
    """
    kept = inputs.keep(tx, caller.account.id, _inside(asked.named), asked.found, ctx.settings)
    files: dict[ImageRef, File] = {}
    for one in asked.named:
        ref = one.ref
        if ref.file_id is not None:
            file = _uploaded(tx, caller, one, ref.file_id)
        elif ref.generation_id is not None:
            file = _made(tx, caller, one, ref.generation_id)
        else:
            assert ref.uri is not None
            file = kept[ref.uri]
        files[ref] = file
    return files


def _uploaded(tx: Tx, caller: Caller, one: Named, file_id: str) -> File:
    field = f"{one.field}.file_id"
    try:
        asset = assets.get(tx, caller.account.id, file_id)
    except NotFound as e:
        raise InvalidRequest(f"{field}: {e.message}", field=field, hint=e.hint) from e
    held = asset.info.get("kind")  # an animation serves as both
    if held in ("image", "video") and held != one.kind:
        raise Impossible(f"{field}: is {asset.mime}, {one.kind}/* expected.", field=field)
    return File.of(asset.media, one.kind, asset.info)


def _made(tx: Tx, caller: Caller, one: Named, generation_id: str) -> File:
    """A finished generation. As start_frame and end_frame a video is what is extended."""
    field = f"{one.field}.generation_id"
    job = finished(tx, caller.account.id, generation_id, field=field)
    output = next(o for o in job.outputs if o.role in ("video", "image"))
    is_end = one.field in ("video.start_frame", "video.end_frame")
    if output.role != one.kind and not (is_end and output.role == "video"):
        raise Impossible(f"{field}: made a {output.role}, a {one.kind} expected.", field=field)
    seconds = output.frames / output.fps if output.fps else None
    return File(
        Media(job=job.id), "video" if output.role == "video" else "image", seconds, output.frames or None,
        (output.width, output.height) if output.width and output.height else None,
    )  # fmt: skip


_PLACEHOLDER = Media(asset="not-kept-yet")

_FRAME = "a picture; the generation_id of a video extends it: half of the new video is its end (or beginning)"
COVERAGE: tuple[Route, ...] = (
    Route("POST", "/generations", SUPPORTED, "", (
        Part("prompt", SUPPORTED, "1 to 6,000 characters"),
        Part("model", SUPPORTED, "uni-1, uni-1-max and ray-3.2 lead to a model of yours, see jobs/aliases.toml"),
        Part("type", SUPPORTED, "image, image_edit, video, video_edit, video_reframe; layering is refused: pictures "
             "here have one layer"),
        Part("aspect_ratio", SUPPORTED, "left out: that of the source, or 16:9"),
        Part("image_ref", SUPPORTED, "references"),
        Part("source", SUPPORTED, "of image_edit: a reference like others, pictures are not edited in place"),
        Part("source.url, source.data, source.file_id, source.generation_id, source.media_type", SUPPORTED,
             "as in all other references; URLs are fetched when the job runs"),
        Part("style", SUPPORTED, "manga: words of the prompt"),
        Part("output_format", SUPPORTED),
        Part("web_search", REFUSED, "nothing is looked up on the web; false is taken"),
        Part("layering", REFUSED, "pictures here have one layer"),
        Part("user_id", SUPPORTED, "kept with the job, shown by /api/v1/jobs and webhooks as metadata.user_id"),
        Part("video.resolution", SUPPORTED, "360p is made as a draft"),
        Part("video.duration", SUPPORTED),
        Part("video.hdr", SUPPORTED, "HDR10, expanded from what the model makes"),
        Part("video.exr_export", REFUSED, "a job delivers one file; EXR frames of the clip are the operation hdr"),
        Part("video.loop", SUPPORTED, "with a picture as start_frame; refused for text alone and for extensions"),
        Part("video.start_frame", SUPPORTED, _FRAME),
        Part("video.end_frame", SUPPORTED, _FRAME),
        Part("video.keyframes, video.keyframe_indexes", SUPPORTED),
        Part("video.source_position", SUPPORTED, "refused where the source reaches beyond the picture"),
        Part("video.edit.strength", SUPPORTED, "how closely the source's brightness is followed: adhere_1 1.0 to "
             "reimagine_3 0.2"),
        Part("video.edit.auto_controls", IGNORED, FOLLOWED),
        Part("video.edit.controls", REFUSED, f"no model here finds pose, depth, normals, trajectories or faces in a "
             f"clip; {FOLLOWED}. Signals that are not enabled are taken"),
        Part("video.edit.keyframes, video.edit.keyframe_indexes", SUPPORTED, "for a clip by URL only index 0"),
    )),
    Route("GET", "/generations/{generation_id}", SUPPORTED, "fresh links on each"),
    *luma_agents_files.COVERAGE,
)  # fmt: skip
