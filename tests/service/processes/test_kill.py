"""kill -9 at named points: nothing is lost, nothing is charged twice, nothing half-written is seen.

A reduced matrix; `make soak` runs all points for all processes, many times.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mutoscope.jobs import feed, queue
from mutoscope.jobs.checkpoints import POINTS
from mutoscope.jobs.model import Failure, State
from tests.service.processes.harness import ROOT, Serving, serving, wait_until

WORK = "steps=4 step=0.02"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One service for all tests of this module that leave it running."""
    with serving(tmp_path_factory.mktemp("kill")) as made:
        made.start()
        yield made


@pytest.mark.parametrize("point", [p for p in POINTS if p != "accepted"])
def test_a_killed_worker_loses_nothing(service: Serving, point: str) -> None:
    service.arm(point)
    job_id = service.submit(WORK)
    pid = service.hit(point)
    if point != "committed":
        running = service.get(job_id)
        assert (running.state, running.outputs) == (State.RUNNING, ())
    os.kill(pid, signal.SIGKILL)
    job = service.wait(job_id)
    assert (job.state, job.failure) == (State.SUCCEEDED, None)
    assert job.attempt == (1 if point == "committed" else 2)
    assert job.crashes == job.attempt - 1
    assert service.worker_pid(other_than=pid) != pid
    service.assert_sound()


def test_a_killed_web_process_loses_no_job_and_no_event(service: Serving) -> None:
    """Killed between the commit of a create and its answer, and again while somebody listens."""
    url, who = f"{service.url}/api/v1/jobs", {"Authorization": f"Bearer {service.key}"}
    body = {"prompt": "steps=20 step=0.05", "model": "pocket", "frames": 5, "steps": 20}

    def create() -> httpx.Response:
        return httpx.post(url, json=body, headers=who | {"Idempotency-Key": "lost answer"}, timeout=60)

    def ids(after: int) -> Iterator[int]:
        headers = who | {"Last-Event-ID": str(after)}
        with httpx.stream("GET", f"{url}/{job_id}/events", headers=headers, timeout=60) as stream:
            yield from (int(line[4:]) for line in stream.iter_lines() if line.startswith("id: "))

    service.arm("accepted")
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(create)
        os.kill(service.hit("accepted"), signal.SIGKILL)
        assert isinstance(lost.exception(), httpx.HTTPError)
    again = create()
    assert (again.status_code, again.headers["idempotency-replayed"]) == (201, "true")
    job_id = again.json()["id"]

    first = ids(0)
    seen = [next(first) for _ in range(3)]
    service.child("mutoscope.server").kill()
    first.close()  # type: ignore[attr-defined]
    seen += ids(seen[-1])
    job = service.wait(job_id)
    assert (job.state, job.attempt) == (State.SUCCEEDED, 1)
    with service.db.read() as tx:
        told = {event.id for event in feed.after(tx, 0, job_id=job_id)}
    assert seen == sorted(set(seen))
    assert told <= set(seen)  # previews are dropped when a job has ended
    service.assert_sound()


@pytest.mark.parametrize("prompt", ["crash", "segv", "exit"])
def test_what_kills_every_worker_is_given_up(service: Serving, prompt: str) -> None:
    job = service.wait(service.submit(prompt))
    assert (job.state, job.failure, job.attempt) == (State.FAILED, Failure.WORKER_LOST, 2)
    service.assert_sound()


def test_a_crash_that_does_not_come_again_costs_an_attempt(service: Serving) -> None:
    job = service.wait(service.submit("crash once"))
    assert (job.state, job.attempt, job.crashes) == (State.SUCCEEDED, 2, 1)
    service.assert_sound()


def test_an_endless_loop_meets_its_time_limit(service: Serving) -> None:
    before = service.worker_pid()
    job = service.wait(service.submit("loop", time_limit_s=0.5))
    assert (job.state, job.failure, job.attempt) == (State.FAILED, Failure.TIME_LIMIT, 1)
    assert service.worker_pid(other_than=before)
    service.assert_sound()


