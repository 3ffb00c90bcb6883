"""A server in this process with an account, and a hand that does the worker's part of a job. For tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import uvicorn
from runwayml import RunwayML

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.model import Account, Failure, Job, Output
from mutoscope.media.write import VideoWriter, write_image
from tests.service.contract.base import AppInProcess, InProcess

BASE_URL = "http://testserver"


class House(AppInProcess):
    """The app, its database, and what workers do to jobs."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        super().__init__(data_dir, raising=True, **settings)
        with self.db.write() as tx:
            self.account: Account = accounts.create(tx, "test")
            _, self.key = accounts.create_key(tx, self.account.id, "test")

    def client(self, **options: Any) -> RunwayML:
        """The official SDK, which refuses every answer that is not typed."""
        http = options.pop("http_client", None) or httpx.Client(transport=InProcess(self.http))
        return RunwayML(
            api_key=self.key, base_url=BASE_URL, http_client=http, _strict_response_validation=True, **options
        )

    def succeed(self, job: Job) -> None:
        """A real file of the kind that was asked for."""
        picture = job.operation == "image"
        relative = f"outputs/{job.id}/{job.fence}/{'image.png' if picture else 'video.mp4'}"
        path = self.settings.data_dir / relative
        path.parent.mkdir(parents=True)
        frames = np.zeros((5, 16, 16, 3), np.uint8)
        if picture:
            write_image(path, frames[0])
        else:
            with VideoWriter(path, width=16, height=16, fps=8) as writer:
                for frame in frames:
                    writer.write(frame)
        output = Output(role="image" if picture else "video", path=relative, size_bytes=path.stat().st_size,
                        mime="image/png" if picture else "video/mp4", width=16, height=16)  # fmt: skip
        with self.db.write() as tx:
            assert queue.succeed(tx, job.id, job.fence, [output], {"seed": job.resolved.seed})

    def fail(self, job: Job, failure: Failure, message: str) -> None:
        with self.db.write() as tx:
            assert queue.fail(tx, job.id, job.fence, failure, message)


@contextlib.contextmanager
def listening(house: House, *, lifespan: Literal["on", "off"] = "off") -> Iterator[str]:
    """The app on a free port of this machine; its URL. Its lifespan is that of `house.http`, or this one's ("on")."""
    config = uvicorn.Config(house.app, host="127.0.0.1", port=0, log_level="warning", lifespan=lifespan)
    server = uvicorn.Server(config)
    ready = threading.Event()
    startup = server.startup

    async def announced(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        ready.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(30), "uvicorn does not start"
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def working(house: House) -> Iterator[None]:
    """A hand that finishes jobs as they come. Prompts with "fail" fail; those with "wait" stay running."""
    stop = threading.Event()
    broken: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.wait(0.02):
                with house.db.write() as tx:
                    job = queue.claim(tx, "worker", ["pocket"], "cpu")
                if job is None or "wait" in job.spec.get("prompt", ""):
                    continue
                if "fail" in job.spec.get("prompt", ""):
                    house.fail(job, Failure.BAD_OUTPUT, "Not a number.")
                else:
                    house.succeed(job)
        except BaseException as e:
            broken.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not broken, broken
