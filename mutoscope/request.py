"""The torch-free contract between whoever asks for a video and the engine that makes it.

Everything a task needs is *conditioning* for one pipeline: text-to-video, image-to-video, extension, repainting and
layout differ only in the fields of `Conditioning` that are set.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

FramesHWC = npt.NDArray[np.uint8]
"""uint8 RGB, [H, W, 3] for a picture or [F, H, W, 3] for a clip."""

PrecisionName = Literal["auto", "exact", "bf16", "fp16", "int8", "fp8", "q8", "q6", "q5", "q4", "q3", "q2"]
"""How layers compute: see `engine/precision.py`."""

Lora = tuple[str | Path, float | None]
"""A LoRA file, or the name of one in the model's model.toml, with its strength; None: the usual strength."""

Picture = str | Path | FramesHWC
Clip = str | Path | FramesHWC
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of the frame."""


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
    boxes: tuple[Box, ...] = ()
    outpaint: Outpaint | None = None
    extend_start: Clip | None = None
    extend_end: Clip | None = None
    references: tuple[Picture, ...] = ()
    tracks: tuple[BoxTrack, ...] = ()
    compose: Conditioning | None = None
    strength: float = 1.0

    @property
    def is_empty(self) -> bool:
        """Nothing is given to follow: the prompt alone speaks."""
        clips = (self.video, self.mask, self.outpaint, self.extend_start, self.extend_end)
        several = (self.keyframes, self.boxes, self.references, self.tracks)
        rest_is_empty = self.compose is None or self.compose.is_empty
        return rest_is_empty and all(c is None for c in clips) and not any(several)

    @property
    def n_references(self) -> int:
        """How many reference pictures there are, those of `compose` included."""
        return len(self.references) + (self.compose.n_references if self.compose else 0)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video. None means: the model's default.

    width, height in pixels (multiples of 16), frames = 4n+1, fps in frames per second, guidance is the classifier-free
    guidance scale (1.0 = one pass per step), shift moves the noise schedule towards high noise, a missing seed is drawn
    at random.

    The rest is told in docs/faster.md:

    loras               low-rank changes of the model, with their strengths
    guidance_interval   the part of the steps that is guided, as fractions: (0.2, 0.8) leaves out a fifth at both ends
    guidance_kept       the guidance of what is given and kept, where the text has nothing to say
    guidance_kind       "cfg", or "zero-star" (CFG-Zero*), with the number of steps left out at the start: "zero-star=1"
    cache               steps that are not computed: "none", "easy", "tea" or "mag", with a threshold: "easy=0.05"
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
    seed: int | None = None
    quality: Literal["draft", "standard"] = "standard"
    loras: tuple[Lora, ...] = ()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_kept: float | None = None
    guidance_kind: str = "cfg"
    cache: str = "none"

    def summary(self) -> dict[str, Any]:
        """JSON-able description, for metadata: what is unset is left out, arrays are named by their shape."""
        return cast(dict[str, Any], _plain(self))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return f"array {list(value.shape)}"
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if is_dataclass(value):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        defaults = {f.name: f.default for f in fields(value)}
        out = {k: _plain(v) for k, v in given.items() if isinstance(v, np.ndarray) or v != defaults[k]}
        return {k: v for k, v in out.items() if v not in (None, {})}
    return value
