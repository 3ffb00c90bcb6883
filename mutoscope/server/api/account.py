"""/api/v1/usage, /credits, /plan, /routers, /webhooks: what belongs to the account that asks."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from mutoscope.jobs import endpoints, outbox, plans, router, usage
from mutoscope.jobs.database import Tx
from mutoscope.jobs.endpoints import Endpoint
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.model import Caller
from mutoscope.jobs.outbox import Delivery
from mutoscope.jobs.router import Router, Rules
from mutoscope.jobs.spec import Strict
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.api import schemas
from mutoscope.server.api.shape import DIALECT, answers, gives, integer, nothing, one_of, parsed, query, takes
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply

MOST_DAYS = 366


class RulesBody(Strict):
    """What a router decides by."""

    optimize_for: str = Field("quality", description="quality, cost or latency")
    mode: str = Field("allow_new_except", description="allow_new_except or allowlist_only")
    ids: tuple[str, ...] = Field((), description="Models left out, or the only ones allowed.")
    max_credits: dict[str, int] = Field(default_factory=dict, description='By "video" and "image".')
    on_capacity: bool = True


class RouterBody(Strict):
    """A named set of rules."""

    slug: str
    name: str = ""
    rules: RulesBody = RulesBody()


class WebhookBody(Strict):
    """Where events go."""

    url: str = Field(max_length=2048)
    events: tuple[str, ...] = Field((), description="Empty: all but those on request (job.progress).")


class ReplayBody(Strict):
    """What is sent again: one delivery, or all failed ones since a time."""

    delivery_id: str | None = None
    endpoint_id: str | None = None
    since: float | None = Field(None, ge=0, le=1e12, description="Unix seconds.")


def add(api: APIRouter, ctx: Context) -> None:
    _money(api, ctx)
    _routers(api, ctx)
    _webhooks(api, ctx)


def _money(api: APIRouter, ctx: Context) -> None:
    @api.get(
        "/usage",
        openapi_extra=query(
            start="First day, YYYY-MM-DD.", before="The day after the last one.", format="json or csv"
        ),
        responses=answers("text/csv", schemas.USAGE),
        summary="What was spent, by day, model and key; ?format=csv",
    )
    async def usage_by_day(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            start, before = _window(request, tx.now)
            kind = one_of(request, "format", ("json", "csv"))
            rows = usage.by_day(tx, caller.account.id, start, before)
            if kind == "csv":
                name = {"content-disposition": f'attachment; filename="usage-{start}.csv"'}
                return Reply(200, usage.as_csv(rows).encode(), name, "text/csv")
            data = [{**vars(row), "day": row.day.isoformat()} for row in rows]
            days = {day.isoformat(): n for day, n in usage.days(rows, start, before).items()}
            return Reply(200, {"object": "list", "data": data, "days": days})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/credits", responses=gives(schemas.CREDITS), summary="Balance, plan and limits")
    async def credits(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            account, plan = caller.account, plans.plan_of(caller.account)
            return Reply(200, {
                "object": "credits", "balance": account.balance, "reserved": account.reserved,
                "usd_per_credit": ctx.service.prices.usd_per_credit, "plan": asdict(plan),
                "jobs_today": plans.jobs_today(tx, account.id), "active": plans.active_jobs(tx, account.id),
                "spent_30_days": plans.spent_since(tx, account.id, tx.now - plans.MONTH_S),
            })  # fmt: skip

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/plans", responses=gives(schemas.PLANS), summary="All plans, and the price list")
    async def plan_list(request: Request) -> Response:
        def act(_tx: Tx, _caller: Caller) -> Reply:
            shown = [asdict(p) | {"usd_per_year": p.usd_per_year} for p in plans.PLANS.values()]
            return Reply(200, {"object": "list", "data": shown, "prices": asdict(ctx.service.prices)})

        return await edge.read(ctx, request, act, DIALECT)


def _window(request: Request, now: float) -> tuple[date, date]:
    """The asked days: the last 30 unless said, `before` not included."""
    today = datetime.fromtimestamp(now, UTC).date()
    days = {"start": today - timedelta(days=29), "before": today + timedelta(days=1)}
    for name in days:
        if (text := request.query_params.get(name)) is not None:
            try:
                days[name] = date.fromisoformat(text)
            except ValueError as e:
                raise InvalidRequest(f"{name} = {text!r:.40}, expected YYYY-MM-DD.", field=name) from e
    if not 0 < (days["before"] - days["start"]).days <= MOST_DAYS:
        raise InvalidRequest(f"start to before must be 1 to {MOST_DAYS} days.", field="before")
    return days["start"], days["before"]


def _routers(api: APIRouter, ctx: Context) -> None:
    def shown(found: Router) -> dict[str, Any]:
        times = {"created_at": iso(found.created_at), "updated_at": iso(found.updated_at)}
        rules = {name: getattr(found.rules, name) for name in RulesBody.model_fields}
        return {
            "id": found.id,
            "object": "router",
            "slug": found.slug,
            "name": found.name,
            "rules": rules,
            **times,
        }

    @api.post(
        "/routers",
        openapi_extra=takes(RouterBody),
        status_code=201,
        responses=gives(schemas.ROUTER, 201),
        summary="Make a router",
    )
    async def create(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, body: RouterBody) -> Reply:
            rules = Rules(**body.rules.model_dump())
            made = router.create(tx, caller.account.id, slug=body.slug, name=body.name, rules=rules)
            return Reply(201, shown(made))

        return await edge.write(ctx, request, lambda body: parsed(RouterBody, body), act, DIALECT)

    @api.get("/routers", responses=gives(schemas.listing(schemas.ROUTER)), summary="Your routers")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            found = router.listing(tx, caller.account.id)
            return Reply(200, {"object": "list", "data": [shown(r) for r in found]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/routers/{name}", responses=gives(schemas.ROUTER), summary="One router")
    async def retrieve(request: Request, name: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, shown(router.get(tx, caller.account.id, name)))

        return await edge.read(ctx, request, act, DIALECT)

    @api.put(
        "/routers/{name}",
        openapi_extra=takes(RouterBody),
        responses=gives(schemas.ROUTER),
        summary="Change a router",
    )
    async def change(request: Request, name: str) -> Response:
        def act(tx: Tx, caller: Caller, body: RouterBody) -> Reply:
            rules = Rules(**body.rules.model_dump())
            made = router.change(
                tx, caller.account.id, name, slug=body.slug, name=body.name or None, rules=rules
            )
            return Reply(200, shown(made))

        return await edge.write(ctx, request, lambda body: parsed(RouterBody, body), act, DIALECT)

    @api.delete("/routers/{name}", status_code=204, summary="Delete a router")
    async def delete(request: Request, name: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            router.delete(tx, caller.account.id, name)
            return Reply(204)

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.get(
        "/decisions",
        openapi_extra=query(
            job_id="Of this job.", router_id="Of this router.", limit="int: 1 to 100, 50 unless said"
        ),
        responses=gives(schemas.listing(schemas.DECISION)),
        summary="Routing decisions, newest first; ?job_id=, ?router_id=",
    )
    async def decisions(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            asked = request.query_params
            found = router.decisions(
                tx, caller.account.id, router_id=asked.get("router_id"), job_id=asked.get("job_id"),
                limit=integer(request, "limit", 50, 1, 100),
            )  # fmt: skip
            return Reply(200, {"object": "list", "data": [vars(d) | {"at": iso(d.at)} for d in found]})

        return await edge.read(ctx, request, act, DIALECT)


def _webhooks(api: APIRouter, ctx: Context) -> None:
    def endpoint(found: Endpoint, *, secret: bool = False) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "id": found.id, "object": "webhook_endpoint", "url": found.url, "events": list(found.events),
            "created_at": iso(found.created_at), "failing_since": iso(found.failing_since),
            "disabled_at": iso(found.disabled_at), "disabled_why": found.disabled_why or None,
        }  # fmt: skip
        return shown | ({"secret": found.secrets[0]} if secret else {})

    def delivery(found: Delivery) -> dict[str, Any]:
        names = (
            "id",
            "endpoint_id",
            "url",
            "event",
            "job_id",
            "state",
            "attempts",
            "last_status",
            "last_error",
        )
        times = {"created_at": iso(found.created_at), "delivered_at": iso(found.delivered_at)}
        waits = {"next_at": iso(found.next_at) if found.state == "pending" else None}
        return {name: getattr(found, name) for name in names} | times | waits

    @api.post(
        "/webhooks",
        openapi_extra=takes(WebhookBody),
        status_code=201,
        responses=gives(schemas.with_secret(schemas.ENDPOINT), 201),
        summary="Tell this URL",
    )
    async def create(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, body: WebhookBody) -> Reply:
            made = endpoints.create(tx, ctx.settings, caller.account.id, body.url, body.events)
            return Reply(201, endpoint(made, secret=True))

        return await edge.write(ctx, request, lambda body: parsed(WebhookBody, body), act, DIALECT)

    @api.get(
        "/webhooks", responses=gives(schemas.listing(schemas.ENDPOINT)), summary="Your webhook endpoints"
    )
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            found = endpoints.listing(tx, caller.account.id)
            return Reply(200, {"object": "list", "data": [endpoint(e) for e in found]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get(
        "/webhooks/deliveries",
        openapi_extra=query(
            endpoint_id="To this endpoint.", job_id="About this job.", limit="int: 1 to 100, 50 unless said"
        ),
        responses=gives(schemas.listing(schemas.DELIVERY)),
        summary="What was sent, newest first",
    )
    async def deliveries(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            asked = request.query_params
            found = outbox.listing(
                tx, caller.account.id, endpoint_id=asked.get("endpoint_id"), job_id=asked.get("job_id"),
                limit=integer(request, "limit", 50, 1, 100),
            )  # fmt: skip
            return Reply(200, {"object": "list", "data": [delivery(d) for d in found]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.post(
        "/webhooks/replay",
        openapi_extra=takes(ReplayBody),
        responses=gives(schemas.record(replayed=schemas.WHOLE)),
        summary="Send again",
    )
    async def replay(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, body: ReplayBody) -> Reply:
            n = outbox.replay(tx, caller.account.id, **body.model_dump())
            return Reply(200, {"replayed": n})

        return await edge.write(ctx, request, lambda body: parsed(ReplayBody, body or {}), act, DIALECT)

    @api.get(
        "/webhooks/secret",
        responses=gives(schemas.record(secrets=schemas.NAMES)),
        summary="What signs the webhooks of single jobs (webhook_url)",
    )
    async def own_secret(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, {"secrets": list(endpoints.account_secrets(tx, caller.account.id))})

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.get(
        "/webhooks/{endpoint_id}",
        responses=gives(schemas.with_secret(schemas.ENDPOINT)),
        summary="One webhook endpoint, with its secret",
    )
    async def retrieve(request: Request, endpoint_id: str) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            return Reply(200, endpoint(endpoints.get(tx, caller.account.id, endpoint_id), secret=True))

        return await edge.read(ctx, request, act, DIALECT)

    @api.put(
        "/webhooks/{endpoint_id}",
        openapi_extra=takes(WebhookBody),
        responses=gives(schemas.ENDPOINT),
        summary="Change or enable it again",
    )
    async def change(request: Request, endpoint_id: str) -> Response:
        def act(tx: Tx, caller: Caller, body: WebhookBody) -> Reply:
            made = endpoints.update(
                tx,
                ctx.settings,
                caller.account.id,
                endpoint_id,
                url=body.url,
                events=body.events,
                enabled=True,
            )
            return Reply(200, endpoint(made))

        return await edge.write(ctx, request, lambda body: parsed(WebhookBody, body), act, DIALECT)

    @api.delete("/webhooks/{endpoint_id}", status_code=204, summary="Delete a webhook endpoint")
    async def delete(request: Request, endpoint_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            endpoints.delete(tx, caller.account.id, endpoint_id)
            return Reply(204)

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.post(
        "/webhooks/{endpoint_id}/test",
        status_code=202,
        responses=gives(schemas.DELIVERY, 202),
        summary="Send a ping",
    )
    async def ping(request: Request, endpoint_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(202, delivery(outbox.ping(tx, caller.account.id, endpoint_id)))

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.post(
        "/webhooks/{endpoint_id}/rotate",
        responses=gives(schemas.SECRET),
        summary="A new secret; the old one signs for another day",
    )
    async def rotate(request: Request, endpoint_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            return Reply(200, {"secret": endpoints.rotate(tx, caller.account.id, endpoint_id)})

        return await edge.write(ctx, request, nothing, act, DIALECT)
