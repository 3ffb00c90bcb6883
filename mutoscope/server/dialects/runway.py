"""Runway's API under /v1, as the official SDKs speak it. docs/runway.md says how to point them here.

Creating a task answers before its inputs by URL are fetched: an unusable one fails the task with ASSET.INVALID.
Routes of Runway's that are not here answer 400 with a sentence, never 404 without an explanation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from mutoscope.jobs import accounts, assets, eta, plans, queue, usage
from mutoscope.jobs import router as routing
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest, NotFound, Unsupported
from mutoscope.jobs.model import Caller, State
from mutoscope.server import edge
from mutoscope.server.context import Context
from mutoscope.server.dialects import runway_organization, runway_routers, runway_view
from mutoscope.server.dialects.runway_coverage import COVERAGE, PREFIX
from mutoscope.server.dialects.runway_inputs import Parsed, keep, known, look
from mutoscope.server.dialects.runway_rules import SCHEME, BodyRefused, Hosts, check, table
from mutoscope.server.dialects.runway_spec import parse, parse_generate, to_generate_spec, to_spec
from mutoscope.server.dialects.runway_support import NOTES, ignored, reason
from mutoscope.server.dialects.runway_view import STATUS, from_job
from mutoscope.server.edge import Dialect, Reply

__all__ = ["COVERAGE", "DIALECT", "PREFIX", "STATUS", "error", "from_job", "router", "to_spec"]

NAME = "runway"
VERSION_HEADER = "X-Runway-Version"
VERSION = "2024-11-06"
UPLOAD_RULES = {
    "fields": {"filename": {"text": [1, 255]}, "type": {"enum": ["ephemeral"]}},
    "required": ["filename", "type"],
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def error(exc: Exception) -> Reply:
    """What went wrong, in Runway's shape."""
    return Reply(*runway_view.error(exc))


DIALECT = Dialect(NAME, error)


def router(ctx: Context) -> APIRouter:
    """All routes below /v1."""
    api = APIRouter(prefix=PREFIX)
    for endpoint in table()["endpoints"]:
        api.add_api_route(f"/{endpoint}", _create(ctx, endpoint), methods=["POST"], name=f"runway_{endpoint}")
    for kind in ("video", "image"):
        api.add_api_route(
            f"/generate/{kind}", _generate(ctx, kind), methods=["POST"], name=f"runway_generate_{kind}"
        )
    _tasks(api, ctx)
    _uploads(api, ctx)
    _organization(api, ctx)
    _routers(api, ctx)
    _others(api)
    return api


def check_version(request: Request) -> None:
    """Runway requires the version of its API that a client was written for.

    Raises:
        InvalidRequest: it is missing, or another one.
    """
    got = request.headers.get(VERSION_HEADER)
    if got != VERSION:
        what = f"{VERSION_HEADER} = {got!r}" if got else f"The header {VERSION_HEADER} is missing"
        raise InvalidRequest(
            f"{what}; this server speaks {VERSION}.", hint=f"Send {VERSION_HEADER}: {VERSION}."
        )


def _create(ctx: Context, endpoint: str) -> Callable[..., Any]:
    hosts = hosts_of(ctx)

    async def create(request: Request) -> Response:
        def read(body: Any) -> Parsed:
            check_version(request)
            model, found = parse(endpoint, body, hosts)
            return look(body, model, found)

        def act(tx: Tx, caller: Caller, parsed: Parsed) -> Reply:
            files = known(tx, caller.account.id, parsed)
            to_spec(endpoint, parsed.body, files)  # refused before anything is written
            files = _keep(ctx, tx, caller, parsed, files)
            spec = to_spec(endpoint, parsed.body, files)
            warnings = [NOTES[parsed.name]] if parsed.name in NOTES else []
            warnings += ignored(parsed.name, parsed.body)
            vendor = {"endpoint": endpoint, "model": parsed.name}
            job = ctx.service.submit(tx, caller, spec, dialect=NAME, vendor=vendor)
            return Reply(200, runway_view.created(job, warnings), {})

        return await edge.write(ctx, request, read, act, DIALECT)

    return create


