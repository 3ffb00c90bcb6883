"""From what is asked to the numbers of a model: sizes, frames, steps, the price tier. Pure.

The delivered file has the size that was asked for. The model makes the size of its own that is nearest in shape, and
in area; the difference is made up by resampling, and both are told. A length that the model cannot make at its frame rate
is made with its most frames at a lower rate, so that the clip lasts as long as asked.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

from mutoscope.errors import RequestError
from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.model import Resolved
from mutoscope.jobs.registry import WITHOUT_MODEL, Model
from mutoscope.jobs.spec import JobSpec
from mutoscope.planning import TEMPORAL_STRIDE, frames_for, plan
from mutoscope.request import Conditioning, GenerationRequest

SHORT_SIDE = {"draft": 360, "360p": 360, "540p": 540, "720p": 720, "1080p": 1080, "4k": 2160}
DEFAULT_ASPECT = 16 / 9
SAME_SHAPE = 0.12
"""A listed size whose aspect ratio differs less than that (relative) is taken as it is."""
MAX_SEED = 2**31


def resolve(spec: JobSpec, model: Model) -> Resolved:
    """The numbers of a job.

    Raises:
        InvalidRequest: the model cannot do it; the message is that of `planning.plan`.
    """
    if spec.hdr and spec.operation == "image":
        raise Unsupported("HDR pictures are not made here; hdr is for videos.", field="hdr")
    manifest = model.manifest
    seed = secrets.randbelow(MAX_SEED) if spec.seed is None else spec.seed
    out = out_size(spec)
    width, height = generation_size(model, out, spec)
    out_width, out_height = out or (width, height)
    frames, fps = length(spec, model)
    if spec.operation in WITHOUT_MODEL:
        seconds = spec.seconds or 5.0
        rate = spec.fps or manifest.defaults.fps
        tier = spec.resolution or tier_of(out_width, out_height) if out else spec.resolution or "720p"
        return Resolved(width=out_width, height=out_height, frames=1, fps=rate, steps=1, passes=1,
                        out_width=out_width, out_height=out_height, seed=seed, tier=tier, seconds=seconds)  # fmt: skip
    asked = GenerationRequest(
        prompt=spec.prompt or " .", negative_prompt=spec.negative_prompt, conditioning=Conditioning(),
        width=width, height=height, frames=frames, fps=fps, steps=spec.steps, guidance=spec.guidance,
        shift=spec.shift, sampler=spec.sampler, seed=seed, quality=spec.quality,
    )  # fmt: skip
    try:
        done = plan(asked, manifest)
    except RequestError as e:
        raise InvalidRequest(e.message, hint=e.hint) from e
    assert done.steps is not None and done.guidance is not None and done.fps is not None
    made = Resolved(
        width=width, height=height, frames=frames, fps=done.fps, steps=done.steps,
        passes=1 if done.guidance == 1.0 else 2, out_width=out_width, out_height=out_height, seed=seed,
        tier="draft" if spec.quality == "draft" else spec.resolution or tier_of(out_width, out_height),
        seconds=0.0 if spec.operation == "image" else frames / done.fps,
    )  # fmt: skip
    return replace(made, seconds=round(made.seconds, 3))


def out_size(spec: JobSpec) -> tuple[int, int] | None:
    """The asked size of the file, even numbers of pixels; None: whatever the model makes."""
    if spec.width is not None and spec.height is not None:
        return _even(spec.width), _even(spec.height)
    if spec.resolution is None:
        return None
    aspect = aspect_of(spec.aspect_ratio) if spec.aspect_ratio else DEFAULT_ASPECT
    short = SHORT_SIDE[spec.resolution]
    return (_even(short * aspect), short) if aspect >= 1 else (short, _even(short / aspect))


def aspect_of(text: str) -> float:
    """ "16:9" to width over height.

    Raises:
        InvalidRequest: a side of 0.
    """
    width, height = (int(part) for part in text.split(":"))
    if not width or not height:
        raise InvalidRequest(f"aspect_ratio = {text!r}, expected two numbers above 0.", field="aspect_ratio")
    return width / height


def generation_size(model: Model, out: tuple[int, int] | None, spec: JobSpec) -> tuple[int, int]:
    """The size that the model makes: of those that it lists the nearest in shape, then in area."""
    d, limits = model.manifest.defaults, model.manifest.limits
    if out is not None:
        aspect, area = out[0] / out[1], out[0] * out[1]
    elif spec.aspect_ratio:
        aspect, area = aspect_of(spec.aspect_ratio), d.width * d.height
    else:
        return d.width, d.height
    listed = model.manifest.sizes or ((d.width, d.height),)

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        shape = abs(math.log(size[0] / size[1] / aspect))
        return round(shape, 2), abs(math.log(size[0] * size[1] / area))

    best = min(listed, key=distance)
    if abs(math.log(best[0] / best[1] / aspect)) <= SAME_SHAPE:
        return best
    area = d.width * d.height
    m = limits.size_multiple
    width = max(m, round(math.sqrt(area * aspect) / m) * m)
    height = max(m, round(math.sqrt(area / aspect) / m) * m)
    while limits.max_pixels and width * height > limits.max_pixels:
        width, height = (width - m, height) if width >= height else (width, height - m)
    return width, height


def length(spec: JobSpec, model: Model) -> tuple[int, float]:
    """Frames (4n+1) and frames per second."""
    d, most = model.manifest.defaults, model.most_frames
    fps = spec.fps or d.fps
    if spec.operation == "image":
        return 1, fps
    if spec.frames is not None:
        return spec.frames, fps
    if spec.seconds is None:
        return d.frames, fps
    frames = max(1 + TEMPORAL_STRIDE, frames_for(spec.seconds, fps))
    if frames <= most:
        return frames, fps
    return most, most / spec.seconds


def tier_of(width: int, height: int) -> str:
    """The price tier of a size: by its short side."""
    short = min(width, height)
    return next((tier for tier, side in SHORT_SIDE.items() if tier != "draft" and short <= side), "4k")


def _even(value: float) -> int:
    return max(16, round(value / 2) * 2)
