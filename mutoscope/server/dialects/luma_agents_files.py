"""Files of Luma's Agents API: announced and PUT, or sent as a form; then named by `file_id`. And the errors of it all.

A file is ready as soon as its bytes have arrived and were looked into: `complete` only says so. One that cannot be
used is refused when it is PUT, and never appears.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile

from mutoscope.jobs import assets, inline
from mutoscope.jobs.assets import Asset
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, NotFound, Unsupported
from mutoscope.jobs.inline import Inline
from mutoscope.jobs.model import Caller
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.context import Context
from mutoscope.server.dialects.coverage import SUPPORTED, Part, Route
from mutoscope.server.dialects.luma_agents_bodies import FileBody, Impossible, SentFileBody
from mutoscope.server.dialects.luma_bodies import body_of
from mutoscope.server.edge import Dialect, Reply

HEADERS = {"x-api-version": "2026-04-01"}
PURPOSES = ("input", "reference")
"""Files that were made through this API have one of them; others are not listed."""
STATES = ("pending", "ready", "failed", "deleted")


# -- pure ----------------------------------------------------------------------------------------------------


def error(exc: Exception) -> Reply:
    """{"detail": "..."} with Luma's statuses: 413 for media too large, 422 for what does not go together."""
    status = edge.status_of(exc)
    if isinstance(exc, inline.InputRefused):
        status = 413 if exc.reason == inline.TOO_LARGE else 422
    elif isinstance(exc, Impossible | Unsupported):
        status = 422
    return Reply(status, {"detail": edge.sentence(exc)}, HEADERS)


def from_asset(asset: Asset) -> dict[str, Any]:
    """A File. What was announced is shown until the bytes say what they are."""
    told = asset.info.get("told", {})
    waits = asset.state == "pending"
    return {
        "id": asset.id,
        "state": asset.state,
        "mime_type": told.get("mime_type", "") if waits else asset.mime,
        "size_bytes": told.get("size_bytes", 0) if waits else asset.size_bytes,
        "purpose": asset.purpose,
        "filename": asset.filename or None,
        "user_id": told.get("user_id"),
        "created_at": iso(asset.created_at),
        "expires_at": iso(asset.expires_at),
        "deleted_at": None,
        "failure_reason": None,
    }


