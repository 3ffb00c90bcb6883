"""From what is asked to the numbers of a model: sizes, frames, steps, the price tier. Pure.

The delivered file has the size that was asked for. The model makes the size of its own that is nearest in shape, and
in area; the difference is made up by resampling, and both are told. A length that the model cannot make at its frame
rate is made with its most frames at a lower rate, so that the clip lasts as long as asked.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

from mutoscope.errors import RequestError
from mutoscope.jobs import switches
from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.model import Resolved
from mutoscope.jobs.registry import WITHOUT_MODEL, Model
from mutoscope.jobs.spec import JobSpec
from mutoscope.media.deliver import HDR_FORMATS, PICTURES
from mutoscope.media.read import MAX_PIXELS
from mutoscope.planning import MAX_SIDE, TEMPORAL_STRIDE, frames_for, plan
from mutoscope.request import Conditioning, GenerationRequest

SHORT_SIDE = {"draft": 360, "360p": 360, "540p": 540, "720p": 720, "1080p": 1080, "4k": 2160}
DEFAULT_ASPECT = 16 / 9
SAME_SHAPE = 0.12
"""A listed size whose aspect ratio differs less than that (relative) is taken as it is."""
MAX_SEED = 2**31
LEAST_FPS = 1.0
"""A clip slower than that is a row of pictures."""
FIELDS = {"size": "width", "frames": "frames", "a": "frames", "steps": "steps", "sampler": "sampler", "fps": "fps",
          "guidance": "guidance", "shift": "shift", "guidance_interval": "guidance_interval",
          "guidance_kind": "guidance_kind", "guidance_kept": "guidance_kept", "cache": "cache"}  # fmt: skip
"""First words of `planning`'s messages, and the fields that they are about."""


def resolve(spec: JobSpec, model: Model) -> Resolved:
    """The numbers of a job.

    Raises:
        InvalidRequest: the model cannot do it; the message is that of `planning.plan`.
    """
    if spec.hdr and spec.operation == "image":
        raise Unsupported("HDR pictures are not made here; hdr is for videos.", field="hdr")
    check_parts(spec)
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
        shift=spec.shift, sampler=spec.sampler, seed=seed, quality=spec.quality, loras=switches.taken(spec, model),
        guidance_interval=spec.interval, guidance_kind=spec.guidance_kind, cache=spec.cache,
    )  # fmt: skip
    try:
        done = plan(asked, manifest)
    except RequestError as e:
        first = e.message.partition(" ")[0].lower()
        raise InvalidRequest(e.message, field=FIELDS.get(first, ""), hint=e.hint) from e
    _check_moments(spec, frames)
    assert done.steps is not None
    assert done.fps is not None
    made = Resolved(
        width=width, height=height, frames=frames, fps=done.fps, steps=done.steps,
        passes=switches.passes(done), out_width=out_width, out_height=out_height, seed=seed,
        switches=switches.label(done),
        tier="draft" if spec.quality == "draft" else spec.resolution or tier_of(out_width, out_height),
        seconds=0.0 if spec.operation == "image" else frames / done.fps,
    )  # fmt: skip
    return replace(made, seconds=round(made.seconds, 3))


