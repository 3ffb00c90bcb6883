"""From a job to what runs: its spec, the numbers it came to, and its files on this machine become a request.

Pure but for looking at the headers of clips. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mutoscope.errors import RequestError
from mutoscope.jobs.model import Resolved
from mutoscope.jobs.resolve import LEAST_FPS
from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.media.read import probe
from mutoscope.planning import TEMPORAL_STRIDE
from mutoscope.request import BoxTrack, Conditioning, GenerationRequest, Keyframe, Lora, Outpaint

Files = Mapping[Media, Path]
SAME_ASPECT = 0.01
"""Aspect ratios closer than that are the same: sizes are multiples of 16."""
MOST_FPS = 60.0


def generation_request(
    spec: JobSpec, resolved: Resolved, files: Files, loras: tuple[Lora, ...] = ()
) -> GenerationRequest:
    """What the engine is asked for. `loras` are those of the spec on the job's model: see `switches.taken`.

    A source or control clip shorter than the video makes the video shorter: its length could not be known when
    the job was made. If no length was asked for, the video lasts as long as the clip that it follows.

    Raises:
        RequestError, MediaError: what only shows with the files at hand.
    """
    frames = _frames(spec, resolved, files)
    keyframes = [Keyframe(image=files[k.media], index=round(k.at * (frames - 1))) for k in spec.keyframes]
    if spec.loop:
        first = next((k for k in keyframes if k.index == 0), None)
        if first is None:
            raise RequestError("A loop needs a picture for its first frame.", hint="Give a keyframe at 0.")
        keyframes.append(Keyframe(image=first.image, index=-1))
    return GenerationRequest(
        prompt=_prompt(spec),
        negative_prompt=spec.negative_prompt,
        conditioning=_conditioning(spec, resolved, files, tuple(keyframes)),
        width=resolved.width,
        height=resolved.height,
        frames=frames,
        fps=_fps(spec, resolved, frames, files),
        steps=resolved.steps,
        guidance=spec.guidance,
        shift=spec.shift,
        sampler=spec.sampler,
        seed=resolved.seed,
        quality=spec.quality,
        loras=loras,
        guidance_interval=spec.interval,
        guidance_kept=spec.guidance_kept,
        guidance_kind=spec.guidance_kind,
        cache=spec.cache,
    )


def _conditioning(
    spec: JobSpec, resolved: Resolved, files: Files, keyframes: tuple[Keyframe, ...]
) -> Conditioning:
    def at(media: Media | None) -> Path | None:
        return None if media is None else files[media]

    margins = None if spec.outpaint is None else Outpaint(**spec.outpaint.model_dump())
    if spec.reframe == "fit" and spec.source is not None and margins is None:
        margins = fit_margins(files[spec.source], resolved.width, resolved.height)
    control = None
    if spec.control is not None:
        control = Conditioning(video=files[spec.control], control=spec.control_kind)
    common = {
        "keyframes": keyframes,
        "extend_start": at(spec.extend_start),
        "extend_end": at(spec.extend_end),
        "references": tuple(files[r.media] for r in spec.references if r.weight > 0),
        "strength": spec.strength,
    }
    tracks = tuple(
        BoxTrack(points=tuple((p.at, p.x0, p.y0, p.x1, p.y1) for p in track)) for track in spec.tracks
    )
    if spec.source is None and control is not None and not tracks:
        return Conditioning(video=control.video, control=control.control, **common)  # type: ignore[arg-type]
    if spec.source is None:
        return Conditioning(tracks=tracks, compose=control, **common)  # type: ignore[arg-type]
    second = control
    if tracks:
        second = Conditioning(tracks=tracks, compose=control)
    return Conditioning(
        video=files[spec.source],
        mask=at(spec.mask),
        boxes=tuple((b.x0, b.y0, b.x1, b.y1) for b in spec.boxes),
        outpaint=margins,
        compose=second,
        **common,  # type: ignore[arg-type]
    )


def fit_margins(source: Path, width: int, height: int) -> Outpaint | None:
    """How far `source` has to be surrounded, evenly, to get the aspect ratio of width x height; None: not at all."""
    info = probe(source)
    ratio = (width / height) / (info.width / info.height)
    if abs(ratio - 1) < SAME_ASPECT:
        raise RequestError(
            f"The source has the aspect ratio asked for already ({info.width}x{info.height}).",
            hint="Ask for another one, or do not reframe it.",
        )
    if ratio > 1:
        return Outpaint(left=(ratio - 1) / 2, right=(ratio - 1) / 2)
    return Outpaint(top=(1 / ratio - 1) / 2, bottom=(1 / ratio - 1) / 2)


def _frames(spec: JobSpec, resolved: Resolved, files: Files) -> int:
    """Frames to make: as resolved, or what the shortest clip that is followed frame by frame allows."""
    frames = resolved.frames
    for media in (spec.source, spec.control):
        if media is not None and frames > 1:
            info = probe(files[media])
            have = max(info.frames, round(info.duration_s * info.fps) if info.fps else 0)
            if have > 1:  # a still is refused by the engine, with a better message
                frames = min(frames, max(1, (have - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1))
    return frames


def _fps(spec: JobSpec, resolved: Resolved, frames: int, files: Files) -> float:
    """Frames a second: as resolved, or those at which frames taken evenly from a clip keep its pace."""
    followed = spec.source or spec.control
    asked = (spec.seconds, spec.frames, spec.fps)
    if followed is None or frames == 1 or any(value is not None for value in asked):
        return resolved.fps
    duration_s = probe(files[followed]).duration_s
    return min(MOST_FPS, max(LEAST_FPS, frames / duration_s)) if duration_s > 0 else resolved.fps


def _prompt(spec: JobSpec) -> str:
    """Tags of references lose their "@": the model knows words, not tags."""
    text = spec.prompt
    for reference in spec.references:
        if reference.tag:
            text = re.sub(rf"@{re.escape(reference.tag)}\b", reference.tag, text)
    return text
