"""/api/v1/batches: many jobs with one id. The items are a JSON array, or a JSONL body or file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.datastructures import FormData, UploadFile

from mutoscope.jobs import batches, batching, plainjson
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, JobsError
from mutoscope.jobs.model import Caller, Priority
from mutoscope.jobs.service import Prepared
from mutoscope.jobs.spec import JobSpec, Strict
from mutoscope.server import edge
from mutoscope.server.api import schemas
from mutoscope.server.api.shape import DIALECT, answers, gives, integer, nothing, parsed, query, takes
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply


class BatchBody(Strict):
    """A batch: its jobs, and what holds for all of them."""

    items: tuple[Any, ...] = Field((), description="Bodies of POST /api/v1/jobs, 1 to 10,000.")
    confirm: bool = Field(True, description="false: only price it; POST .../confirm starts it.")
    name: str = Field("", max_length=200)
    priority: Priority = Priority.NORMAL
    webhook_url: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A batch that was sent, and what its items come to."""

    body: BatchBody
    specs: list[JobSpec]
    prepared: Sequence[Prepared] = ()


_TAKES = takes(BatchBody)
_TAKES["requestBody"]["content"] |= {
    "application/jsonl": {"schema": {"type": "string", "description": "A job a line; the rest in the query."}},
    "multipart/form-data": {
        "schema": {
            "type": "object", "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary"}, "confirm": {"enum": ["true", "false"]}},
        }
    },
}  # fmt: skip


def add(api: APIRouter, ctx: Context) -> None:
    async def complete(reply: Reply) -> None:
        """What was accepted is there when the answer is."""
        if reply.body["total"] > batching.PIECE:
            await edge.on_thread(lambda: batching.go_on(ctx.db, ctx.service, reply.body["id"]))

    @api.post(
        "/batches",
        openapi_extra=_TAKES,
        status_code=201,
        responses=gives(schemas.BATCH, 201),
        summary="Many jobs at once",
    )
    async def create(request: Request) -> Response:
        def parse(body: Any) -> Asked:
            if isinstance(body, str):  # JSON Lines, with the rest in the query
                return Asked(_options(dict(request.query_params)), batching.parse(body))
            if isinstance(body, FormData):
                text = _file(body)
                return Asked(_options(_fields(body)), batching.parse(text))
            batch = parsed(BatchBody, body)
            return Asked(batch, [batching.item(value, i) for i, value in enumerate(batch.items)])

        def before(tx: Tx, caller: Caller, asked: Asked) -> Asked:
            try:
                found = batching.prepare(tx, ctx.service, caller, asked.specs, asked.body.priority)
            except JobsError:  # `create` says it again, unless this is a repeat that has its answer already
                return asked
            return replace(asked, prepared=found)

        def act(tx: Tx, caller: Caller, asked: Asked) -> Reply:
            body = asked.body
            batch = batching.create(
                tx, ctx.service, caller, asked.specs, confirm=body.confirm, name=body.name, priority=body.priority,
                webhook_url=body.webhook_url, metadata=body.metadata, prepared=asked.prepared,
            )  # fmt: skip
            return Reply(201, batches.public(batch), {"location": f"/api/v1/batches/{batch.id}"})

        return await edge.write(ctx, request, parse, act, DIALECT, before=before, after=complete)

    @api.get(
        "/batches",
        openapi_extra=query(limit="int: 1 to 100, 20 unless said", offset="int: how many to pass over"),
        responses=gives(schemas.listing(schemas.BATCH)),
        summary="Your batches, newest first",
    )
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            limit, offset = integer(request, "limit", 20, 1, 100), integer(request, "offset", 0, 0, 10**6)
            found = batches.listing(tx, caller.account.id, limit=limit, offset=offset)
            return Reply(200, {"object": "list", "data": [batches.public(b) for b in found]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/batches/{batch_id}", responses=gives(schemas.BATCH), summary="One batch")
    async def retrieve(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, batches.public(batches.get(tx, caller.account.id, batch_id)))

        return await edge.read(ctx, request, act, DIALECT)

    @api.post(
        "/batches/{batch_id}/confirm",
        responses=gives(schemas.BATCH),
        summary="Start a batch that was only priced",
    )
    async def confirm(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, batches.public(batching.confirm(tx, ctx.service, caller, batch_id)))

        return await edge.write(ctx, request, nothing, act, DIALECT, after=complete)

    @api.post("/batches/{batch_id}/cancel", responses=gives(schemas.BATCH), summary="Stop a batch")
    async def cancel(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, batches.public(batching.cancel(tx, caller, batch_id)))

        async def rest(reply: Reply) -> None:
            if reply.body["total"] > batching.PIECE:
                await edge.on_thread(lambda: batching.stop_rest(ctx.db, batch_id))

        return await edge.write(ctx, request, nothing, act, DIALECT, after=rest)

    @api.get(
        "/batches/{batch_id}/results",
        responses=answers("application/jsonl"),
        response_class=Response,
        summary="The jobs of a batch, one JSON object a line",
    )
    async def results(request: Request, batch_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            text = "".join(batching.results(tx, caller.account.id, batch_id, ctx.links(request).output))
            return Reply(200, text.encode(), media_type="application/jsonl")

        return await edge.read(ctx, request, act, DIALECT)


def _file(form: FormData) -> str:
    sent = form.get("file")
    if not isinstance(sent, UploadFile):
        raise InvalidRequest("The form has no file in the field `file`.", field="file")
    try:
        return sent.file.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidRequest("The file is not UTF-8 text.", field="file") from e


def _fields(form: FormData) -> dict[str, Any]:
    return {name: value for name, value in form.multi_items() if name != "file"}


def _options(given: dict[str, Any]) -> BatchBody:
    """What holds for the batch, from texts."""
    options = dict(given)
    if "items" in options:
        raise InvalidRequest("The items are in the file already.", field="items")
    if "confirm" in options:
        if options["confirm"] not in ("true", "false"):
            raise InvalidRequest(
                f"confirm = {options['confirm']!r:.40}, expected true or false.", field="confirm"
            )
        options["confirm"] = options["confirm"] == "true"
    if "metadata" in options:
        try:
            options["metadata"] = plainjson.loads(str(options["metadata"]))
        except ValueError as e:
            raise InvalidRequest(f"metadata is not JSON: {e}.", field="metadata") from e
    return parsed(BatchBody, options)
