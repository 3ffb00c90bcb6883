"""From what was asked to what will be run: defaults filled in, everything checked before any work. Torch-free."""

from __future__ import annotations

import difflib
import math
import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from mutoscope import __version__
from mutoscope.digests import sha256_of
from mutoscope.errors import MediaError, RequestError
from mutoscope.manifest import Defaults, ModelManifest, suggest
from mutoscope.media.frames import check_frames
from mutoscope.media.read import probe
from mutoscope.request import (
    Box,
    Clip,
    Conditioning,
    GenerationRequest,
    Keyframe,
    Lora,
    Outpaint,
    Picture,
)

SAMPLER_NAMES = ("unipc", "dpm++", "euler", "distill4")
MAX_STEPS = 1000
MAX_SIDE = 8192
MAX_FRAMES = 4001
MAX_PROMPT_CHARACTERS = 20_000
TEMPORAL_STRIDE = 4
DRAFT_SHARE = 0.4
"""A draft takes this share of the model's usual steps (never fewer than 4)."""
DISTILLED_GUIDANCE, DISTILLED_SHIFT = 1.0, 5.0
"""What LightX2V runs its step-distilled models with (f8aee98, configs/distill/wan_t2v_distill_4step_cfg_lora.json)."""
MAX_LORA_STRENGTH = 100.0
GUIDANCE_KINDS = ("cfg", "zero-star")
ZERO_SHARE = 0.04
"""CFG-Zero* leaves out this share of the steps at the start, as its authors advise; at least one."""
CACHES = ("none", "easy", "tea", "mag")


def plan(request: GenerationRequest, manifest: ModelManifest) -> GenerationRequest:
    """The request with every open field filled from the model's defaults; a missing seed is drawn here.

    Raises:
        RequestError: naming the field, what was got and what is possible.
        MediaError: a picture or clip that is missing or of the wrong kind.
    """
    limits = manifest.limits
    loras = _loras(request.loras, manifest)
    d = manifest.defaults
    for name, _ in loras:
        if name in manifest.loras:
            d = replace(d, **manifest.loras[str(name)].settings)
    if not request.prompt.strip() and request.conditioning.is_empty:
        raise RequestError("The prompt is empty.", hint="Say what the video should show.")
    if len(request.prompt) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"The prompt has {len(request.prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are taken."
        )
    if (request.width is None) != (request.height is None):
        raise RequestError("Only one of width and height was given.", hint="Give both, or neither.")
    width = d.width if request.width is None else request.width
    height = d.height if request.height is None else request.height
    _check_size(width, height, manifest)
    frames = request.frames if request.frames is not None else _default_frames(request, manifest)
    _check_frames(frames, limits.max_frames, manifest.name)
    check_conditioning(request.conditioning, frames)
    sampler = request.sampler or d.sampler
    if sampler not in SAMPLER_NAMES:
        close = difflib.get_close_matches(sampler, SAMPLER_NAMES, n=1, cutoff=0.3)
        raise RequestError(f"Sampler {sampler!r} is unknown; known: {', '.join(SAMPLER_NAMES)}.",
                           hint=f"Did you mean {close[0]!r}?" if close else "")  # fmt: skip
    _choice("quality", request.quality, ("draft", "standard"))
    steps = request.steps
    if steps is None:
        steps = max(4, math.ceil(d.steps * DRAFT_SHARE)) if request.quality == "draft" else d.steps
        steps = 4 if sampler == "distill4" else steps
    if not 1 <= steps <= MAX_STEPS or (sampler == "distill4" and steps != 4):
        expected = "exactly 4 for distill4" if sampler == "distill4" else f"1 to {MAX_STEPS}"
        raise RequestError(f"steps = {steps}, expected {expected}.")
    if sampler == "distill4" and d.sampler != "distill4":  # those defaults are for another sampler
        d = replace(d, guidance=DISTILLED_GUIDANCE, shift=DISTILLED_SHIFT)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed = {seed}, expected 0 to 2^63 - 1.")
    return replace(
        request,
        width=width,
        height=height,
        frames=frames,
        fps=_number("fps", request.fps, d.fps, 0.1, 240.0),
        steps=steps,
        guidance=_number("guidance", request.guidance, d.guidance, 0.0, 100.0),
        shift=_number("shift", request.shift, d.shift, 0.01, 100.0),
        sampler=sampler,
        seed=seed,
        negative_prompt=d.negative_prompt if request.negative_prompt is None else request.negative_prompt,
        loras=loras,
        guidance_interval=_interval(request.guidance_interval),
        guidance_kept=_guidance_kept(request, d),
        guidance_kind=_guidance_kind(request.guidance_kind, steps),
        cache=_switch("cache", request.cache, CACHES, 0.0, 10.0),
    )


