"""An account with an endpoint, jobs to tell about, and receivers on this machine that behave badly."""

from __future__ import annotations

import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mutoscope.jobs import webhooks
from mutoscope.jobs.model import Job, Priority, Resolved, State
from mutoscope.settings import Settings
from tests.service.databases import START


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, allow_private_hosts=("127.0.0.1",), webhook_timeout_s=5.0)


def make_job(**changes: Any) -> Job:
    """A running job of the account."""
    resolved = Resolved(
        width=64, height=64, frames=5, fps=16.0, steps=2, passes=1, out_width=64, out_height=64, seed=1, tier="draft",
        seconds=0.3,
    )  # fmt: skip
    job = Job(
        seq=1, id="11111111-2222-3333-4444-555555555555", account_id="acct", key_id=None, dialect="api",
        operation="video", state=State.RUNNING, stage="", step=0, steps=2, progress=0.0, eta_at=None, model="pocket",
        model_asked="auto", candidates=(), spec={"operation": "video", "prompt": "a ball"}, resolved=resolved,
        vendor={}, metadata={}, priority=Priority.NORMAL, cost=0, cost_captured=0, estimate_s=1.0, time_limit_s=60.0,
        attempt=1, crashes=0, fence=1, worker_id=None, lease_until=None, cancel_asked_at=None, created_at=START,
        started_at=START, finished_at=None, deleted_at=None, failure=None, message="", outputs=(), result={},
        batch_id=None, batch_index=None, parent_id=None,
    )  # fmt: skip
    return dataclasses.replace(job, **changes)


class Sends:
    """In place of the network: answers by a script, and remembers what was sent."""

    def __init__(self, *answers: webhooks.Answer) -> None:
        self.answers = list(answers) or [webhooks.Answer(status=200)]
        self.sent: list[webhooks.Message] = []

    def __call__(self, message: webhooks.Message) -> webhooks.Answer:
        self.sent.append(message)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Receiver:
    """A web server on a free port. The path says how it behaves; what comes in is kept."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.times: dict[str, float] = {}
        self.arrived = threading.Semaphore(0)
        self.release = threading.Event()  # lets everything go that hangs
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.times[self.path] = time.monotonic()
                outer.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                outer.arrived.release()
                outer.behave(self)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def behave(self, request: BaseHTTPRequestHandler) -> None:
        what = request.path.strip("/").split("/")[0]
        if what == "hang":
            self.release.wait()
            return
        if what == "reset":  # linger 0: closing sends RST
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        if what == "garbage":
            request.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
            return
        if what == "slow":
            request.send_response(200)
            request.send_header("Content-Length", "1000000")
            request.end_headers()
            request.wfile.write(b"x")
            request.wfile.flush()
            self.release.wait()
            return
        status = int(what)
        request.send_response(status)
        if status in (301, 302, 307, 308):
            request.send_header("Location", self.url("/200/redirected"))
        if status in (429, 503):
            request.send_header("Retry-After", "1234")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()
