"""Signed files: finished videos out, uploads in. Whoever holds the link may use it; no key is asked for."""

from __future__ import annotations

import mimetypes
import os
import tempfile
from pathlib import Path

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse

from mutoscope.jobs import assets
from mutoscope.jobs.blobs import OUTPUTS
from mutoscope.jobs.errors import InvalidRequest, NotFound
from mutoscope.jobs.schema import jobs
from mutoscope.server import edge
from mutoscope.server.context import Context
from mutoscope.server.edge import Dialect, Reply

INCOMING = "incoming"


def error(exc: Exception) -> Reply:
    """Of links: a sentence."""
    code = getattr(exc, "code", "error")
    return Reply(edge.status_of(exc), {"error": {"code": code, "message": edge.sentence(exc)}})


DIALECT = Dialect("files", error)


def router(ctx: Context) -> APIRouter:
    api = APIRouter(include_in_schema=False)

    @api.api_route("/files/{path:path}", methods=["GET", "HEAD"], name="file")
    async def download(request: Request, path: str) -> Response:
        def find() -> Path:
            _check(ctx, request, path, "read")
            if path.startswith(f"{OUTPUTS}/"):
                _not_deleted(ctx, path.split("/")[1])
            return ctx.blobs.path(path)

        async def answer() -> Response:
            return send(await edge.on_thread(find))

        return await edge.guarded(request, answer, DIALECT)

    @api.post("/uploads/{asset_id}", name="upload_form")
    async def upload_form(request: Request, asset_id: str) -> Response:
        """Runway's second step: a form with any fields and one file, `file`."""

        async def answer() -> Reply:
            await edge.on_thread(lambda: _check(ctx, request, asset_id, "upload"))
            form = await edge.read_form(request, ctx.settings.max_upload_bytes + 2**16)
            try:
                sent = form.get("file")
                if not isinstance(sent, UploadFile):
                    raise InvalidRequest("The form has no file in the field `file`.", field="file")
                path = _incoming(ctx)
                with path.open("wb") as out:
                    while chunk := await sent.read(2**20):
                        out.write(chunk)
                name = sent.filename or ""
            finally:
                await form.close()
            await edge.on_thread(lambda: arrived(ctx, asset_id, path, filename=name))
            return Reply(204)

        return await edge.guarded(request, answer, DIALECT)

    @api.put("/uploads/{asset_id}", name="upload_bytes")
    async def upload_bytes(request: Request, asset_id: str) -> Response:
        """The bytes as they are."""

        async def answer() -> Reply:
            await edge.on_thread(lambda: _check(ctx, request, asset_id, "upload"))
            path = _incoming(ctx)
            try:
                with path.open("wb") as out:
                    async for chunk in edge.limited(request, ctx.settings.max_upload_bytes):
                        out.write(chunk)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            await edge.on_thread(lambda: arrived(ctx, asset_id, path))
            return Reply(200)

        return await edge.guarded(request, answer, DIALECT)

    return api


def send(path: Path, *, filename: str | None = None) -> Response:
    """A file with ranges, ETag and its own type."""
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {"cache-control": "private, max-age=3600", "x-content-type-options": "nosniff"}
    return FileResponse(path, media_type=mime, filename=filename or path.name,
                        content_disposition_type="inline", headers=headers)  # fmt: skip


def arrived(ctx: Context, asset_id: str, path: Path, *, filename: str = "") -> assets.Asset:
    """The bytes of an announced upload are in `path`: looked into, then moved to their place."""
    try:
        found = assets.check_upload(path, max_bytes=ctx.settings.max_upload_bytes)
        with ctx.db.write() as tx:
            return assets.finish_upload(
                tx, asset_id, found, data_dir=ctx.settings.data_dir, filename=filename
            )
    finally:
        path.unlink(missing_ok=True)


def _incoming(ctx: Context) -> Path:
    folder = ctx.settings.data_dir / INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    return Path(name)


def _check(ctx: Context, request: Request, path: str, purpose: str) -> None:
    query = request.query_params
    ctx.links(request).check(path, purpose, query.get("expires", ""), query.get("signature", ""))


def _not_deleted(ctx: Context, job_id: str) -> None:
    with ctx.db.read() as tx:
        row = tx.first(sa.select(jobs.c.deleted_at).where(jobs.c.id == job_id))
    if row is None or row.deleted_at is not None:
        raise NotFound("The job of this file was deleted.")
