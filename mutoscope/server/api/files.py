"""/api/v1/files: pictures and clips to be used in jobs as {"asset": ID}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.datastructures import FormData, UploadFile

from mutoscope.jobs import assets, inline
from mutoscope.jobs.assets import Asset
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.model import Caller
from mutoscope.jobs.spec import Strict
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.api import schemas
from mutoscope.server.api.shape import DIALECT, gives, integer, nothing, parsed, query, takes
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply


class UploadBody(Strict):
    """A file that will be sent to the `upload_url` of the answer."""

    filename: str = Field("", max_length=255)


_TAKES = takes(UploadBody)
_TAKES["requestBody"]["required"] = False
_TAKES["requestBody"]["content"]["multipart/form-data"] = {
    "schema": {
        "type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}
    }
}  # fmt: skip


def shown(asset: Asset) -> dict[str, Any]:
    """A file as the API shows it."""
    return {
        "id": asset.id,
        "object": "file",
        "state": asset.state,
        "filename": asset.filename,
        "mime": asset.mime,
        "size_bytes": asset.size_bytes,
        "sha256": asset.sha256,
        "info": asset.info,
        "created_at": iso(asset.created_at),
        "expires_at": iso(asset.expires_at),
    }


def add(api: APIRouter, ctx: Context) -> None:
    @api.post(
        "/files",
        openapi_extra=_TAKES,
        status_code=201,
        responses=gives(
            schemas.with_fields(schemas.FILE, upload_url=schemas.TEXT, sometimes=("upload_url",)), 201
        ),
        summary="Upload a file, or announce one",
    )
    async def create(request: Request) -> Response:
        def parse(body: Any) -> tuple[inline.Inline | None, str]:
            if not isinstance(body, FormData):
                return None, parsed(UploadBody, body if body is not None else {}).filename
            sent = body.get("file")
            if not isinstance(sent, UploadFile):
                raise InvalidRequest("The form has no file in the field `file`.", field="file")
            return inline.check(sent.file.read(), field="file"), Path(sent.filename or "").name

        def act(tx: Tx, caller: Caller, asked: tuple[inline.Inline | None, str]) -> Reply:
            found, filename = asked
            hours = ctx.settings.upload_hours
            if found is None:
                asset = assets.open_upload(tx, caller.account.id, filename=filename, hours=hours)
                return Reply(201, shown(asset) | {"upload_url": ctx.links(request).upload(asset.id)})
            media = assets.store(
                tx, caller.account.id, found, data_dir=ctx.settings.data_dir, hours=hours, filename=filename
            )
            assert media.asset is not None
            return Reply(201, shown(assets.get(tx, caller.account.id, media.asset)))

        return await edge.write(
            ctx, request, parse, act, DIALECT, max_bytes=ctx.settings.max_upload_bytes + 2**16
        )

    @api.get(
        "/files",
        openapi_extra=query(limit="int: 1 to 100, 50 unless said"),
        responses=gives(schemas.listing(schemas.FILE)),
        summary="Your files, newest first",
    )
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            found = assets.listing(tx, caller.account.id, limit=integer(request, "limit", 50, 1, 100))
            return Reply(200, {"object": "list", "data": [shown(a) for a in found]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get(
        "/files/{file_id}",
        responses=gives(schemas.with_fields(schemas.FILE, url=schemas.maybe(schemas.TEXT))),
        summary="One file",
    )
    async def retrieve(request: Request, file_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            asset = assets.get(tx, caller.account.id, file_id, states=("pending", "ready"))
            link = ctx.links(request).file(asset.path) if asset.state == "ready" else None
            return Reply(200, shown(asset) | {"url": link})

        return await edge.read(ctx, request, act, DIALECT)

    @api.delete("/files/{file_id}", status_code=204, summary="Delete a file")
    async def delete(request: Request, file_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            assets.delete(tx, caller.account.id, file_id, data_dir=ctx.settings.data_dir)
            return Reply(204)

        return await edge.write(ctx, request, nothing, act, DIALECT)