def test_a_worker_that_ignores_a_cancel_is_killed(service: Serving) -> None:
    before = service.worker_pid()
    job_id = service.submit("deaf")
    service.wait(job_id, lambda job: job.state is State.RUNNING)
    service.cancel(job_id)
    job = service.wait(job_id)
    assert (job.state, job.failure) == (State.CANCELLED, None)
    assert service.worker_pid(other_than=before)
    assert service.wait(service.submit(WORK)).state is State.SUCCEEDED
    service.assert_sound()


def test_a_frozen_worker_is_replaced(service: Serving) -> None:
    service.arm("step")
    job_id = service.submit(WORK)
    pid = service.hit("step")  # it stands still, and nobody kills it but the supervisor
    job = service.wait(job_id)
    assert (job.state, job.attempt) == (State.SUCCEEDED, 2)
    assert service.worker_pid(other_than=pid)
    service.assert_sound()


def test_a_killed_supervisor_takes_all_with_it_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        service.start()
        service.arm("step")
        job_id, waiting = service.submit(WORK), service.submit(WORK)
        service.hit("step")
        service.kill()
        assert [service.get(i).state for i in (job_id, waiting)] == [State.RUNNING, State.QUEUED]
        service.start()
        jobs = [service.wait(i) for i in (job_id, waiting)]
        assert [(job.state, job.crashes) for job in jobs] == [(State.SUCCEEDED, 0)] * 2
        assert [job.attempt for job in jobs] == [2, 1]
        service.assert_sound()


def test_sigterm_lets_the_job_in_hand_finish_and_turns_newcomers_away(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        service.start()
        url = service.url
        job_id, waiting = service.submit("steps=40 step=0.05"), service.submit(WORK)
        service.wait(job_id, lambda job: job.progress > 0)
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)

        def is_refused() -> bool:
            try:
                httpx.get(f"{url}/healthz", timeout=1)
            except httpx.ConnectError:
                return True
            except httpx.HTTPError:
                pass
            return False

        wait_until(is_refused, "a refused connection")
        assert service.get(job_id).state is State.RUNNING  # at once, not when all has ended
        assert service.process.wait(60) == 0
        service.process = None
        assert (service.get(job_id).state, service.get(job_id).attempt) == (State.SUCCEEDED, 1)
        assert service.get(waiting).state is State.QUEUED


def test_a_worker_that_comes_back_from_the_dead_changes_nothing(tmp_path: Path) -> None:
    """Frozen when all but the last write is done, it wakes up after another worker has made the job."""
    with serving(tmp_path) as service:
        service.prepare()
        service.arm("before-commit")
        job_id = service.submit(WORK)
        command = [
            sys.executable,
            "-m",
            "mutoscope.fleet.child",
            str(os.getpid()),
            "mutoscope.worker",
            "cpu",
            "frozen",
        ]
        settings = service.settings.model_copy(
            update={"engine": "tests.service.fakes:FakeRunner", "preload": ""}
        )
        environment = {**service.environment, "MUTOSCOPE_SETTINGS_JSON": settings.model_dump_json()}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE) as frozen:
            try:
                service.hit("before-commit")
                assert {Path(name).parts[1] for name in service.files()} == {"1"}
                with service.db.write() as tx:
                    assert queue.lose(tx, job_id, 1, "its lease ran out")
                service.worker(worker_id="second")
                done = service.wait(job_id)
                assert (done.worker_id, done.fence) == ("second", 2)
                service.end()
                os.kill(frozen.pid, signal.SIGCONT)
                wait_until(lambda: {Path(n).parts[1] for n in service.files()} == {"2"}, "its files removed")
                assert service.get(job_id) == done
                service.assert_sound()
            finally:
                frozen.kill()
