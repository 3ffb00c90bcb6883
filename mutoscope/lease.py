"""The job that a worker has in hand: how far it is, how long each stage took, and the newest picture of it."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass, field

from PIL import Image

from mutoscope.events import Preview
from mutoscope.jobs.model import Job
from mutoscope.media.frames import thumbnail

PREVIEW_PX = 256


@dataclass
class Lease:
    """The job in hand. The pulse sets `stop`, the main thread the rest."""

    job: Job
    stop: str = ""
    stage: str = "inputs"
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    eta_at: float | None = None
    preview: Preview | None = None
    news: bool = True
    written_at: float = 0.0  # monotonic
    previewed_at: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    load_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # seconds in each so far
    stage_at: float = field(default_factory=time.monotonic)

    def at(self, stage: str, fraction: float, eta_at: float | None = None) -> None:
        if stage != self.stage:
            self.times()
        self.stage, self.fraction = stage, max(self.fraction, min(fraction, 0.999))
        self.eta_at = eta_at or self.eta_at
        self.news = True

    def times(self) -> dict[str, float]:
        """Seconds in each stage, the current one up to now."""
        now = time.monotonic()
        self.stages[self.stage] = self.stages.get(self.stage, 0.0) + now - self.stage_at
        self.stage_at = now
        return {stage: round(seconds, 3) for stage, seconds in self.stages.items()}


def preview_uri(preview: Preview) -> str:
    """The middle frame as a small JPEG, as a data URI."""
    frame = preview.frames[len(preview.frames) // 2]
    height, width = frame.shape[:2]
    scale = max(1, min(8, PREVIEW_PX // max(width, height, 1)))
    picture = Image.fromarray(thumbnail(frame, PREVIEW_PX))
    if scale > 1:
        picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
