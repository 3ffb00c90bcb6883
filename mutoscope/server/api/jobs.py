"""/api/v1/jobs, /estimates, /events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from mutoscope.jobs import view
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, NotFound
from mutoscope.jobs.model import Caller, Job, State
from mutoscope.jobs.spec import JobSpec
from mutoscope.server import edge, files
from mutoscope.server.api import schemas
from mutoscope.server.api.shape import (
    DIALECT,
    answers,
    gives,
    integer,
    nothing,
    one_of,
    parsed,
    query,
    several,
    takes,
)
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply

STATES = tuple(state.value for state in State)
NAME = "api"


def shown(ctx: Context, request: Request, tx: Tx, job: Job) -> dict[str, Any]:
    """A job with fresh links."""
    return view.public(tx, job, ctx.links(request).output)


def add(api: APIRouter, ctx: Context) -> None:
    @api.post(
        "/jobs",
        openapi_extra=takes(JobSpec) | query(router="Id or slug of a router that decides."),
        status_code=201,
        responses=gives(schemas.JOB, 201),
        summary="Make a video or picture",
    )
    async def create(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, spec: JobSpec) -> Reply:
            router = request.query_params.get("router")
            job = ctx.service.submit(tx, caller, spec, dialect=NAME, router=router)
            return Reply(201, shown(ctx, request, tx, job), {"location": f"/api/v1/jobs/{job.id}"})

        return await edge.write(ctx, request, lambda body: parsed(JobSpec, body), act, DIALECT)

    @api.post(
        "/estimates",
        openapi_extra=takes(JobSpec) | query(router="Id or slug of a router that decides."),
        responses=gives(schemas.ESTIMATE),
        summary="What a job would cost and take",
    )
    async def estimate(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, spec: JobSpec) -> Reply:
            quote = ctx.service.estimate(tx, caller, spec, router=request.query_params.get("router"))
            body = {**vars(quote), "resolved": vars(quote.resolved), "candidates": list(quote.candidates)}
            return Reply(200, {"object": "estimate", **body})

        return await edge.write(ctx, request, lambda body: parsed(JobSpec, body), act, DIALECT)

    @api.get(
        "/jobs",
        openapi_extra=query(
            limit="int: 1 to 100, 20 unless said",
            after="Id of the last job seen.",
            order="desc or asc",
            state="One or more, separated by commas.",
            batch_id="Only those of a batch.",
        ),
        responses=gives(schemas.JOBS),
        summary="Your jobs, newest first",
    )
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            asked = request.query_params
            page = ctx.service.listing(
                tx, caller, limit=integer(request, "limit", 20, 1, 100), after=asked.get("after"),
                states=[State(s) for s in several(request, "state", STATES)], batch_id=asked.get("batch_id"),
                order=one_of(request, "order", ("desc", "asc")),
            )  # fmt: skip
            data = [shown(ctx, request, tx, job) for job in page.jobs]
            after = page.jobs[-1].id if page.has_more else None
            return Reply(200, {"object": "list", "data": data, "has_more": page.has_more, "after": after,
                               "total": page.total})  # fmt: skip

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/jobs/{job_id}", responses=gives(schemas.JOB), summary="One job")
    async def retrieve(request: Request, job_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, shown(ctx, request, tx, ctx.service.get(tx, caller, job_id)))

        return await edge.read(ctx, request, act, DIALECT)

    @api.post("/jobs/{job_id}/cancel", responses=gives(schemas.JOB), summary="Stop a job")
    async def cancel(request: Request, job_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, shown(ctx, request, tx, ctx.service.cancel(tx, caller, job_id)))

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.delete("/jobs/{job_id}", status_code=204, summary="Delete a job and its files")
    async def delete(request: Request, job_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            ctx.service.delete(tx, caller, job_id)
            return Reply(204)

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.get(
        "/jobs/{job_id}/content",
        openapi_extra=query(variant="video, image, thumbnail or spritesheet"),
        responses=answers("*/*"),
        response_class=Response,
        summary="The finished file",
    )
    async def content(request: Request, job_id: str) -> Response:
        def find(caller: Caller) -> Path:
            with ctx.db.read() as tx:
                job = ctx.service.get(tx, caller, job_id)
            role = request.query_params.get("variant", "")
            if job.state is not State.SUCCEEDED:
                raise Conflict(f"Job {job_id} is {job.state}; only a finished one has files.")
            for output in job.outputs:
                if role in ("", output.role):
                    return ctx.blobs.path(output.path)
            raise NotFound(f"Job {job_id} has no {role!r}: {', '.join(o.role for o in job.outputs)}.")

        async def answer() -> Response:
            caller = await edge.caller_of(ctx, request)
            return files.send(await edge.on_thread(lambda: find(caller)))

        return await edge.guarded(request, answer, DIALECT)

    @api.get(
        "/jobs/{job_id}/events",
        openapi_extra=query(after="As the header Last-Event-ID."),
        responses=answers("text/event-stream"),
        response_class=Response,
        summary="What happens to a job, as server-sent events",
    )
    async def job_events(request: Request, job_id: str) -> Response:
        async def answer() -> Response:
            caller = await edge.caller_of(ctx, request)
            after = last_event_id(request)

            def check() -> None:
                with ctx.db.read() as tx:
                    ctx.service.get(tx, caller, job_id)

            await edge.on_thread(check)
            return stream(ctx.tail.listen(caller.account.id, job_id=job_id, after=after))

        return await edge.guarded(request, answer, DIALECT)

    @api.get(
        "/events",
        openapi_extra=query(after="As the header Last-Event-ID."),
        responses=answers("text/event-stream"),
        response_class=Response,
        summary="What happens to all your jobs, as server-sent events",
    )
    async def events(request: Request) -> Response:
        async def answer() -> Response:
            caller = await edge.caller_of(ctx, request)
            return stream(ctx.tail.listen(caller.account.id, after=last_event_id(request)))

        return await edge.guarded(request, answer, DIALECT)


def last_event_id(request: Request) -> int | None:
    """Where the client was, from the header of EventSource or the query.

    Raises:
        InvalidRequest: not a number.
    """
    text = request.headers.get("last-event-id") or request.query_params.get("after")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(f"Last-Event-ID = {text!r:.40}, expected a number.", field="Last-Event-ID")
    return int(text)


def stream(lines: Any) -> Response:
    """Server-sent events; nothing between here and the client may hold them back."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
