"""OpenAI's Videos API under /openai/v1, as `client.videos` of the official SDK speaks it; docs/openai.md has examples.

Pure: the specs (`openai_bodies`), `from_job`, `error`. A video here is a job that was made through this API: others'
sizes and lengths have no name in its types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import APIRouter, Request, Response

from mutoscope.errors import MediaError, MutoscopeError, RequestError
from mutoscope.jobs import assets, errors, inline
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, NotFound, Unsupported
from mutoscope.jobs.inline import Inline, InputKind
from mutoscope.jobs.model import Caller, Failure, Job, Output, State
from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.server import edge, files
from mutoscope.server.context import Context
from mutoscope.server.dialects import inputs
from mutoscope.server.dialects.coverage import REFUSED, SUPPORTED, Part, Route
from mutoscope.server.dialects.inputs import Named
from mutoscope.server.dialects.openai_bodies import (
    Body,
    Clip,
    CreateBody,
    EditBody,
    ExtendBody,
    Refused,
    RemixBody,
    VideoReference,
    body_of,
    create_spec,
    edit_spec,
    extend_spec,
    missing,
    unpack,
)
from mutoscope.server.edge import Dialect, Reply

PREFIX = "/openai/v1"
NAME = "openai"
VARIANTS = ("video", "thumbnail", "spritesheet")
ORDERS = ("asc", "desc")
NO_CHARACTERS = "Characters are not supported: no model here keeps a person or thing apart from a video."
POLLS = 40
POLL_S = (0.25, 10.0)
"""A client is told to look about so often in the time that a job is expected to take, within these bounds."""
B = TypeVar("B", bound=Body)

STATUS: dict[State, str] = {
    State.QUEUED: "queued",
    State.THROTTLED: "queued",
    State.RUNNING: "in_progress",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "failed",
}
FAILURE_CODE: dict[Failure, str] = {
    Failure.INPUT_INVALID: "invalid_input",
    Failure.INPUT_UNREACHABLE: "failed_to_download_image",
    Failure.REQUEST_INVALID: "invalid_request",
    Failure.MODEL_UNAVAILABLE: "model_unavailable",
    Failure.OUT_OF_MEMORY: "out_of_memory",
    Failure.TIME_LIMIT: "time_limit",
    Failure.WORKER_LOST: "worker_lost",
    Failure.BAD_OUTPUT: "bad_output",
    Failure.STORAGE: "storage",
    Failure.INTERNAL: "server_error",
}
PARAMS: Mapping[str, str] = {
    "keyframes": "input_reference", "control": "video", "extend_start": "video", "width": "size", "height": "size",
    "frames": "seconds", "fps": "seconds", "steps": "num_inference_steps", "guidance": "guidance_scale",
}  # fmt: skip
"""Fields of a spec, and the parameters that they come from."""
INPUT_CODE: Mapping[str, str] = {
    inline.INVALID_DATA_URI: "invalid_base64_image",
    inline.UNSUPPORTED_TYPE: "unsupported_file_mimetype",
    inline.TOO_LARGE: "file_too_large",
}


# -- pure ----------------------------------------------------------------------------------------------------

_ERRORS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (errors.Unauthorized, 401, "invalid_request_error", "invalid_api_key"),
    (errors.OutOfCredits, 429, "insufficient_quota", "insufficient_quota"),
    (errors.LimitExceeded, 429, "requests", "rate_limit_exceeded"),
    (errors.Forbidden, 403, "invalid_request_error", "insufficient_permissions"),
    (errors.NotFound, 404, "invalid_request_error", "not_found"),
    (edge.MethodNotAllowed, 405, "invalid_request_error", "method_not_supported"),
    (errors.Conflict, 409, "invalid_request_error", "conflict"),
    (edge.BodyTooLarge, 413, "invalid_request_error", "request_too_large"),
    (errors.IdempotencyMismatch, 422, "invalid_request_error", "idempotency_mismatch"),
    (errors.Unsupported, 400, "invalid_request_error", "unsupported_value"),
    (errors.InvalidRequest, 400, "invalid_request_error", "invalid_value"),
    (edge.Busy, 503, "server_error", "service_unavailable"),
    (errors.JobsError, 400, "invalid_request_error", None),
    (RequestError, 400, "invalid_request_error", None),
    (MediaError, 400, "invalid_request_error", None),
    (Exception, 500, "server_error", None),
)
"""Status, type and code of what goes wrong; the first line that fits."""


def error(exc: Exception) -> Reply:
    """{"error": {"message", "type", "param", "code"}}"""
    _, status, kind, code = next(line for line in _ERRORS if isinstance(exc, line[0]))
    if isinstance(exc, Refused):
        code = exc.code
    elif isinstance(exc, inline.InputRefused):
        code = INPUT_CODE.get(exc.reason, code)
    field = getattr(exc, "field", "") if isinstance(exc, MutoscopeError) else ""
    headers = {"x-should-retry": "false"} if isinstance(exc, errors.OutOfCredits) else {}
    told = {"message": edge.sentence(exc), "type": kind, "param": param(field) or None, "code": code}
    return Reply(status, {"error": told}, headers)


def param(field: str) -> str:
    """A field of a spec as the caller knows it: `keyframes[0].asset` is input_reference."""
    head = field.partition("[")[0].partition(".")[0]
    return PARAMS.get(head, field)


DIALECT = Dialect(NAME, error)


def from_job(job: Job, retention_s: float) -> dict[str, Any]:
    """A Video. `retention_s`: how long files are kept after the end."""
    done = job.state is State.SUCCEEDED and job.finished_at is not None
    return {
        "id": job.id,
        "object": "video",
        "status": STATUS[job.state],
        "progress": 100 if done else min(99, int(100 * job.progress)),
        "created_at": int(job.created_at),
        "completed_at": int(job.finished_at or 0) if done else None,
        "expires_at": int((job.finished_at or 0) + retention_s) if done else None,
        "model": job.model_asked,
        "prompt": job.spec.get("prompt"),
        "seconds": job.vendor["seconds"],
        "size": job.vendor["size"],
        "remixed_from_video_id": job.vendor.get("remixed_from_video_id"),
        "error": failure(job),
    }


def failure(job: Job) -> dict[str, str] | None:
    """Why it failed."""
    if job.state is State.CANCELLED:
        return {"code": "cancelled", "message": "The video was cancelled."}
    if job.failure is None:
        return None
    return {"code": FAILURE_CODE[job.failure], "message": job.message or job.failure.value}


def poll_headers(job: Job) -> dict[str, str]:
    """When to look again; the SDK keeps to what it is told first."""
    if job.is_terminal:
        return {}
    low, high = POLL_S
    return {"openai-poll-after-ms": str(round(1000 * min(high, max(low, job.estimate_s / POLLS))))}


# -- routes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked(Generic[B]):
    """A body with its files looked into: one that was sent, or pictures in data URIs."""

    body: B
    file: Inline | None = None
    found: Mapping[str, Inline] | None = None


def router(ctx: Context) -> APIRouter:
    """All routes. Fixed paths come before those with an id."""
    api = APIRouter(prefix=PREFIX)
    _creating(api, ctx)
    _working_on(api, ctx)
    _watching(api, ctx)
    return api


def _creating(api: APIRouter, ctx: Context) -> None:
    @api.post("/videos", name="openai_create")
    async def create(request: Request) -> Response:
        def parse(value: Any) -> Asked[CreateBody]:
            fields, sent = unpack(value, files=("input_reference",))
            body = body_of(CreateBody, fields)
            create_spec(body, None)
            if "input_reference" in sent:
                return Asked(body, _open(ctx, sent["input_reference"], inline.ANY, "input_reference"))

            return Asked(body, found=inputs.look(_named(body), ctx.settings))

        def act(tx: Tx, caller: Caller, asked: Asked[CreateBody]) -> Reply:
            body = asked.body
            reference, is_clip = _given(ctx, tx, caller, asked)
            spec = create_spec(body, reference, is_clip=is_clip)
            return _submit(ctx, tx, caller, spec, {"seconds": body.seconds, "size": body.size})

        return await edge.write(ctx, request, parse, act, DIALECT)


def _working_on(api: APIRouter, ctx: Context) -> None:
    def worked_on(
        path: str, kind: type[B], to_spec: Callable[[B, Clip], JobSpec], seconds: Callable[[B, Clip], float]
    ) -> None:
        """A route whose `video` is an id or a file."""

        async def work_on(request: Request) -> Response:
            def parse(value: Any) -> Asked[B]:
                fields, sent = unpack(value, files=("video",))
                body = body_of(kind, fields)
                if "video" in sent:
                    file = _open(ctx, sent["video"], ("video",), "video")
                    to_spec(body, Clip.of_file(file, _PLACEHOLDER))
                    return Asked(body, file)
                if _reference(body) is None:
                    raise missing("video")
                return Asked(body)

            def act(tx: Tx, caller: Caller, asked: Asked[B]) -> Reply:
                clip = _clip(ctx, tx, caller, asked)
                vendor = {"seconds": f"{round(seconds(asked.body, clip), 3):g}", "size": clip.size}
                return _submit(ctx, tx, caller, to_spec(asked.body, clip), vendor)

            return await edge.write(ctx, request, parse, act, DIALECT)

        api.add_api_route(path, work_on, methods=["POST"], name=f"openai {path}")

    def whole(body: ExtendBody, clip: Clip) -> float:
        return clip.seconds + float(body.seconds)

    worked_on("/videos/edits", EditBody, edit_spec, lambda _, clip: clip.seconds)
    worked_on("/videos/extensions", ExtendBody, extend_spec, whole)

    @api.post("/videos/{video_id}/remix", name="openai_remix")
    async def remix(request: Request, video_id: str) -> Response:
        def act(tx: Tx, caller: Caller, body: RemixBody) -> Reply:
            clip = Clip.of_job(finished(ctx, tx, caller, video_id))
            vendor = {"seconds": f"{clip.seconds:g}", "size": clip.size, "remixed_from_video_id": video_id}
            return _submit(ctx, tx, caller, edit_spec(body, clip), vendor)

        return await edge.write(
            ctx, request, lambda value: body_of(RemixBody, unpack(value)[0]), act, DIALECT
        )

    @api.post("/videos/characters", name="openai_create_character")
    async def create_character(request: Request) -> Response:
        def act(_tx: Tx, _caller: Caller, _body: None) -> Reply:
            raise Unsupported(NO_CHARACTERS)

        return await edge.write(ctx, request, lambda _: None, act, DIALECT)

    @api.get("/videos/characters/{character_id}", name="openai_get_character")
    async def character(request: Request, character_id: str) -> Response:
        def act(_tx: Tx, _caller: Caller) -> Reply:
            raise Unsupported(NO_CHARACTERS)

        return await edge.read(ctx, request, act, DIALECT)


def _watching(api: APIRouter, ctx: Context) -> None:
    @api.get("/videos", name="openai_list")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            query = request.query_params
            order = _one_of("order", query.get("order", "desc"), ORDERS)
            try:
                page = ctx.service.listing(
                    tx, caller, limit=_limit(query.get("limit", "20")), order=order,
                    after=query.get("after"), dialects=(NAME,),
                )  # fmt: skip
            except NotFound as e:
                raise Refused(e.message, field="after") from e
            data = [from_job(job, _retention_s(ctx)) for job in page.jobs]
            first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
            return Reply(200, {"object": "list", "data": data, "has_more": page.has_more, "first_id": first,
                               "last_id": last})  # fmt: skip

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/videos/{video_id}", name="openai_retrieve")
    async def retrieve(request: Request, video_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            job = video(ctx, tx, caller, video_id)
            return Reply(200, from_job(job, _retention_s(ctx)), poll_headers(job))

        return await edge.read(ctx, request, act, DIALECT)

    @api.delete("/videos/{video_id}", name="openai_delete")
    async def delete(request: Request, video_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            ctx.service.delete(tx, caller, video(ctx, tx, caller, video_id).id)
            return Reply(200, {"id": video_id, "object": "video.deleted", "deleted": True})

        return await edge.write(ctx, request, lambda _: None, act, DIALECT)

    @api.get("/videos/{video_id}/content", name="openai_content")
    async def content(request: Request, video_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            variant = _one_of("variant", request.query_params.get("variant", "video"), VARIANTS)
            job = video(ctx, tx, caller, video_id)
            path = ctx.blobs.path(file_of(job, variant).path)
            name = job.id if variant == "video" else f"{job.id}_{variant}"
            return Reply(200, files.send(path, filename=f"{name}{path.suffix}"))

        return await edge.read(ctx, request, act, DIALECT)


# -- what routes share ---------------------------------------------------------------------------------------


def video(ctx: Context, tx: Tx, caller: Caller, video_id: str) -> Job:
    """A video of this account.

    Raises:
        NotFound: none was made through this API, or it was deleted.
    """
    none = f"Video with id '{video_id:.100}' not found."
    try:
        job = ctx.service.get(tx, caller, video_id)
    except NotFound as e:
        raise NotFound(none) from e
    if job.dialect != NAME:
        raise NotFound(none, hint="Jobs of other APIs are shown by those, and by /api/v1/jobs.")
    return job


def finished(ctx: Context, tx: Tx, caller: Caller, video_id: str) -> Job:
    """A completed video of this account with its files.

    Raises:
        NotFound, Conflict.
    """
    job = video(ctx, tx, caller, video_id)
    if job.state is not State.SUCCEEDED:
        raise Conflict(f"Video '{video_id}' is {STATUS[job.state]}; it has to be completed.")
    if not job.outputs:
        raise Conflict(f"Video '{video_id}' has expired: its files were deleted.")
    return job


def file_of(job: Job, variant: str) -> Output:
    """The file to send.

    Raises:
        NotFound: not yet, not any more, or never.
    """
    if not job.is_terminal:
        raise NotFound(f"Video is not ready yet, use GET {PREFIX}/videos/{job.id} to check its status.")
    if job.state is not State.SUCCEEDED:
        raise NotFound(f"Video '{job.id}' failed: it has no content.")
    if not job.outputs:
        raise NotFound(f"Video '{job.id}' has expired: its files were deleted.")
    output = next((o for o in job.outputs if o.role == variant), None)
    if output is None:
        raise NotFound(f"Video '{job.id}' has no {variant}.")
    return output


def _submit(ctx: Context, tx: Tx, caller: Caller, spec: JobSpec, vendor: dict[str, Any]) -> Reply:
    job = ctx.service.submit(tx, caller, spec, dialect=NAME, vendor=vendor)
    return Reply(200, from_job(job, _retention_s(ctx)), poll_headers(job))


def _named(body: CreateBody) -> list[Named]:
    """The picture that a body names by URL.

    Raises:
        Refused: neither or both of file_id and image_url.
    """
    reference = body.input_reference
    if reference is None:
        return []
    if (reference.file_id is None) == (reference.image_url is None):
        both = "Give exactly one of 'input_reference.file_id' and 'input_reference.image_url'."
        raise Refused(both, field="input_reference")
    url = reference.image_url
    return [] if url is None else [Named("input_reference.image_url", url, "image")]


def _given(ctx: Context, tx: Tx, caller: Caller, asked: Asked[CreateBody]) -> tuple[Media | None, bool]:
    """The reference, if there is one, and whether it is a clip. What a URL leads to is expected to be a picture."""
    if asked.file is not None:
        return _store(ctx, tx, caller, asked.file), asked.file.kind == "video"
    reference = asked.body.input_reference
    if reference is None:
        return None, False
    if reference.file_id is not None:
        try:
            asset = assets.get(tx, caller.account.id, reference.file_id)
        except NotFound as e:
            raise Refused(str(e), field="input_reference.file_id") from e
        return asset.media, asset.info.get("kind") == "video"
    kept = inputs.keep(tx, caller.account.id, _named(asked.body), asked.found or {}, ctx.settings)
    return kept[str(reference.image_url)].media, False


def _clip(ctx: Context, tx: Tx, caller: Caller, asked: Asked[B]) -> Clip:
    """The video that is worked on."""
    if asked.file is not None:
        return Clip.of_file(asked.file, _store(ctx, tx, caller, asked.file))
    reference = _reference(asked.body)
    assert reference is not None
    return Clip.of_job(finished(ctx, tx, caller, reference.id))


def _reference(body: Body) -> VideoReference | None:
    return body.video if isinstance(body, EditBody | ExtendBody) else None


def _open(ctx: Context, data: bytes, kinds: tuple[InputKind, ...], field: str) -> Inline:
    """A file that was sent, looked into."""
    return inline.check(data, kinds=kinds, field=field, max_bytes=ctx.settings.max_body_bytes)


def _store(ctx: Context, tx: Tx, caller: Caller, file: Inline) -> Media:
    settings = ctx.settings
    return assets.store(tx, caller.account.id, file, data_dir=settings.data_dir, hours=settings.upload_hours)


def _retention_s(ctx: Context) -> float:
    return ctx.settings.retention_days * 24 * 3600


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise Refused(
            f"Invalid value: '{value:.100}'. Supported values are: {', '.join(map(repr, known))}.", field=name
        )
    return value


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:12]) <= 100:
        raise Refused(
            f"Invalid 'limit': expected a whole number from 1 to 100, got '{text:.20}'.", field="limit"
        )
    return int(text)


_PLACEHOLDER = Media(asset="not-kept-yet")

_OURS = (
    Part("negative_prompt, seed, num_inference_steps, guidance_scale", SUPPORTED,
         "not OpenAI's: `extra_body` of the SDK"),
    Part("loras, cache, guidance_interval, guidance_kind", SUPPORTED,
         "not OpenAI's: as in our own API; in forms, which the SDK sends, lists are texts of JSON"),
)  # fmt: skip
_PROMPT = Part("prompt", SUPPORTED, "1 to 20,000 characters")
COVERAGE: tuple[Route, ...] = (
    Route("POST", "/videos", SUPPORTED, "JSON or multipart", (
        _PROMPT,
        Part("model", SUPPORTED, "sora-2, sora-2-pro and their dated names lead to a model of yours, see "
             "jobs/aliases.toml; names of your own models are taken too"),
        Part("seconds", SUPPORTED, "4, 8 or 12"),
        Part("size", SUPPORTED, "OpenAI's four, each of any model"),
        Part("input_reference", SUPPORTED, "a file: a picture is the first frame, scaled and cropped to the size; of a "
             "clip the structure is followed (its luminance), from its beginning to its end in `seconds`; one of fewer "
             "frames than the video makes it shorter"),
        Part("input_reference.image_url", SUPPORTED, "https or data URL; fetched when the job runs"),
        Part("input_reference.file_id", SUPPORTED, "of a file uploaded with POST /api/v1/files"),
        *_OURS,
    )),
    Route("GET", "/videos", SUPPORTED, "videos made through this API", (
        Part("after", SUPPORTED), Part("limit", SUPPORTED, "1 to 100, 20 unless said"), Part("order", SUPPORTED),
    )),
    Route("GET", "/videos/{video_id}", SUPPORTED, "with the header openai-poll-after-ms while it is made"),
    Route("DELETE", "/videos/{video_id}", SUPPORTED, "what waits or runs is cancelled"),
    Route("GET", "/videos/{video_id}/content", SUPPORTED, "with ranges", (
        Part("variant", SUPPORTED, "video (MP4), thumbnail (WebP), spritesheet (JPEG)"),
    )),
    Route("POST", "/videos/{video_id}/remix", SUPPORTED, "the structure is kept (the video's luminance is followed)",
          (_PROMPT, *_OURS)),
    Route("POST", "/videos/edits", SUPPORTED, "like remix", (
        _PROMPT, Part("video", SUPPORTED, "a file, 300 s at most; the result has 1280x720 or 720x1280"),
        Part("video.id", SUPPORTED), *_OURS,
    )),
    Route("POST", "/videos/extensions", SUPPORTED, "the video, and what comes after it, as one", (
        _PROMPT, Part("video", SUPPORTED, "a file"), Part("video.id", SUPPORTED),
        Part("seconds", SUPPORTED, "4, 8, 12, 16 or 20; refused if the video is longer: a model is given at most half"),
        *_OURS,
    )),
    Route("POST", "/videos/characters", REFUSED, NO_CHARACTERS),
    Route("GET", "/videos/characters/{character_id}", REFUSED, NO_CHARACTERS),
)  # fmt: skip
