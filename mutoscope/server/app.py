"""The web application: everything is put together here, and nothing happens before `create_app` is called."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mutoscope import __version__, logs
from mutoscope.jobs import migrations, webhooks
from mutoscope.jobs.blobs import Blobs, url_secret
from mutoscope.jobs.database import Database
from mutoscope.jobs.errors import InvalidRequest, JobsError, NotFound
from mutoscope.jobs.service import Service
from mutoscope.server import api, edge, files, metrics
from mutoscope.server.background import Loops
from mutoscope.server.context import Context
from mutoscope.server.dialects import luma, luma_agents, openai_videos, runway
from mutoscope.server.edge import Dialect
from mutoscope.server.events import Tail
from mutoscope.settings import Settings

log = logging.getLogger("mutoscope.server")

DIALECTS = (luma, luma_agents, openai_videos, runway)
"""Modules with PREFIX, DIALECT and router(ctx). The longest prefixes are not hidden by shorter ones."""


def create_app(settings: Settings, *, loops: bool = False) -> FastAPI:
    """The application. `loops`: also do housekeeping and send webhooks, from the start to the end of its life."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    db = Database(settings.database)
    migrations.upgrade(db)
    with db.write() as tx:
        secret = url_secret(tx)
    ctx = Context(db, settings, Service.make(settings), Blobs(settings.data_dir), secret, Tail(db))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ctx.tail.start()
        linked = webhooks.linked(lambda job, output: ctx.links().output(job, output))
        background = Loops(
            ctx, {"standard": linked, "luma": lambda tx, delivery: luma.callback_body(tx, ctx, delivery)}
        )
        if loops:
            background.start()
        yield
        await ctx.tail.close()
        if loops:
            await edge.on_thread(background.stop)
        db.close()

    app = FastAPI(
        title="Mutoscope", version=__version__, lifespan=lifespan, docs_url="/api/v1/docs", redoc_url=None,
        openapi_url="/api/v1/openapi.json",
        description="Video generation on your own machine. Vendors' dialects live beside this API; see the docs.",
    )  # fmt: skip
    app.state.ctx = ctx
    app.include_router(files.router(ctx))
    app.include_router(metrics.router(ctx))
    app.include_router(api.router(ctx))
    for module in DIALECTS:
        app.include_router(module.router(ctx), include_in_schema=False)
    app.add_middleware(RequestIds)
    app.add_middleware(metrics.Measure)

    async def refuse(request: Request, exc: Exception) -> Response:
        status = exc.status_code if isinstance(exc, HTTPException) else 500
        return edge.refuse(_as_ours(request, status, exc), _dialect(request.url.path))

    app.add_exception_handler(HTTPException, refuse)
    return app


def _dialect(path: str) -> Dialect:
    """Whose words an answer is in."""
    found: Dialect = api.DIALECT
    for module in DIALECTS:
        if path == module.PREFIX or path.startswith(f"{module.PREFIX}/"):
            found = module.DIALECT
    return found


def _as_ours(request: Request, status: int, exc: Exception) -> JobsError:
    """What the framework refuses."""
    what = f"{request.method} {request.url.path}"
    if status == 404:
        return NotFound(f"There is no route {what}.", hint="docs/api-coverage.md lists all.")
    if status == 405:
        return edge.MethodNotAllowed(f"{what}: the route does not take this method.")
    return InvalidRequest(str(getattr(exc, "detail", exc)))


class RequestIds:
    """X-Request-Id on every answer: the client's own, or a new one. Log lines carry it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        number = (
            given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex
        )
        token = logs.request_id.set(number)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            logs.request_id.reset(token)