def describe(request: GenerationRequest, manifest: ModelManifest, precision: str = "auto") -> dict[str, Any]:
    """What is embedded in a finished file: all that is needed to make it again, nothing that changes between runs.

    Raises:
        FileError: a LoRA is missing: its SHA-256 is told.
    """
    own = {name: lora.file.path for name, lora in manifest.loras.items()}
    digests = {str(name): sha256_of(own.get(str(name), Path(name))) for name, _ in request.loras}
    return {
        **({"lora_sha256": digests} if digests else {}),
        **({"precision": precision} if precision != "auto" else {}),
        "version": __version__,
        "model": manifest.name,
        "seed": request.seed,
        "request": request.summary(),
    }


_UNITS = {
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "B": 1,
    "": 1,
}


def size_bytes(text: str) -> int:
    """An amount of memory like 12GiB, 700 MiB or 1.5GB in bytes. Raises RequestError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?I?B|)", text.strip().upper())
    amount = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2], 0))
    if not amount:
        raise RequestError(f"{text!r} is no amount of memory.", hint="Like 12GiB or 700MiB.")
    return amount


def frames_for(seconds: float, fps: float) -> int:
    """The number of frames of the form 4n+1 nearest to a length in seconds."""
    return max(0, round((seconds * fps - 1) / TEMPORAL_STRIDE)) * TEMPORAL_STRIDE + 1


def _number(name: str, value: float | None, default: float, low: float, high: float) -> float:
    value = default if value is None else value
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} = {value}, expected {low:g} to {high:g}.")
    return float(value)


def _loras(loras: tuple[Lora, ...], manifest: ModelManifest) -> tuple[Lora, ...]:
    """Each with its strength; files that are there, or names of the model's own."""
    planned: list[Lora] = []
    for lora in loras:
        if isinstance(lora, str | Path) or len(lora) != 2:
            raise RequestError(f"loras: got {lora!r}, pairs of a file (or name) and its strength expected.",
                               hint='Like loras=(("style.safetensors", 0.8),).')  # fmt: skip
        file, strength = lora
        own = manifest.loras.get(str(file))
        if own is None and not Path(file).is_file():
            names = f"; {manifest.name} has {', '.join(manifest.loras)}" if manifest.loras else ""
            raise RequestError(f"LoRA {str(file)!r}: no such file{names}.",
                               hint=suggest(str(file), manifest.loras) or "Give the path of a LoRA file.")  # fmt: skip
        strength = _number(f"the strength of LoRA {str(file)!r}", strength, own.strength if own else 1.0,
                           -MAX_LORA_STRENGTH, MAX_LORA_STRENGTH)  # fmt: skip
        planned.append((str(file) if own else file, strength))
    return tuple(planned)


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    start, stop = interval if len(interval) == 2 else (math.nan, math.nan)
    if not 0 <= start <= stop <= 1:
        raise RequestError(f"guidance_interval = {tuple(interval)}, two fractions of the steps expected.",
                           hint="Like (0.2, 0.8): from a fifth to four fifths.")  # fmt: skip
    return float(start), float(stop)


def _guidance_kept(request: GenerationRequest, defaults: Defaults) -> float | None:
    """None where nothing is given, or what is given is guided like the rest."""
    value = defaults.guidance_kept if request.guidance_kept is None else request.guidance_kept
    if value is None:
        return None
    value = _number("guidance_kept", value, 0.0, 0.0, 100.0)
    return None if request.conditioning.is_empty else value


def _guidance_kind(text: str, steps: int) -> str:
    """ "zero-star" gets the number of steps that it leaves out."""
    kind = _switch("guidance_kind", text, GUIDANCE_KINDS, 0, steps - 1)
    name, equals, number = kind.partition("=")
    if name != "zero-star":
        return kind
    zero = float(number) if equals else min(max(1, round(ZERO_SHARE * steps)), steps - 1)
    if zero != int(zero):
        raise RequestError(f"guidance_kind = {text!r}: a whole number of steps expected.")
    return f"{name}={int(zero)}"


