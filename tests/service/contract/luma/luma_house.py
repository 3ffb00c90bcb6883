"""A server in this process with an account, both of Luma's SDKs, and a hand that does the worker's part."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from luma_agents import Luma
from lumaai import LumaAI
from PIL import Image

from mutoscope.jobs import accounts, queue
from mutoscope.jobs.model import Failure, Job, Output, State
from mutoscope.media.write import VideoWriter, write_image
from tests.service.contract.base import AppInProcess, InProcess

BASE = "http://testserver/dream-machine/v1"
AGENTS = "http://testserver/agents/v1"
FRAMES, FPS = 5, 8
"""Of the clips that are made."""


class House(AppInProcess):
    """The app, its database, and what workers do to jobs."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        super().__init__(data_dir, **settings)
        with self.db.write() as tx:
            account = accounts.create(tx, "test", account_id="test")
            _, self.key = accounts.create_key(tx, account.id, "test", value="My Auth Token")

    def client(self) -> LumaAI:
        return LumaAI(
            auth_token=self.key, base_url=BASE, http_client=httpx.Client(transport=InProcess(self.http)),
            _strict_response_validation=True, max_retries=0,
        )  # fmt: skip

    def agents(self, **options: Any) -> Luma:
        return Luma(
            auth_token=self.key, base_url=AGENTS, http_client=httpx.Client(transport=InProcess(self.http)),
            _strict_response_validation=True, **{"max_retries": 0, **options},
        )  # fmt: skip

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def finish(self) -> Job:
        """The next job is made: a real file."""
        job = self.claim()
        picture = job.operation == "image"
        relative = f"outputs/{job.id}/{job.fence}/{'image.png' if picture else 'video.mp4'}"
        path = self.settings.data_dir / relative
        path.parent.mkdir(parents=True)
        frames = np.zeros((FRAMES, 32, 64, 3), np.uint8)
        if picture:
            write_image(path, frames[0])
        else:
            with VideoWriter(path, width=64, height=32, fps=FPS) as writer:
                for frame in frames:
                    writer.write(frame)
        output = Output(role="image" if picture else "video", path=relative, width=64, height=32,
                        frames=1 if picture else FRAMES, fps=0.0 if picture else FPS,
                        size_bytes=path.stat().st_size, mime="image/png" if picture else "video/mp4")  # fmt: skip
        with self.db.write() as tx:
            done = queue.succeed(tx, job.id, job.fence, [output], {})
        assert done is not None
        return done

    def job_waits(self) -> bool:
        with self.db.read() as tx:
            return queue.depth(tx)[State.QUEUED] > 0

    def fail(self, failure: Failure, message: str) -> None:
        job = self.claim()
        with self.db.write() as tx:
            assert queue.fail(tx, job.id, job.fence, failure, message)


def picture() -> str:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def clip(tmp_path: Path, frames: int = 16) -> bytes:
    """Frames of 32 x 48 pixels, 8 a second."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, width=32, height=48, fps=8) as writer:
        for i in range(frames):
            writer.write(np.full((48, 32, 3), 8 * i % 256, np.uint8))
    return path.read_bytes()
