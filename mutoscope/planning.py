"""From what was asked to what will be run: defaults filled in, everything checked before any work starts. Torch-free."""

from __future__ import annotations

import difflib
import math
import secrets
from dataclasses import replace

from mutoscope.errors import RequestError
from mutoscope.manifest import ModelManifest
from mutoscope.media.read import probe
from mutoscope.request import Clip, GenerationRequest

SAMPLER_NAMES = ("unipc", "dpm++", "euler", "distill4")
MAX_STEPS = 1000
MAX_SIDE = 8192
MAX_FRAMES = 4001
MAX_PROMPT_CHARACTERS = 20_000
TEMPORAL_STRIDE = 4
DRAFT_SHARE = 0.4
"""A draft takes this share of the model's usual steps (never fewer than 4)."""


def plan(request: GenerationRequest, manifest: ModelManifest) -> GenerationRequest:
    """The request with every open field filled from the model's defaults; a missing seed is drawn here.

    Raises:
        RequestError: naming the field, what was got and what is possible.
    """
    d, limits = manifest.defaults, manifest.limits
    if not request.prompt.strip():
        raise RequestError("The prompt is empty.", hint="Say what the video should show.")
    if len(request.prompt) > MAX_PROMPT_CHARACTERS:
        raise RequestError(f"The prompt has {len(request.prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are taken.")
    if (request.width is None) != (request.height is None):
        raise RequestError("Only one of width and height was given.", hint="Give both, or neither.")
    width, height = request.width or d.width, request.height or d.height
    _check_size(width, height, manifest)
    frames = request.frames if request.frames is not None else _default_frames(request, manifest)
    _check_frames(frames, limits.max_frames, manifest.name)
    sampler = request.sampler or d.sampler
    if sampler not in SAMPLER_NAMES:
        close = difflib.get_close_matches(sampler, SAMPLER_NAMES, n=1, cutoff=0.3)
        raise RequestError(f"Sampler {sampler!r} is unknown; known: {', '.join(SAMPLER_NAMES)}.",
                           hint=f"Did you mean {close[0]!r}?" if close else "")  # fmt: skip
    steps = request.steps
    if steps is None:
        steps = max(4, math.ceil(d.steps * DRAFT_SHARE)) if request.quality == "draft" else d.steps
        steps = 4 if sampler == "distill4" else steps
    if not 1 <= steps <= MAX_STEPS or (sampler == "distill4" and steps != 4):
        expected = "exactly 4 for distill4" if sampler == "distill4" else f"1 to {MAX_STEPS}"
        raise RequestError(f"steps = {steps}, expected {expected}.")
    guidance = _number("guidance", request.guidance, d.guidance, 0.0, 100.0)
    if sampler == "distill4" and request.guidance is None:
        guidance = 1.0
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed = {seed}, expected 0 to 2^63 - 1.")
    _number("strength", request.conditioning.strength, 1.0, 0.0, 10.0)
    return replace(
        request,
        width=width,
        height=height,
        frames=frames,
        fps=_number("fps", request.fps, d.fps, 0.1, 240.0),
        steps=steps,
        guidance=guidance,
        shift=_number("shift", request.shift, d.shift, 0.01, 100.0),
        sampler=sampler,
        seed=seed,
        negative_prompt=d.negative_prompt if request.negative_prompt is None else request.negative_prompt,
    )


def frames_for(seconds: float, fps: float) -> int:
    """The number of frames of the form 4n+1 nearest to a length in seconds."""
    return max(0, round((seconds * fps - 1) / TEMPORAL_STRIDE)) * TEMPORAL_STRIDE + 1


def _number(name: str, value: float | None, default: float, low: float, high: float) -> float:
    value = default if value is None else value
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} = {value}, expected {low:g} to {high:g}.")
    return float(value)


def _check_size(width: int, height: int, manifest: ModelManifest) -> None:
    multiple = manifest.limits.size_multiple
    if width % multiple or height % multiple or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        near = [min(MAX_SIDE, max(multiple, round(v / multiple) * multiple)) for v in (width, height)]
        raise RequestError(f"Size {width}x{height}: width and height must be multiples of {multiple}, at most {MAX_SIDE}.",
                           hint=f"The nearest is {near[0]}x{near[1]}.")  # fmt: skip
    if manifest.limits.max_pixels and width * height > manifest.limits.max_pixels:
        sizes = ", ".join(f"{w}x{h}" for w, h in manifest.sizes)
        raise RequestError(f"Size {width}x{height} is more than {manifest.name} can do ({manifest.limits.max_pixels} pixels).",
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
    clips = [c for c in (request.conditioning.video,) if c is not None]
    return min([manifest.defaults.frames, *(_usable(c) for c in clips)])


def _usable(clip: Clip) -> int:
    n = probe(clip).frames if not hasattr(clip, "shape") else len(clip)
    return max(1, (n - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