def _switch(field: str, text: str, known: tuple[str, ...], low: float, high: float) -> str:
    """A name, or a name with a number; the first of `known` takes none."""
    name, equals, number = text.partition("=")
    if name not in known or (equals and name == known[0]):
        raise RequestError(f"{field} = {text!r}, expected one of {', '.join(known)}.",
                           hint=suggest(name, known))  # fmt: skip
    if not equals:
        return name
    try:
        value = float(number)
    except ValueError:
        raise RequestError(f"{field} = {text!r}: {number!r} is not a number.") from None
    return f"{name}={_number(field, value, 0.0, low, high):g}"


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(f"{name} = {value!r}, expected {' or '.join(map(repr, known))}.")


def _check_size(width: int, height: int, manifest: ModelManifest) -> None:
    multiple = manifest.limits.size_multiple
    if width % multiple or height % multiple or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        near = [min(MAX_SIDE, max(multiple, round(v / multiple) * multiple)) for v in (width, height)]
        raise RequestError(
            f"Size {width}x{height}: width and height must be multiples of {multiple}, at most {MAX_SIDE}.",
            hint=f"The nearest is {near[0]}x{near[1]}.",
        )
    if manifest.limits.max_pixels and width * height > manifest.limits.max_pixels:
        sizes = ", ".join(f"{w}x{h}" for w, h in manifest.sizes)
        most = manifest.limits.max_pixels
        raise RequestError(f"Size {width}x{height} is more than {manifest.name} can do ({most} pixels).",
                           hint=f"It was made for {sizes}." if sizes else "")  # fmt: skip


