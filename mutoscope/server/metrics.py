"""Health, readiness and Prometheus metrics.

Counts of jobs, times and webhooks come from the database when they are asked for, so that every process tells the
same and a restart forgets nothing; only HTTP times are this process's own. Never labelled by job or account.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mutoscope import __version__
from mutoscope.jobs import eta, migrations, queue, workers
from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import TERMINAL, State
from mutoscope.jobs.schema import deliveries, jobs
from mutoscope.server import edge
from mutoscope.server.context import Context

STAGES = ("inputs", "load", "text", "conditioning", "denoise", "decode", "save")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_http = Histogram(
    "mutoscope_http_seconds", "Time to the first byte of an answer.", ("method", "route", "status"),
    buckets=BUCKETS, registry=None,
)  # fmt: skip


class Measure:
    """Times every request, labelled by its route's template."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                took = time.perf_counter() - start
                _http.labels(scope["method"], route, str(message["status"])).observe(took)
            await send(message)

        await self.app(scope, receive, timed)


class _Collector(Collector):
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def collect(self) -> Iterator[Metric]:
        with self.ctx.db.read() as tx:
            yield from _from_database(tx)
        listeners = GaugeMetricFamily("mutoscope_sse_listeners", "Open event streams of this process.")
        listeners.add_metric([], len(self.ctx.tail.listeners))
        yield listeners


def _from_database(tx: Tx) -> Iterator[Metric]:
    depth = queue.depth(tx)
    now = GaugeMetricFamily("mutoscope_jobs", "Jobs that have not ended, by state.", labels=["state"])
    ended = CounterMetricFamily("mutoscope_jobs_ended", "Jobs that have ended, by state.", labels=["state"])
    for state, n in depth.items():
        (ended if state in TERMINAL else now).add_metric([state.value], n)
    yield from (now, ended)
    took = sa.func.sum(jobs.c.finished_at - jobs.c.started_at)
    waited = sa.func.sum(jobs.c.started_at - jobs.c.created_at)
    device = CounterMetricFamily("mutoscope_device_seconds", "Time on devices, by model.", labels=["model"])
    waits = CounterMetricFamily("mutoscope_wait_seconds", "Time in the queue, by model.", labels=["model"])
    done = (jobs.c.finished_at.is_not(None), jobs.c.started_at.is_not(None))
    for model, on_device, in_queue in tx.all(
        sa.select(jobs.c.model, took, waited).where(*done).group_by(jobs.c.model)
    ):
        device.add_metric([model], float(on_device or 0.0))
        waits.add_metric([model], float(in_queue or 0.0))
    yield from (device, waits)
    stages = CounterMetricFamily(
        "mutoscope_stage_seconds", "Time of finished jobs in each stage.", labels=["stage"]
    )
    of_job = jobs.c.result["stages"]
    sums = [sa.func.sum(of_job[stage].as_float()) for stage in STAGES]
    row = tx.first(sa.select(*sums).where(jobs.c.state == State.SUCCEEDED))
    for stage, seconds in zip(STAGES, row or (), strict=False):
        stages.add_metric([stage], float(seconds or 0.0))
    yield stages
    sent = CounterMetricFamily("mutoscope_webhooks", "Webhook deliveries, by result.", labels=["result"])
    counts = sa.select(deliveries.c.state, sa.func.count()).group_by(deliveries.c.state)
    for result, n in tx.all(counts):
        sent.add_metric([result], int(n))
    yield sent
    states = GaugeMetricFamily(
        "mutoscope_workers", "Workers, by device and state.", labels=["device", "state"]
    )
    seen: dict[tuple[str, str], int] = {}
    for worker in workers.listing(tx):
        seen[worker.device, worker.state] = seen.get((worker.device, worker.state), 0) + 1
    for (device_name, doing), n in sorted(seen.items()):
        states.add_metric([device_name, doing], n)
    yield states
    backlog = GaugeMetricFamily("mutoscope_backlog_seconds", "Until a job that comes now would start.")
    backlog.add_metric([], eta.backlog(tx))
    yield backlog


def router(ctx: Context) -> APIRouter:
    """/healthz, /readyz, /metrics: without a key, for probes."""
    api = APIRouter(include_in_schema=False)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(ctx))
    registry.register(_http)

    @api.get("/healthz")
    async def healthz() -> Response:
        """The process lives and its event loop turns."""
        return edge.respond(edge.Reply(200, {"status": "ok", "version": __version__}))

    @api.get("/readyz")
    async def readyz() -> Response:
        """Jobs would be accepted and made."""

        def look() -> list[str]:
            problems = []
            try:
                if migrations.current(ctx.db) != migrations.newest():
                    problems.append("the database has another schema than this version needs")
                with ctx.db.read() as tx:
                    alive = [w for w in workers.listing(tx) if tx.now - w.beat_at < eta.ALIVE_S]
                if not alive:
                    problems.append("no worker was heard of in the last minute")
            except sa.exc.SQLAlchemyError as e:
                problems.append(f"the database cannot be reached ({type(e).__name__})")
            return problems

        problems = await edge.on_thread(look)
        body = {"status": "ready" if not problems else "not ready", "problems": problems}
        return edge.respond(edge.Reply(503 if problems else 200, body))

    @api.get("/metrics")
    async def metrics(_: Request) -> Response:
        text = await edge.on_thread(lambda: generate_latest(registry))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return api
