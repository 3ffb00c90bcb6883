"""What happens while a video is made. `engine.pipeline.generate` yields these in order; torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mutoscope.request import FramesHWC

StageName = Literal["load", "text", "conditioning", "denoise", "decode"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage begins, `seconds` after the start."""

    name: StageName
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """Step i of n of the denoising is done (i from 1); `eta_seconds` is the expected rest, decoding included."""

    i: int
    n: int
    seconds: float
    eta_seconds: float


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A rough picture of what is coming: [F', H/8, W/8, 3], straight from the latents, no VAE."""

    frames: FramesHWC


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The next finished frames, [f, H, W, 3]; nothing keeps them but the receiver."""

    frames: FramesHWC
    done: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end. `info` is what is embedded in the file, see `planning.describe`."""

    seconds: float
    info: dict[str, Any] = field(default_factory=dict)
    latents: Path | None = None


Event = Stage | Step | Preview | Frames | Result
