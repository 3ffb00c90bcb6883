"""The torch-free contract between whoever asks for a video and the engine that makes it.

Everything a task needs is *conditioning* for one pipeline: text-to-video, image-to-video, extension, repainting and
layout differ only in the fields of `Conditioning` that are set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FramesHWC = npt.NDArray[np.uint8]
"""uint8 RGB, [H, W, 3] for a picture or [F, H, W, 3] for a clip."""

Picture = str | Path | FramesHWC
Clip = str | Path | FramesHWC


@dataclass(frozen=True, kw_only=True)
class Keyframe:
    """A picture that frame `index` must show. Negative indices count from the end, -1 is the last frame."""

    image: Picture
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class BoxTrack:
    """An object's box over time: `points` are (time 0..1, x0, y0, x1, y1) with coordinates as fractions of the frame.

    Between two points the box moves linearly; before the first and after the last it rests.
    """

    points: tuple[tuple[float, float, float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Outpaint:
    """How far the source is surrounded by new picture, as fractions of its own width (left, right) and height."""

    left: float = 0.0
    right: float = 0.0
    top: float = 0.0
    bottom: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the video must follow besides the prompt. All fields optional; see docs/conditioning.md.

    keyframes    pictures that given frames must show (first, last, any)
    video        a clip: control (no mask), or the source of a repaint (with mask or boxes) or of an outpaint
    control      how a control clip is read: "as-is", or "gray" for its luminance
    mask         picture or clip, white = generate, black = keep
    boxes        (x0, y0, x1, y1) fractions of the frame that are repainted, alternative to `mask`
    outpaint     new picture around `video`
    extend_start clip that comes before: the new video begins with its frames
    extend_end   clip that comes after: the new video ends with its frames
    references   pictures of objects to show, in this order
    tracks       boxes that objects follow
    compose      a second conditioning merged with this one (VACE composition)
    strength     scale of the hints, 1.0 = as trained
    """

    keyframes: tuple[Keyframe, ...] = ()
    video: Clip | None = None
    control: Literal["as-is", "gray"] = "as-is"
    mask: Picture | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    outpaint: Outpaint | None = None
    extend_start: Clip | None = None
    extend_end: Clip | None = None
    references: tuple[Picture, ...] = ()
    tracks: tuple[BoxTrack, ...] = ()
    compose: Conditioning | None = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video. None means: the model's default.

    width, height in pixels (multiples of 16), frames = 4n+1, fps in frames per second, guidance is the classifier-free
    guidance scale (1.0 = one pass per step), shift moves the noise schedule towards high noise.
    """

    prompt: str
    negative_prompt: str | None = None
    conditioning: Conditioning = field(default_factory=Conditioning)
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    seed: int = 0
    quality: Literal["draft", "standard"] = "standard"

    def summary(self) -> dict[str, Any]:
        """JSON-able description for metadata: arrays become their shapes, unset fields are left out."""

        def plain(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return f"array{list(value.shape)}"
            if isinstance(value, Path):
                return str(value)
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items() if v not in (None, (), {})}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return value

        out = {k: v for k, v in asdict(self).items() if v is not None}
        out["conditioning"] = {
            f: plain(getattr(self.conditioning, f)) if not hasattr(getattr(self.conditioning, f), "__dataclass_fields__")
            else plain(asdict(getattr(self.conditioning, f)))
            for f in self.conditioning.__dataclass_fields__
            if _is_set(getattr(self.conditioning, f)) and (f, getattr(self.conditioning, f)) not in _QUIET
        }
        if not out["conditioning"]:
            del out["conditioning"]
        return {k: plain(v) for k, v in out.items()}


_QUIET = (("control", "as-is"), ("strength", 1.0))


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, tuple) and not value)
