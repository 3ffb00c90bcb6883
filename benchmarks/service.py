"""The service on this machine: latencies under load, event streams, a deep queue, and its cost beside the bare engine.

    python -m benchmarks.service                    # all parts, about four minutes on two cores
    python -m benchmarks.service gets creates       # some
    python -m benchmarks.service queue --postgres   # the deep queue on PostgreSQL too (an embedded one)

gets      200 GETs of tasks a second (Runway's dialect), beside the same rate of /healthz, the floor of this machine
creates   20 POSTs a second that each make a job; a fake engine makes it at once
streams   1,000 event streams of one running job: the web process's share of a core, and how late events come
queue     100,000 queued jobs of 20 accounts, 4 models and 3 shapes: claim and queue position
overhead  a job through the service, from POST to the event "succeeded", against the same request in a warm engine and
          against `mutoscope generate`

Load is open: requests start by the clock, whether earlier ones were answered or not, and a latency counts from when
its request should have started. Client and server share the machine. The fake engine is the one of the tests; the
last part runs the starter model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
FAKE = "tests.service.fakes:FakeRunner"
RUNWAY = {"X-Runway-Version": "2024-11-06"}
GOALS = {"gets": 50.0, "creates": 100.0, "claim": 20.0, "position": 20.0, "overhead": 300.0}
"""Milliseconds; the first four at p99, the last at the median."""


# -- what is measured with ------------------------------------------------------------------------------------


@dataclass
class Service:
    """A running `mutoscope serve` and a client for it."""

    url: str
    key: str
    process: subprocess.Popen[str]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **RUNWAY}

    @property
    def web(self) -> psutil.Process:
        """Its web process."""
        children = psutil.Process(self.process.pid).children()
        return next(c for c in children if "mutoscope.server" in c.cmdline())

    def client(self, connections: int = 100) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, limits=limits, timeout=60)


@contextmanager
def serving(*, fake: bool = True) -> Iterator[Service]:
    """A service with a new data folder on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if fake:
            env |= {"MUTOSCOPE_ENGINE": FAKE, "MUTOSCOPE_PRELOAD": ""}
        command = [sys.executable, "-m", "mutoscope", "serve", "--port", "0", "--device", "cpu"]
        process = subprocess.Popen(
            [*command, "--data-dir", folder], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            told = ""
            for line in process.stdout:
                told += line
                if "devices" in line:
                    break
            url, key = (re.search(p, told) for p in (r"URL\s+(\S+)", r"API key\s+(\S+)"))
            if url is None or key is None:
                raise SystemExit(f"mutoscope serve did not start:\n{told}")
            service = Service(url[1], key[1], process)
            _until_ready(service)
            yield service
        finally:
            process.terminate()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


def _until_ready(service: Service) -> None:
    """The worker is there, and a first job went through: everything is loaded."""
    with httpx.Client(base_url=service.url, headers=service.headers, timeout=60) as client:
        job = client.post("/api/v1/jobs", json={"prompt": "a red ball", "steps": 1, "seed": 1}).json()["id"]
        with client.stream("GET", f"/api/v1/jobs/{job}/events") as events:
            for _ in events.iter_lines():
                pass
        if client.get(f"/api/v1/jobs/{job}").json()["state"] != "succeeded":
            raise SystemExit("the first job did not succeed")


async def at_rate(rate: float, seconds: float, request: Callable[[int], Awaitable[int]]) -> list[float]:
    """Latencies in seconds of `request(i)`, started by the clock; each must return a status below 300."""
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.1
    latencies: list[float] = []

    async def one(i: int) -> None:
        due = start + i / rate
        await asyncio.sleep(max(0.0, due - loop.time()))
        status = await request(i)
        if status >= 300:
            raise SystemExit(f"request {i} was answered with status {status}")
        latencies.append(loop.time() - due)

    await asyncio.gather(*(one(i) for i in range(int(rate * seconds))))
    return latencies


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "max_ms": round(1000 * max(seconds), 2),
            "n": len(seconds)}  # fmt: skip


# -- the parts ------------------------------------------------------------------------------------------------