def hours_until(expires_at: str | None, now: float, most: float) -> float:
    """How long a file lives: until it is said, at most as long as others.

    Raises:
        InvalidRequest: no time, or one that is over.
    """
    if expires_at is None:
        return most
    try:
        until = datetime.fromisoformat(expires_at)
    except ValueError as e:
        raise InvalidRequest(
            f"expires_at: {expires_at!r} is not a time of ISO 8601.", field="expires_at"
        ) from e
    hours = ((until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - now) / 3600
    if hours <= 0:
        raise InvalidRequest(f"expires_at: {expires_at} is over.", field="expires_at")
    return min(most, hours)


def cursor_of(asset: Asset) -> str:
    """Where the next page goes on."""
    return f"{asset.created_at!r}_{asset.id}"


def place_of(cursor: str | None) -> tuple[float, str] | None:
    """The same the other way round.

    Raises:
        InvalidRequest: it is none of ours.
    """
    if cursor is None:
        return None
    at, _, last = cursor.partition("_")
    try:
        return float(at), last
    except ValueError as e:
        raise InvalidRequest(f"cursor: {cursor!r:.60} is not one that was given.", field="cursor") from e


# -- routes --------------------------------------------------------------------------------------------------


def add(api: APIRouter, ctx: Context, dialect: Dialect) -> None:
    """The five routes of files."""

    @api.post("/files", name="agents_file_create")
    async def create(request: Request) -> Response:
        def parse(value: Any) -> tuple[FileBody | SentFileBody, Inline | None, str]:
            if isinstance(value, FormData):
                return _sent(ctx, value)
            body = body_of(FileBody, value)
            most = ctx.settings.max_upload_bytes
            if body.size_bytes > most:
                raise edge.BodyTooLarge(f"size_bytes: {body.size_bytes}, at most {most} are taken.")
            return body, None, body.filename or ""

        def act(tx: Tx, caller: Caller, asked: tuple[FileBody | SentFileBody, Inline | None, str]) -> Reply:
            body, found, filename = asked
            account, hours = (
                caller.account.id,
                hours_until(body.expires_at, tx.now, ctx.settings.upload_hours),
            )
            told: dict[str, Any] = {} if body.user_id is None else {"user_id": body.user_id}
            if found is not None:
                media = assets.store(tx, account, found, data_dir=ctx.settings.data_dir, hours=hours,
                                     purpose=body.purpose, filename=filename, told=told)  # fmt: skip
                assert media.asset is not None
                return _created(assets.get(tx, account, media.asset), None)
            told |= {"mime_type": body.mime_type, "size_bytes": body.size_bytes}
            asset = assets.open_upload(
                tx, account, filename=filename, purpose=body.purpose, hours=hours, told=told
            )
            upload = {
                "method": "PUT",
                "url": ctx.links(request).upload(asset.id),
                "headers": {"Content-Type": body.mime_type},
                "expires_at": iso(min(asset.expires_at, tx.now + ctx.settings.url_ttl_s)),
            }
            return _created(asset, upload)

        return await edge.write(
            ctx, request, parse, act, dialect, max_bytes=ctx.settings.max_upload_bytes + 2**16
        )

    @api.post("/files/{file_id}/complete", name="agents_file_complete")
    async def complete(request: Request, file_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            asset = _get(tx, caller, file_id)
            told = asset.info.get("told", {}).get("size_bytes")
            if asset.state == "pending":
                raise Impossible(
                    f"No usable bytes have arrived for file {file_id}: PUT them to its upload URL."
                )
            if told is not None and told != asset.size_bytes:
                raise Impossible(
                    f"{asset.size_bytes} bytes have arrived for file {file_id}, {told} were announced."
                )
            return Reply(200, from_asset(asset), HEADERS)

        return await edge.write(ctx, request, lambda _: None, act, dialect)

    @api.get("/files", name="agents_file_list")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            query = request.query_params
            limit = _limit(query.get("limit", "25"))
            purposes = _some("purpose", query.get("purpose"), PURPOSES)
            states = [s for s in _some("state", query.get("state"), STATES) if s in ("pending", "ready")]
            found = assets.listing(
                tx, caller.account.id, limit=limit + 1, before=place_of(query.get("cursor")),
                purposes=purposes, states=states,
            )  # fmt: skip
            more = len(found) > limit
            return Reply(200, {
                "data": [from_asset(a) for a in found[:limit]], "has_more": more,
                "next_cursor": cursor_of(found[limit - 1]) if more else None,
            }, HEADERS)  # fmt: skip

        return await edge.read(ctx, request, act, dialect)

    @api.get("/files/{file_id}", name="agents_file")
    async def retrieve(request: Request, file_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, from_asset(_get(tx, caller, file_id)), HEADERS)

        return await edge.read(ctx, request, act, dialect)

    @api.delete("/files/{file_id}", name="agents_file_delete")
    async def delete(request: Request, file_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            assets.delete(tx, caller.account.id, _get(tx, caller, file_id).id, data_dir=ctx.settings.data_dir)
            return Reply(204, None, HEADERS)

        return await edge.write(ctx, request, lambda _: None, act, dialect)


def _sent(ctx: Context, form: FormData) -> tuple[SentFileBody, Inline, str]:
    """A form with the bytes in its part `file`."""
    sent = form.get("file")
    if not isinstance(sent, UploadFile):
        raise InvalidRequest("file: the form has no file of this name.", field="file")
    body = body_of(SentFileBody, {k: v for k, v in form.multi_items() if k != "file"})
    found = inline.check(sent.file.read(), field="file", max_bytes=ctx.settings.max_upload_bytes)
    return body, found, body.filename or sent.filename or ""


def _created(asset: Asset, upload: dict[str, Any] | None) -> Reply:
    shown = from_asset(asset)
    return Reply(201, {"id": asset.id, "state": asset.state, "file": shown, "upload": upload}, HEADERS)


def _get(tx: Tx, caller: Caller, file_id: str) -> Asset:
    """A file that was made through this API.

    Raises:
        NotFound: there is none.
    """
    asset = assets.get(tx, caller.account.id, file_id, states=("pending", "ready"))
    if asset.purpose not in PURPOSES:
        raise NotFound(f"No file {file_id:.100}.", hint="Files of other APIs are shown by /api/v1/files.")
    return asset


def _some(name: str, value: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return known
    if value not in known:
        raise InvalidRequest(f"{name}: {value!r:.40} is not one of {', '.join(known)}.", field=name)
    return (value,)


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:12]) <= 100:
        raise InvalidRequest(f"limit: {text!r:.20}, 1 to 100 expected.", field="limit")
    return int(text)


COVERAGE: tuple[Route, ...] = (
    Route("POST", "/files", SUPPORTED, "JSON: announces what is PUT to `upload.url`; or a form with its `file`", (
        Part("mime_type", SUPPORTED, "image/* or video/*; the content decides"),
        Part("size_bytes", SUPPORTED, "up to max_upload_bytes of the settings (200 MiB)"),
        Part("expires_at", SUPPORTED, "files that no job needs live for upload_hours (24) at most"),
        Part("filename", SUPPORTED), Part("purpose", SUPPORTED), Part("user_id", SUPPORTED),
        Part("file", SUPPORTED, "of a form"),
    )),
    Route("POST", "/files/{file_id}/complete", SUPPORTED, "compares the size; the file is ready when it was PUT"),
    Route("GET", "/files", SUPPORTED, "files that were made through this API", (
        Part("cursor", SUPPORTED), Part("limit", SUPPORTED), Part("purpose", SUPPORTED),
        Part("state", SUPPORTED, "failed and deleted ones are gone"),
    )),
    Route("GET", "/files/{file_id}", SUPPORTED),
    Route("DELETE", "/files/{file_id}", SUPPORTED),
)  # fmt: skip