def _check_frames(frames: int, max_frames: int, name: str) -> None:
    most = min(max_frames or MAX_FRAMES, MAX_FRAMES)
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        below = max(1, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
        raise RequestError(f"{frames} frames: the number must be 4n+1 (1, 5, 9, ...).",
                           hint=f"Ask for {below} or {below + TEMPORAL_STRIDE}.")  # fmt: skip
    if frames > most:
        raise RequestError(f"{frames} frames are more than {name} can do ({most}).")


def _default_frames(request: GenerationRequest, manifest: ModelManifest) -> int:
    """The model's own length, or less if a clip that must be followed is shorter."""
    clip = request.conditioning.video
    if clip is None:
        return manifest.defaults.frames
    return min(manifest.defaults.frames, _whole_frames(_available(clip)))


# -- conditioning --------------------------------------------------------------------------------------------
# Checked here by the headers of files, before a model is loaded; engine/conditioning.py reads them and uses the same
# functions for what only reading can tell.


def check_conditioning(c: Conditioning, n_frames: int) -> None:
    """Raise if the parts contradict each other, do not fit a video of `n_frames`, or name files that are not there."""
    _refuse_contradictions(c)
    _number("strength", c.strength, 1.0, 0.0, 10.0)
    seen: set[int] = set()
    for keyframe in c.keyframes:
        index = keyframe_index(keyframe, n_frames)
        if index in seen:
            raise RequestError(f"Frame {index} has two keyframes.", hint="Give one picture for each frame.")
        seen.add(index)
        _check_picture(keyframe.image)
    for reference in c.references:
        _check_picture(reference)
    for box in c.boxes:
        check_box(box)
    for track in c.tracks:
        if not track.points:
            raise RequestError(
                "A box track without points.", hint="Give at least one (time, x0, y0, x1, y1)."
            )
        for time, *corners in track.points:
            _number("the time of a box track's point", time, 0.0, 0.0, 1.0)
            check_box((corners[0], corners[1], corners[2], corners[3]))
    if c.outpaint is not None:
        check_outpaint(c.outpaint)
    if c.video is not None:
        what = "control clip" if c.mask is None and not c.boxes and c.outpaint is None else "source video"
        check_length(_available(c.video), n_frames, what)
    for clip in (c.extend_start, c.extend_end):
        if clip is not None:
            extension_frames(n_frames)
            _available(clip)
    if c.mask is not None and c.video is not None:
        _check_mask(c.mask, c.video)
    if c.compose is not None:
        check_conditioning(c.compose, n_frames)
        if c.compose.strength != 1.0:
            raise RequestError("A strength was given inside of `compose`; there is one for the whole.",
                               hint="Give it to the outer conditioning.")  # fmt: skip


def keyframe_index(keyframe: Keyframe, n_frames: int) -> int:
    """The frame that a keyframe means, counted from 0."""
    index = keyframe.index + n_frames if keyframe.index < 0 else keyframe.index
    if not 0 <= index < n_frames:
        raise RequestError(f"Keyframe {keyframe.index} is outside of a video of {n_frames} frames.",
                           hint=f"Expected {-n_frames} to {n_frames - 1}.")  # fmt: skip
    return index


def extension_frames(n_frames: int) -> int:
    """How many frames of a clip to extend are kept at most: half of the video."""
    most = (n_frames - 1) // 2
    if most < 1:
        raise RequestError(
            f"A video of {n_frames} frame cannot extend a clip.", hint="Ask for 5 frames or more."
        )
    return most


def check_box(box: Box) -> None:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise RequestError(
            f"Box {box}: expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 (fractions of the frame)."
        )


def check_outpaint(margin: Outpaint) -> None:
    sides = (margin.left, margin.right, margin.top, margin.bottom)
    if not all(0 <= side <= 4 for side in sides) or not any(sides):
        raise RequestError(
            f"Outpaint {sides}: expected left, right, top, bottom of 0 to 4, at least one above 0."
        )


def check_length(available: int, needed: int, what: str) -> None:
    if available < needed:
        raise RequestError(
            f"The {what} has {available} frames, {needed} are needed.",
            hint=f"Ask for {_whole_frames(available)} frames or fewer, or give a longer clip.",
        )


def _refuse_contradictions(c: Conditioning) -> None:
    def need(condition: bool, message: str, hint: str = "") -> None:
        if not condition:
            raise RequestError(message, hint=hint)

    _choice("control", c.control, ("as-is", "gray"))
    is_control = c.video is not None and c.mask is None and not c.boxes and c.outpaint is None
    need(c.control == "as-is" or is_control, "control = 'gray' was given without a control clip.",
         "It is for a video that is followed, without mask, boxes or outpaint.")  # fmt: skip
    need(not ((c.mask is not None or c.boxes) and c.video is None),
         "A mask or boxes were given without a source video.",
         "Add the clip whose masked part is to be repainted.")  # fmt: skip
    need(not (c.mask is not None and c.boxes), "Both a mask and boxes were given.", "Give one of them.")
    need(not (c.outpaint is not None and c.video is None), "Outpainting needs a source video.")
    need(not (c.outpaint is not None and (c.mask is not None or c.boxes)), "Outpainting makes its own mask.",
         "Leave out the mask and the boxes, or do it in two passes.")  # fmt: skip
    need(not (c.tracks and c.video is not None), "Box tracks and a source video were given; both are the base picture.",
         "Put one of them into `compose`.")  # fmt: skip


def _check_picture(picture: Picture) -> None:
    if not isinstance(picture, (str, Path)):
        check_frames(picture, ndim=(3,), what="picture")
    elif probe(picture).kind == "video":
        raise MediaError(
            f"{picture}: is a video, a picture expected.", hint="Extract the frame you mean first."
        )


def _check_mask(mask: Picture, video: Clip) -> None:
    """One picture, or a clip as long as the video: they are read frame by frame together."""
    if not isinstance(mask, (str, Path)):
        frames = 1 if check_frames(mask, what="mask").ndim == 3 else len(mask)
    else:
        frames = probe(mask).frames
    if frames != 1 and frames != _frames(video):
        raise RequestError(f"The mask has {frames} frames, its video {_frames(video)}.",
                           hint="Give a mask for each frame of the video, or one picture for all.")  # fmt: skip


def _frames(clip: Clip) -> int:
    return probe(clip).frames if isinstance(clip, (str, Path)) else len(clip)


def _available(clip: Clip) -> int:
    """Frames of a clip by its header. A clip of changing rate is brought to a constant one, which may need more."""
    if not isinstance(clip, (str, Path)):
        return len(check_frames(clip, ndim=(4,), what="clip"))
    info = probe(clip)
    return max(info.frames, round(info.duration_s * info.fps) if info.fps else 0)


def _whole_frames(n: int) -> int:
    return max(1, (n - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