def check_parts(spec: JobSpec) -> None:
    """Parts of a request that contradict each other, or lack one another: what `planning` would say with files in hand.

    Raises:
        InvalidRequest: names the part.
    """

    def need(is_right: bool, field: str, message: str) -> None:
        if not is_right:
            raise InvalidRequest(f"{field}: {message}", field=field)

    generates = spec.operation not in WITHOUT_MODEL
    need(not spec.loop or any(k.at == 0 for k in spec.keyframes), "loop", "needs a keyframe at 0.")
    if spec.format is not None:
        is_picture = spec.format in PICTURES
        pictures = ", ".join(PICTURES)
        need(
            spec.operation != "image" or is_picture,
            "format",
            f"{spec.format} is for videos, {pictures} expected.",
        )
        need(spec.operation != "video" or not is_picture, "format", f"{spec.format} is for single pictures.")
        if spec.hdr or spec.operation == "hdr":
            need(
                spec.format in HDR_FORMATS,
                "format",
                f"{spec.format} is not for HDR: {', '.join(HDR_FORMATS)} are.",
            )
    need(spec.scale is None or spec.operation == "upscale", "scale", "is for upscale only.")
    for part in ("loras", "guidance_interval", "guidance_kept", "guidance_kind", "cache"):
        is_usual = getattr(spec, part) == JobSpec.model_fields[part].default
        need(generates or is_usual, part, f"is for video and image; {spec.operation} needs no model.")
    if generates:
        for part in ("mask", "boxes", "outpaint", "reframe"):
            need(not getattr(spec, part) or spec.source is not None, part, "needs a source.")
    need(not (spec.mask and spec.boxes), "boxes", "there is a mask already; give one of them.")
    makes_mask = spec.outpaint is not None or bool(spec.reframe)
    need(not (makes_mask and (spec.mask or spec.boxes)), "mask" if spec.mask else "boxes",
         "new picture around the source makes its own mask; do it in two passes.")  # fmt: skip
    need(not (spec.outpaint and spec.reframe), "outpaint", "reframe decides it; give one of them.")
    if spec.outpaint is not None:
        need(any(spec.outpaint.model_dump().values()), "outpaint", "at least one side above 0 expected.")
    for i, box in enumerate(spec.boxes):
        need(box.x0 < box.x1 and box.y0 < box.y1, f"boxes[{i}]", "x0 < x1 and y0 < y1 expected.")
    for i, track in enumerate(spec.tracks):
        need(bool(track), f"tracks[{i}]", "at least one point expected.")
        for point in track:
            need(point.x0 < point.x1 and point.y0 < point.y1, f"tracks[{i}]", "x0 < x1 and y0 < y1 expected.")
    if spec.operation == "image":
        for part in ("extend_start", "extend_end", "control", "tracks", "loop"):
            need(not getattr(spec, part), part, "is for videos.")
    if spec.operation == "upscale":
        need(
            not (spec.scale and (spec.width or spec.resolution)),
            "scale",
            "give a factor or a size, not both.",
        )


def _check_moments(spec: JobSpec, frames: int) -> None:
    """Two keyframes for one frame."""
    seen: dict[int, int] = {frames - 1: -1} if spec.loop and frames > 1 else {}
    for i, keyframe in enumerate(spec.keyframes):
        index = round(keyframe.at * (frames - 1))
        if index in seen:
            other = "the loop" if seen[index] < 0 else f"keyframes[{seen[index]}]"
            raise InvalidRequest(
                f"keyframes[{i}]: at {keyframe.at:g} it falls on frame {index} of {frames}, as does {other}.",
                field=f"keyframes[{i}]", hint="Give one picture for each frame.",
            )  # fmt: skip
        seen[index] = i


def out_size(spec: JobSpec) -> tuple[int, int] | None:
    """The asked size of the file, even numbers of pixels; None: whatever the model makes.

    Raises:
        InvalidRequest: a size that nothing here can write.
    """
    if spec.width is not None and spec.height is not None:
        return _writable(_even(spec.width), _even(spec.height), "width")
    if spec.resolution is None:
        return None
    aspect = aspect_of(spec.aspect_ratio) if spec.aspect_ratio else DEFAULT_ASPECT
    short = SHORT_SIDE[spec.resolution]
    width, height = (_even(short * aspect), short) if aspect >= 1 else (short, _even(short / aspect))
    return _writable(width, height, "aspect_ratio")


def _writable(width: int, height: int, field: str) -> tuple[int, int]:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        most = f"at most {MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} million pixels expected"
        raise InvalidRequest(f"A file of {width}x{height}: {most}.", field=field)
    return width, height


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
    longest = min(most / LEAST_FPS, model.manifest.service.max_seconds or math.inf)
    if spec.seconds > longest:
        raise InvalidRequest(
            f"seconds = {spec.seconds:g}, {model.name} makes at most {longest:g}.", field="seconds"
        )
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