def _generate(ctx: Context, kind: str) -> Callable[..., Any]:
    hosts = hosts_of(ctx)

    async def generate(request: Request) -> Response:
        def read(body: Any) -> Parsed:
            check_version(request)
            slug, found = parse_generate(kind, body, hosts)
            return look(body, slug, found)

        def act(tx: Tx, caller: Caller, parsed: Parsed) -> Reply:
            router = routing.get(tx, caller.account.id, parsed.name)
            files = known(tx, caller.account.id, parsed)
            to_generate_spec(kind, parsed.body, files)
            spec = to_generate_spec(kind, parsed.body, _keep(ctx, tx, caller, parsed, files))
            vendor = {"endpoint": f"generate/{kind}", "configId": router.slug}
            job = ctx.service.submit(tx, caller, spec, dialect=NAME, vendor=vendor, router=router.id)
            data = routing.decisions(tx, caller.account.id, job_id=job.id, limit=1)[0].data
            told = runway_routers.routing(job, router, data, kind, parsed.body["input"])
            return Reply(200, {"id": job.id, "routing": told}, {})

        return await edge.write(ctx, request, read, act, DIALECT)

    return generate


def _keep(ctx: Context, tx: Tx, caller: Caller, parsed: Parsed, files: Any) -> Any:
    settings = ctx.settings
    return keep(tx, caller.account.id, parsed, files, data_dir=settings.data_dir, hours=settings.upload_hours)


def hosts_of(ctx: Context) -> Hosts:
    """What URLs the settings allow beyond Runway's rules."""
    return Hosts(http=ctx.settings.allow_http_inputs, names=ctx.settings.allow_private_hosts)


