"""/api/v1/batches: many jobs with one id. The items are a JSON array, or a JSONL body or file."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.datastructures import FormData, UploadFile

from mutoscope.jobs import batches, batching, queue, view
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.model import Caller, Priority
from mutoscope.jobs.spec import JobSpec, Strict
from mutoscope.server import edge
from mutoscope.server.api.shape import DIALECT, integer, nothing, parsed, takes
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply


class BatchBody(Strict):
    """A batch: its jobs, and what holds for all of them."""

    items: tuple[dict[str, Any], ...] = Field(description="Bodies of POST /api/v1/jobs.")
    confirm: bool = Field(True, description="false: only price it; POST .../confirm starts it.")
    name: str = Field("", max_length=200)
    priority: Priority = Priority.NORMAL
    webhook_url: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


def add(api: APIRouter, ctx: Context) -> None:
    @api.post("/batches", openapi_extra=takes(BatchBody), status_code=201, summary="Many jobs at once")
    async def create(request: Request) -> Response:
        def parse(body: Any) -> tuple[BatchBody, list[JobSpec]]:
            options = _from_form(body) if isinstance(body, FormData) else body
            batch = parsed(BatchBody, options)
            return batch, [parsed(JobSpec, item, f"items.{i}") for i, item in enumerate(batch.items)]

        def act(tx: Tx, caller: Caller, asked: tuple[BatchBody, list[JobSpec]]) -> Reply:
            body, specs = asked
            batch = batching.create(
                tx, ctx.service, caller, specs, confirm=body.confirm, name=body.name, priority=body.priority,
                webhook_url=body.webhook_url, metadata=body.metadata,
            )  # fmt: skip
            return Reply(201, batches.public(batch), {"location": f"/api/v1/batches/{batch.id}"})

        return await edge.write(ctx, request, parse, act, DIALECT)

    @api.get("/batches", summary="Your batches, newest first")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            limit, offset = integer(request, "limit", 20, 1, 100), integer(request, "offset", 0, 0, 10**6)
            found = batches.listing(tx, caller.account.id, limit=limit, offset=offset)
            return Reply(200, {"object": "list", "data": [batches.public(b) for b in found]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/batches/{batch_id}", summary="One batch")
    async def retrieve(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, batches.public(batches.get(tx, caller.account.id, batch_id)))

        return await edge.read(ctx, request, act, DIALECT)

    @api.post("/batches/{batch_id}/confirm", summary="Start a batch that was only priced")
    async def confirm(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, batches.public(batching.confirm(tx, ctx.service, caller, batch_id)))

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.post("/batches/{batch_id}/cancel", summary="Stop a batch")
    async def cancel(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, batches.public(batching.cancel(tx, caller, batch_id)))

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.get("/batches/{batch_id}/results", summary="The jobs of a batch, one JSON object a line")
    async def results(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            batches.get(tx, caller.account.id, batch_id)
            link = ctx.links(request).output
            lines = []
            for job_id in batches.job_ids(tx, batch_id):
                job = view.public(tx, queue.get(tx, job_id, deleted=True), link)
                lines.append(json.dumps(job, separators=(",", ":"), ensure_ascii=False))
            text = "".join(line + "\n" for line in lines)
            return Reply(200, text.encode(), media_type="application/jsonl")

        return await edge.read(ctx, request, act, DIALECT)


def _from_form(form: FormData) -> dict[str, Any]:
    """A multipart body: `file` holds the items, one a line; other fields as in JSON."""
    sent = form.get("file")
    if not isinstance(sent, UploadFile):
        raise InvalidRequest("The form has no file in the field `file`.", field="file")
    items = []
    for number, line in enumerate(sent.file.read().decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except ValueError as e:
            raise InvalidRequest(
                f"Line {number} of the file is not JSON: {e}.", field=f"items.{number}"
            ) from e
    options: dict[str, Any] = {"items": items}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if name == "confirm":
            options[name] = value == "true"
        elif name == "metadata" and isinstance(value, str):
            try:
                options[name] = json.loads(value)
            except ValueError as e:
                raise InvalidRequest(f"metadata: is not JSON: {e}.", field="metadata") from e
        else:
            options[name] = value
    return options
