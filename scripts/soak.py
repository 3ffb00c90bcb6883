"""The whole kill matrix, again and again: every process, killed at every point, with jobs under way.

    python scripts/soak.py --rounds 20        # make soak

A service of real processes with the fake runner is stopped at a named point (jobs/checkpoints.py); then the worker,
the web process, the supervisor or all of them get SIGKILL, and the service goes on or is started again. After each kill
all jobs have to end as they should, credits and files have to agree, and nothing may be there twice. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutoscope.jobs.checkpoints import POINTS
from mutoscope.jobs.model import State
from tests.service.processes.harness import Serving, serving, wait_until

VICTIMS = ("worker", "web", "supervisor", "all")
STATES = ("succeeded", "failed", "cancelled")


class Client:
    """Creates jobs over HTTP, each with a key, and tries again until it gets an answer."""

    def __init__(self, service: Serving) -> None:
        self.service = service

    def create(self, key: str) -> str:
        """The id of the one job of this key, whatever dies meanwhile."""
        body = {"prompt": "steps=4 step=0.02", "model": "pocket", "frames": 5, "steps": 4}

        def ask() -> str:
            with suppress(httpx.HTTPError):
                answer = httpx.post(
                    f"{self.service.url}/api/v1/jobs",
                    json=body,
                    headers={"Authorization": f"Bearer {self.service.key}", "Idempotency-Key": key},
                    timeout=20,
                )
                answer.raise_for_status()
                return str(answer.json()["id"])
            return ""

        return str(wait_until(ask, f"an answer for {key}"))


def kill(service: Serving, victim: str, pid: int) -> None:
    """SIGKILL while `pid` stands still at its point; whatever is left goes on."""
    assert service.process is not None
    if victim in ("supervisor", "all"):
        if victim == "all":
            service.child("mutoscope.server").kill()
            service.child("mutoscope.worker").kill()
        service.kill()
        service.start()
        return
    service.child("mutoscope.worker" if victim == "worker" else "mutoscope.server").kill()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def one(service: Serving, victim: str, point: str, number: int, rng: random.Random) -> None:
    """One kill, and that all is well after it."""
    client = Client(service)
    service.arm(point)
    ids: dict[str, str] = {}
    keys = [f"soak-{number}-{i}" for i in range(rng.randint(1, 4))]
    threads = [threading.Thread(target=lambda k=key: ids.update({k: client.create(k)})) for key in keys]
    for thread in threads:
        thread.start()
    pid = service.hit(point)
    time.sleep(rng.random() * 0.05)  # not always at the same moment of the others
    kill(service, victim, pid)
    for thread in threads:
        thread.join()
    assert len(set(ids.values())) == len(keys), f"a key made two jobs: {ids}"
    for job_id in ids.values():
        job = service.wait(job_id, limit_s=60)
        assert job.state is State.SUCCEEDED, job
    service.assert_sound()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="times the whole matrix is run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", nargs="*", default=list(VICTIMS), choices=VICTIMS)
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=POINTS)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    result: dict[str, Any] = {"kills": 0, "failures": [], "seed": given.seed}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as service:
        service.start()
        for number in range(given.rounds):
            matrix = [(victim, point) for victim in given.victims for point in given.points]
            rng.shuffle(matrix)
            for victim, point in matrix:
                try:
                    one(service, victim, point, result["kills"], rng)
                except AssertionError as e:
                    result["failures"].append(
                        {"victim": victim, "point": point, "round": number, "why": str(e)}
                    )
                    print(f"FAILED {victim} at {point}: {e}\n{service.logged()[-2000:]}", file=sys.stderr)
                result["kills"] += 1
            print(
                f"round {number + 1}: {result['kills']} kills, {len(result['failures'])} failures", flush=True
            )
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