def _tasks(api: APIRouter, ctx: Context) -> None:
    """A deleted task is gone at once, running or not, as Runway documents: its SDK for synchronous Python would
    otherwise poll a cancelled task until its time limit. One that was cancelled elsewhere is shown as CANCELLED."""

    @api.get("/tasks/{task_id}", name="runway_task")
    async def retrieve(request: Request, task_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            check_version(request)
            job = ctx.service.get(tx, caller, task_id)
            position = queue.position(tx, job) if job.state in (State.QUEUED, State.THROTTLED) else None
            links = ctx.links(request)
            body = from_job(job, link=lambda output: links.output(job, output), position=position, now=tx.now)
            if position is not None and (finish := eta.finish_at(tx, job)) is not None:
                body["etaSeconds"] = max(0, round(finish - tx.now))
            return Reply(200, body, {})

        return await edge.read(ctx, request, act, DIALECT)

    @api.delete("/tasks/{task_id}", name="runway_task_delete")
    async def delete(request: Request, task_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: Any) -> Reply:
            ctx.service.delete(tx, caller, task_id)
            return Reply(204, None, {})

        return await edge.write(ctx, request, _bodiless(request), act, DIALECT)


def _uploads(api: APIRouter, ctx: Context) -> None:
    @api.post("/uploads", name="runway_upload")
    async def upload(request: Request) -> Response:
        def read(body: Any) -> dict[str, Any]:
            check_version(request)
            if not isinstance(body, dict):
                raise InvalidRequest("The body must be a JSON object with filename and type.")
            issues, _ = check(UPLOAD_RULES, body, hosts_of(ctx))
            if issues:
                raise BodyRefused(issues)
            return body

        def act(tx: Tx, caller: Caller, body: dict[str, Any]) -> Reply:
            asset = assets.open_upload(
                tx, caller.account.id, filename=body["filename"], hours=ctx.settings.upload_hours
            )
            url = ctx.links(request).upload(asset.id)
            return Reply(200, {"runwayUri": f"{SCHEME}{asset.id}", "uploadUrl": url, "fields": {}}, {})

        return await edge.write(ctx, request, read, act, DIALECT)


def _organization(api: APIRouter, ctx: Context) -> None:
    @api.get("/organization", name="runway_organization")
    async def organization(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            check_version(request)
            account = accounts.get(tx, caller.account.id)
            today = usage.jobs_since(tx, account.id, tx.now - plans.DAY_S)
            body = runway_organization.organization(
                plans.shown_balance(account), plans.plan_of(account), today
            )
            return Reply(200, body, {})

        return await edge.read(ctx, request, act, DIALECT)

    @api.post("/organization/usage", name="runway_usage")
    async def organization_usage(request: Request) -> Response:
        def read(body: Any) -> Any:
            check_version(request)
            return body

        def act(tx: Tx, caller: Caller, body: Any) -> Reply:
            start, before = runway_organization.window(body, runway_organization.day_of(tx.now))
            rows = usage.by_day(tx, caller.account.id, start, before)
            return Reply(200, runway_organization.report(rows), {})

        return await edge.write(ctx, request, read, act, DIALECT)


def _routers(api: APIRouter, ctx: Context) -> None:
    @api.post("/routers", name="runway_router_create")
    async def create(request: Request) -> Response:
        def read(body: Any) -> dict[str, Any]:
            check_version(request)
            return runway_routers.checked(body, runway_routers.CREATE)

        def act(tx: Tx, caller: Caller, body: dict[str, Any]) -> Reply:
            shown = {"version": 1, "description": body.get("description")}
            settings = runway_routers.merged({}, body.get("settings", {}))
            rules = runway_routers.to_rules(settings, shown, ctx.service.registry)
            name = body.get("name", body["slug"])
            made = routing.create(tx, caller.account.id, slug=body["slug"], name=name, rules=rules)
            return Reply(200, runway_routers.from_router(made), {})

        return await edge.write(ctx, request, read, act, DIALECT)

    @api.get("/routers", name="runway_router_list")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            check_version(request)
            limit, cursor = runway_routers.page_of(request.query_params)
            start = runway_routers.number_of(cursor) or 0
            everything = routing.listing(tx, caller.account.id)
            shown = everything[start : start + limit]
            more = str(start + limit) if start + limit < len(everything) else None
            return Reply(
                200, {"data": [runway_routers.from_router(r) for r in shown], "nextCursor": more}, {}
            )

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/routers/{router_id}", name="runway_router")
    async def retrieve(request: Request, router_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            check_version(request)
            return Reply(200, runway_routers.from_router(routing.get(tx, caller.account.id, router_id)), {})

        return await edge.read(ctx, request, act, DIALECT)

    @api.patch("/routers/{router_id}", name="runway_router_update")
    async def update(request: Request, router_id: str) -> Response:
        def read(body: Any) -> dict[str, Any]:
            check_version(request)
            return runway_routers.checked({} if body is None else body, runway_routers.UPDATE)

        def act(tx: Tx, caller: Caller, body: dict[str, Any]) -> Reply:
            old = routing.get(tx, caller.account.id, router_id)
            before = runway_routers.settings_of(old)
            settings = runway_routers.merged(before, body.get("settings", {}))
            shown = {
                "version": int(old.rules.shown.get("version", 1)) + (settings != before),
                "description": body.get("description", old.rules.shown.get("description")),
            }
            rules = runway_routers.to_rules(settings, shown, ctx.service.registry)
            made = routing.change(tx, caller.account.id, old.id, name=body.get("name"), rules=rules)
            return Reply(200, runway_routers.from_router(made), {})

        return await edge.write(ctx, request, read, act, DIALECT)

    @api.delete("/routers/{router_id}", name="runway_router_delete")
    async def delete(request: Request, router_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: Any) -> Reply:
            routing.delete(tx, caller.account.id, router_id)
            return Reply(204, None, {})

        return await edge.write(ctx, request, _bodiless(request), act, DIALECT)

    @api.get("/routers/{router_id}/requests", name="runway_router_requests")
    async def requests(request: Request, router_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            check_version(request)
            limit, cursor = runway_routers.page_of(request.query_params)
            router = routing.get(tx, caller.account.id, router_id)
            last = runway_routers.number_of(cursor)
            found = routing.decisions(
                tx, caller.account.id, router_id=router.id, before=last, limit=limit + 1
            )
            more = str(found[limit - 1].seq) if len(found) > limit else None
            data = [runway_routers.from_decision(d) for d in found[:limit]]
            return Reply(200, {"data": data, "nextCursor": more}, {})

        return await edge.read(ctx, request, act, DIALECT)


def _bodiless(request: Request) -> Callable[[Any], None]:
    """The check of a request without a body."""

    def read(_: Any) -> None:
        check_version(request)

    return read


def _others(api: APIRouter) -> None:
    """Everything else below /v1: Runway's routes that are not here, wrong methods, and paths that nobody has."""

    @api.api_route("/{path:path}", methods=list(METHODS), name="runway_other", include_in_schema=False)
    async def other(request: Request, path: str) -> Response:
        return edge.respond(explain(request.method, f"{PREFIX}/{path}"))


def explain(method: str, path: str) -> Reply:
    """Why there is nothing at a path."""
    path = path.rstrip("/")
    if why := reason(path):
        return error(Unsupported(f"{method} {path} is not supported: {why}."))
    allowed = [r.method for r in COVERAGE if re.fullmatch(re.sub(r"\{id\}", "[^/]+", PREFIX + r.path), path)]
    if allowed:
        body = {"error": f"{path} takes {', '.join(allowed)}, not {method}."}
        return Reply(405, body, {"allow": ", ".join(allowed), "x-should-retry": "false"})
    return error(NotFound(f"Runway's API has no {path}.", hint="docs/api-coverage.md lists what there is."))