def gets(args: argparse.Namespace) -> dict[str, Any]:
    """GET /v1/tasks/ID of a running, a waiting and finished tasks, in turn."""

    async def run(service: Service) -> dict[str, Any]:
        async with service.client() as client:
            body = {"model": "gen4.5", "promptText": "x", "ratio": "1280:720", "duration": 5, "seed": 1}
            ids = []
            for text in (*["a ball"] * 8, "steps=100000 step=0.05", "waits"):
                made = await client.post("/v1/text_to_video", json={**body, "promptText": text})
                ids.append(made.json()["id"])

            async def task(i: int) -> int:
                return (await client.get(f"/v1/tasks/{ids[i % len(ids)]}")).status_code

            async def floor(_: int) -> int:
                return (await client.get("/healthz")).status_code

            while (await client.get(f"/v1/tasks/{ids[7]}")).json()["status"] != "SUCCEEDED":
                await asyncio.sleep(0.2)
            await at_rate(args.gets_per_s, 2, task)
            found: dict[str, Any] = {"floor": spread(await at_rate(args.gets_per_s, args.seconds, floor))}
            before, start = service.web.cpu_times(), time.monotonic()
            found |= spread(await at_rate(args.gets_per_s, args.seconds, task))
            found["web_cores"] = cores(before, service.web.cpu_times(), time.monotonic() - start)
            return found

    with serving() as service:
        return {"rate_per_s": args.gets_per_s, **asyncio.run(run(service))}


def creates(args: argparse.Namespace) -> dict[str, Any]:
    """POST /v1/text_to_video; the fake engine makes each clip meanwhile."""

    async def run(service: Service) -> dict[str, float]:
        async with service.client() as client:

            async def create(i: int) -> int:
                body = {"model": "gen4.5", "promptText": f"ball {i}", "ratio": "1280:720", "duration": 5}
                return (await client.post("/v1/text_to_video", json=body)).status_code

            await at_rate(20, 1, create)
            return spread(await at_rate(20, args.seconds, create))

    with serving() as service:
        return {"rate_per_s": 20, **asyncio.run(run(service))}


def streams(args: argparse.Namespace) -> dict[str, Any]:
    """Everybody listens to one job that tells its progress twice a second."""

    async def run(service: Service) -> dict[str, Any]:
        late: list[float] = []
        open_now = asyncio.Semaphore(0)

        async def listen(client: httpx.AsyncClient, job: str) -> None:
            async with client.stream("GET", f"/api/v1/jobs/{job}/events") as events:
                open_now.release()
                async for line in events.aiter_lines():
                    if line.startswith("data:"):
                        late.append(time.time() - json.loads(line[5:])["at"])

        async with service.client(args.listeners + 10) as client:
            made = await client.post("/api/v1/jobs", json={"prompt": "steps=100000 step=0.05", "seed": 1})
            job = made.json()["id"]
            tasks = [asyncio.create_task(listen(client, job)) for _ in range(args.listeners)]
            for _ in tasks:
                await open_now.acquire()
            await asyncio.sleep(2)
            late.clear()
            before, start = service.web.cpu_times(), time.monotonic()
            await asyncio.sleep(args.seconds)
            found = {"web_cores": cores(before, service.web.cpu_times(), time.monotonic() - start)}
            events = {"events_per_s": round(len(late) / args.seconds), "lateness": spread(late)}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return {"listeners": args.listeners, **found, **events}

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * args.listeners)), hard))
    with serving() as service:
        return asyncio.run(run(service))


def cores(before: Any, after: Any, seconds: float) -> float:
    """Share of one core between two readings of a process's times."""
    used = after.user + after.system - before.user - before.system
    return round(float(used / seconds), 3)


def queue_depth(args: argparse.Namespace) -> dict[str, Any]:
    """Claims and positions with 100,000 jobs waiting, on each database."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"sqlite": _queue_depth(f"sqlite:///{folder}/jobs.db", args.jobs)}
    if args.postgres:
        from tests.service.databases import Postgres

        server = Postgres()
        try:
            found["postgresql (no fsync)"] = _queue_depth(server.url, args.jobs)
        finally:
            server.close()
    return {"jobs": args.jobs, **found}


def _queue_depth(url: str, n: int) -> dict[str, Any]:
    from mutoscope.jobs import migrations, queue
    from mutoscope.jobs.database import Database
    from mutoscope.jobs.model import State
    from tests.service.making import make_account, new_job, resolved

    rng = np.random.default_rng(0)
    models = [f"model-{i}" for i in range(4)]
    sizes = [64, 96, 128]
    db = Database(url)
    migrations.upgrade(db)
    with db.write() as tx:
        for a in range(20):
            make_account(tx, f"account-{a}", weight=1 + a % 3)
    ids: list[str] = []
    start = time.perf_counter()
    for first in range(0, n, 2000):
        news = []
        for _ in range(min(2000, n - first)):
            side = sizes[rng.integers(3)]
            news.append(new_job(f"account-{rng.integers(20)}", model=models[rng.integers(4)],
                                resolved=resolved(width=side, height=side)))  # fmt: skip
        with db.write() as tx:
            ids += [job.id for job in queue.insert_many(tx, news)]
    found: dict[str, Any] = {"insert_per_s": round(n / (time.perf_counter() - start))}
    claim, position = [], []
    for _ in range(500):
        start = time.perf_counter()
        with db.write() as tx:
            job = queue.claim(tx, "worker", models, "cpu")
        claim.append(time.perf_counter() - start)
        assert job is not None
        with db.write() as tx:
            assert queue.succeed(tx, job.id, job.fence, [], {}) is not None
        one = ids[rng.integers(len(ids))]
        with db.read() as tx:
            waiting = queue.get(tx, one)
        if waiting.state is State.QUEUED:
            start = time.perf_counter()
            with db.read() as tx:
                place = queue.position(tx, waiting)
            position.append(time.perf_counter() - start)
            assert place is not None and 0 <= place < n, place  # noqa: PT018
    db.close()
    return {**found, "claim": spread(claim), "position": spread(position)}


REQUESTS = {
    "short": {"prompt": "a red ball falls and bounces", "seed": 7},
    "long": {"prompt": "a red ball falls and bounces", "seed": 7, "steps": 100,
             "width": 80, "height": 64, "frames": 33},
}  # fmt: skip


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """In turns: `mutoscope generate`, the warm engine to a file in this process, and the service from POST to the event
    "succeeded"."""
    import torch

    from mutoscope.engine.pipeline import Engine, build_request, write
    from mutoscope.machine import use_threads

    engine = Engine("pocket", device="cpu")
    use_threads(engine.models.manifest, torch.get_num_threads())  # as a worker does

    def command(options: dict[str, Any], path: Path) -> float:
        size = [f"--size={options['width']}x{options['height']}"] if "width" in options else []
        more = [f"--{name}={options[name]}" for name in ("steps", "frames", "seed") if name in options]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "mutoscope", "generate", options["prompt"], "-q", "-o", str(path), *size, *more],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - start

    def bare(options: dict[str, Any], path: Path) -> float:
        start = time.perf_counter()
        request = engine.plan(build_request(**options))
        assert request.fps is not None
        assert request.width is not None
        assert request.height is not None
        events = write(
            engine.events(request), path, fps=request.fps, width=request.width, height=request.height, info={}
        )
        for _ in events:
            pass
        return time.perf_counter() - start

    def served(client: httpx.Client, options: dict[str, Any]) -> float:
        start = time.perf_counter()
        job = client.post("/api/v1/jobs", json=options).json()["id"]
        with client.stream("GET", f"/api/v1/jobs/{job}/events") as events:
            for line in events.iter_lines():
                if '"state":"succeeded"' in line:
                    break
            else:
                raise SystemExit(f"job {job} did not succeed")
        return time.perf_counter() - start

    found: dict[str, Any] = {}
    with (
        serving(fake=False) as service,
        httpx.Client(base_url=service.url, headers=service.headers, timeout=300) as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, options in REQUESTS.items():
            ours, alone, commands = [], [], []
            for i in range(args.rounds + 1):
                place = Path(folder) / f"{name}-{i}"
                times = (
                    bare(options, place.with_suffix(".mp4")),
                    served(client, options),
                    command(options, place.with_suffix(".command.mp4")),
                )
                if i:
                    for kept, seconds in zip((alone, ours, commands), times, strict=True):
                        kept.append(seconds)
            more = [o - a for o, a in zip(ours, alone, strict=True)]
            found[name] = {
                "engine_s": round(statistics.median(alone), 3), "service_s": round(statistics.median(ours), 3),
                "more_ms": round(1000 * statistics.median(more), 1), "worst_ms": round(1000 * max(more), 1),
                "command_s": round(statistics.median(commands), 3),
                "more_share": round(statistics.median(o / a for o, a in zip(ours, alone, strict=True)) - 1, 4),
            }  # fmt: skip
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "gets": gets, "creates": creates, "streams": streams, "queue": queue_depth, "overhead": overhead,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=20, help="of each load (default: %(default)s)")
    parser.add_argument("--gets-per-s", type=float, default=200)
    parser.add_argument("--listeners", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7, help="of the overhead (default: %(default)s)")
    parser.add_argument("--postgres", action="store_true", help="the queue on PostgreSQL too")
    args = parser.parse_args()
    if unknown := [p for p in args.parts if p not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: expected {', '.join(PARTS)}")
    report: dict[str, Any] = {"benchmark": "service", "cores": os.cpu_count(), "goals_ms": GOALS}
    for name in args.parts or PARTS:
        report[name] = PARTS[name](args)
        print(name, json.dumps(report[name]), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
