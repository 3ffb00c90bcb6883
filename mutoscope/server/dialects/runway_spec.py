"""From a body in Runway's terms to a `JobSpec`. Pure: files were looked at before, and are passed in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mutoscope.jobs.resolve import SHORT_SIDE
from mutoscope.jobs.spec import JobSpec, Keyframe, Media, Reference, Tier
from mutoscope.server.dialects import runway_support as support
from mutoscope.server.dialects.inputs import LONGEST, like
from mutoscope.server.dialects.runway_rules import (
    BodyRefused,
    Found,
    Hosts,
    Issue,
    Path,
    check,
    model_of,
    rules_of,
    table,
)

ACT_PROMPT = "the character of the reference picture moves like the person in the clip"
"""act_two takes no text, and the generator needs some."""

VENDOR_NAMES = {
    "prompt": "promptText",
    "negative_prompt": "negativePrompt",
    "seconds": "duration",
    "width": "ratio",
    "height": "ratio",
    "aspect_ratio": "ratio",
    "scale": "scaleFactor",
    "fps": "targetFramerate",
}

TIERS: dict[str, Tier] = {
    "480p": "540p",
    "540p": "540p",
    "720p": "720p",
    "768p": "720p",
    "1k": "1080p",
    "1080p": "1080p",
    "4k": "4k",
}
SHORT_SIDES = {
    "480p": 480,
    "512p": 512,
    "720p": 720,
    "768p": 768,
    "1k": 1024,
    "1080p": 1080,
    "2k": 1440,
    "4k": 2160,
}


@dataclass(frozen=True)
class File:
    """A file of a body: where it is, and its length in seconds and its size in pixels if they are known."""

    media: Media
    seconds: float | None = None
    size: tuple[int, int] | None = None


Files = Mapping[str, File]
"""By the string that the body names it with."""


def parse(endpoint: str, body: Any, hosts: Hosts) -> tuple[str, list[Found]]:
    """The model asked for and the files named, after everything that can be checked without looking at files.

    Raises:
        BodyRefused: every issue of the body at once.
    """
    model = model_of(endpoint, body)
    given = {k: v for k, v in body.items() if k != "model"}
    issues, found = check(rules_of(endpoint, model), given, hosts)
    issues = issues or [*_crossed(model, given), *support.refused(model, body)]
    if issues:
        raise BodyRefused(issues)
    return model, found


def parse_generate(kind: str, body: Any, hosts: Hosts) -> tuple[str, list[Found]]:
    """The same for `generate/video` and `generate/image`: the router's slug and the files named."""
    rules = {
        "fields": {"configId": {"text": [1, 200]}, "input": {"object": {}, "required": []}},
        "required": ["configId", "input"],
    }
    if not isinstance(body, dict):
        raise BodyRefused([Issue((), "expected a JSON object with configId and input.")])
    issues, _ = check(
        rules, {k: ({} if k == "input" and isinstance(v, dict) else v) for k, v in body.items()}, hosts
    )
    found: list[Found] = []
    if not issues:
        issues, found = check(table()["generate"][kind], body["input"], hosts, at=("input",))
        issues = issues or [
            Issue(("input", *i.path), i.message) for i in support.refused("", _no_roles(body["input"]))
        ]
    if not issues:
        roles = [e.get("role") for e in [*body["input"].get("referenceImages", ()),
                                         *body["input"].get("referenceVideos", ())]]  # fmt: skip
        for role in ("first", "last", "source"):
            if roles.count(role) > 1:
                issues.append(
                    Issue(
                        ("input",), f"has {roles.count(role)} entries with role {role}, at most one expected."
                    )
                )
        if any(e["role"] == "reference" for e in body["input"].get("referenceVideos", ())):
            issues.append(
                Issue(("input", "referenceVideos"), f"is not supported: {support.NO_CLIP_REFERENCES}.")
            )
        if body["input"].get("keyframes") and "source" not in roles:
            issues.append(Issue(("input", "keyframes"), "needs a referenceVideos entry with role source."))
    if issues:
        raise BodyRefused(issues)
    return body["configId"], found


def to_spec(endpoint: str, body: Mapping[str, Any], files: Files) -> JobSpec:
    """The job that a body asks for; `parse` has passed.

    Raises:
        BodyRefused: it cannot be done as asked.
    """
    build = {
        "text_to_video": _video, "image_to_video": _video, "video_to_video": _edit, "text_to_image": _image,
        "character_performance": _act, "video_upscale": _upscale, "image_upscale": _upscale, "video_to_hdr": _hdr,
    }[endpoint]  # fmt: skip
    return _spec(lambda: {"model": body["model"], **build(body, files)})


def to_generate_spec(kind: str, body: Mapping[str, Any], files: Files) -> JobSpec:
    """The job of `generate/video` or `generate/image`; the router chooses the model."""
    asked = body["input"]

    def fields() -> dict[str, Any]:
        common = _text(asked)
        if ratio := asked.get("aspectRatio"):
            common |= _size(
                {"ratio": ratio, "resolution": asked.get("resolution", "720p" if kind == "video" else "1k")}
            )
        elif kind == "video":
            common |= _shaped(asked, None)
        else:
            common |= _size({"resolution": asked.get("resolution", "1k")})
        images = asked.get("referenceImages", ())
        references = [i for i in images if i.get("role", "reference") == "reference"]
        common |= {"references": _references(references, files, "input.referenceImages")}
        if kind == "image":
            return {"operation": "image", **common}
        at = {"first": 0.0, "last": 1.0}
        frames = [Keyframe(media=files[i["uri"]].media, at=at[i["role"]]) for i in images if i["role"] in at]
        common |= {"keyframes": tuple(frames), "seconds": asked.get("duration")}
        for video in asked.get("referenceVideos", ()):
            source = files[video["uri"]]
            common |= {"control": source.media, "control_kind": "gray"}
            if "duration" not in asked:
                common["seconds"] = source.seconds
            if "aspectRatio" not in asked:
                common |= _shaped(asked, source)
            common["keyframes"] += _timed(asked.get("keyframes", ()), files, source, ("input", "keyframes"))
        return common

    return _spec(fields)


def _spec(fields: Callable[[], dict[str, Any]]) -> JobSpec:
    try:
        return JobSpec(**{k: v for k, v in fields().items() if v is not None})
    except ValidationError as e:
        raise BodyRefused([_as_issue(d) for d in e.errors()]) from e


def _as_issue(detail: Any) -> Issue:
    """What our own request model refused, in Runway's names."""
    path: Path = tuple(detail["loc"])
    name = VENDOR_NAMES.get(str(path[0]), str(path[0])) if path else ""
    message = str(detail["msg"]).removeprefix("Value error, ")
    given = (
        "" if not path or not isinstance(detail["input"], str | int | float) else f"got {detail['input']}: "
    )
    return Issue((name, *path[1:]) if name else (), f"{given}{message}.")


def _video(body: Mapping[str, Any], files: Files) -> dict[str, Any]:
    model = body["model"]
    asked = body.get("duration", support.DEFAULT_SECONDS.get(model, 5))
    image = body.get("promptImage")
    first = image if isinstance(image, str) else image[0]["uri"] if image else None
    spec = _text(body) | _shaped(body, files[first] if first is not None else None) | _format(body)
    spec |= {
        "seconds": None if asked == "auto" else float(asked),
        "quality": "draft" if body.get("draft") else None,
        "references": _references(body.get("references"), files, "references"),
    }
    if isinstance(image, str):
        spec["keyframes"] = (Keyframe(media=files[image].media),)
    elif image:
        at = {"first": 0.0, "last": 1.0}
        spec["keyframes"] = tuple(Keyframe(media=files[e["uri"]].media, at=at[e["position"]]) for e in image
                                  if "position" in e)  # fmt: skip
        spec["references"] += _references([e for e in image if "position" not in e], files, "promptImage")
    return spec


def _edit(body: Mapping[str, Any], files: Files) -> dict[str, Any]:
    """aleph and its like: the clip's structure is followed, the prompt says what it becomes."""
    name = "videoUri" if "videoUri" in body else "promptVideo"
    source = files[body[name]]
    spec = _text(body) | _format(body)
    follows_clip = body["model"] in ("gen4_aleph", "aleph2")
    spec |= _shaped({} if follows_clip else body, source, short=None)
    asked = body.get("duration", "auto")
    spec["seconds"] = source.seconds if asked == "auto" else float(asked)
    if body.get("draft"):
        spec["quality"] = "draft"
    references = body.get("references")
    frames: list[dict[str, Any]] = []
    if isinstance(references, list):
        frames = [r for r in references if "position" in r]
        references = [r for r in references if "position" not in r]
    spec["references"] = _references(references, files, "references")
    at = {"first": 0.0, "last": 1.0}
    keyframes = tuple(Keyframe(media=files[f["uri"]].media, at=at[f["position"]]) for f in frames)
    keyframes += _timed(body.get("keyframes", ()), files, source, ("keyframes",))
    keyframes += _timed([_as_timed(p) for p in body.get("promptImage", ())], files, source, ("promptImage",))
    spec["keyframes"] = keyframes
    if body.get("mode") == "extend":
        return spec | {"extend_start": source.media, "seconds": None if asked == "auto" else float(asked)}
    if aspect := body.get("targetAspectRatio"):
        if keyframes:
            raise BodyRefused([Issue(("targetAspectRatio",), "is not supported together with keyframes.")])
        spec = {k: v for k, v in spec.items() if k not in ("width", "height")}
        return spec | {"source": source.media, "reframe": "fit", "aspect_ratio": aspect, "resolution": "720p"}
    return spec | {"control": source.media, "control_kind": "gray"}


def _image(body: Mapping[str, Any], files: Files) -> dict[str, Any]:
    asked = body if "ratio" in body else {**body, "ratio": "1024:1024"}
    spec = _text(body) | _size(asked) | _format(body) | {"operation": "image"}
    spec["quality"] = "draft" if body.get("quality") in ("low", "very_low") else None
    spec["references"] = _references(body.get("referenceImages"), files, "referenceImages")
    return spec


def _act(body: Mapping[str, Any], files: Files) -> dict[str, Any]:
    """Body motion from the reference clip, looks from the character's picture."""
    return {
        "prompt": ACT_PROMPT,
        "control": files[body["reference"]["uri"]].media,
        "control_kind": "gray",
        "references": (Reference(media=files[body["character"]["uri"]].media, tag="character"),),
        "seed": body.get("seed"),
        "seconds": files[body["reference"]["uri"]].seconds,
        **_size({"ratio": body.get("ratio", "1280:720")}),
    }


def _upscale(body: Mapping[str, Any], files: Files) -> dict[str, Any]:
    model = body["model"]
    source = files[body["imageUri" if "imageUri" in body else "videoUri"]].media
    if model == "enhance_frame_rate":
        return {"operation": "reframe_rate", "source": source, "fps": frame_rate(body["targetFramerate"])}
    spec: dict[str, Any] = {"operation": "upscale", "source": source}
    if "imageUri" in body:
        return spec | {"scale": body.get("scaleFactor", 2), "format": "png"}
    if model == "upscale_v1":
        return spec | {"scale": 4}
    return spec | ({"resolution": TIERS[body["resolution"]]} if "resolution" in body else {"scale": 2})


def _hdr(body: Mapping[str, Any], files: Files) -> dict[str, Any]:
    chosen = _format({"outputFormat": body.get("outputFormat", "hdr10")})
    return {"operation": "hdr", "source": files[body["videoUri"]].media, **chosen}


def frame_rate(text: str) -> float:
    """23_98, 29_97 and 59_94 are the NTSC rates: 24, 30 and 60 divided by 1.001."""
    if "_" not in text:
        return float(text)
    return round(float(text.replace("_", "."))) / 1.001


def _text(body: Mapping[str, Any]) -> dict[str, Any]:
    seed = body.get("seed")
    return {
        "prompt": body.get("promptText", ""),
        "negative_prompt": body.get("negativePrompt"),
        "seed": None if seed is None else int(seed),
    }


def _format(body: Mapping[str, Any]) -> dict[str, Any]:
    asked = body.get("outputFormat")
    if asked is None:
        return {}
    name, hdr = support.FORMATS[asked]
    return {"format": name, "hdr": hdr}


def _size(body: Mapping[str, Any]) -> dict[str, Any]:
    """Size of the delivered file from `ratio` (pixels, an aspect ratio, or auto_...) and `resolution`."""
    ratio, resolution = str(body.get("ratio") or ""), str(body.get("resolution") or "").lower()
    if ratio.startswith("auto_"):
        resolution, ratio = ratio.removeprefix("auto_"), ""
    pair = re.fullmatch(r"(\d{1,5}):(\d{1,5})", ratio)
    if not pair:
        if ratio not in ("", "auto", "adaptive"):
            raise BodyRefused([Issue(("ratio",), f'got "{ratio}", expected width:height in pixels.')])
        if resolution and resolution not in TIERS:
            why = f"{resolution} is not supported without a fixed shape; give a ratio, or {', '.join(TIERS)}."
            raise BodyRefused([Issue(("resolution" if "resolution" in body else "ratio",), why)])
        return {"resolution": TIERS[resolution]} if resolution else {}
    width, height = int(pair[1]), int(pair[2])
    if max(width, height) > 64:
        if max(width, height) > 8192 or min(width, height) < 16:
            raise BodyRefused(
                [Issue(("ratio",), f"{ratio} is not supported: sides from 16 to 8192 pixels are.")]
            )
        return {"width": width, "height": height}
    short = SHORT_SIDES.get(resolution, 720)
    if resolution in TIERS and TIERS[resolution] == resolution:
        return {"aspect_ratio": ratio, "resolution": resolution}
    scale = short / min(width, height)
    return {"width": round(width * scale / 2) * 2, "height": round(height * scale / 2) * 2}


def _shaped(body: Mapping[str, Any], file: File | None, *, short: int | None = 720) -> dict[str, Any]:
    """`_size`; where that leaves the shape open it is the file's if it is known, and 16:9 else.

    `short`: its short side where no resolution says it; None: as large as the file, up to 1080p.
    """
    size = _size(body)
    if "width" in size or "aspect_ratio" in size:
        return size
    tier = size.get("resolution")
    if file is None or file.size is None:
        return {"resolution": tier or "720p"}
    width, height = like(file.size, SHORT_SIDE[tier] if tier else short, LONGEST if short is None else 4096)
    return {"width": width, "height": height}


def _references(given: Any, files: Files, name: str) -> tuple[Reference, ...]:
    entries = [{"uri": given}] if isinstance(given, str) else list(given or ())
    if len(entries) > 16:
        raise BodyRefused([Issue((name,), f"has {len(entries)} pictures, at most 16 are supported.")])
    return tuple(Reference(media=files[e["uri"]].media, tag=e.get("tag", "")) for e in entries)


def _as_timed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of aleph2's older promptImage as one of its keyframes."""
    position = entry["position"]
    if isinstance(position, str):
        return {"uri": entry["uri"], "at": 0.0 if position == "first" else 1.0}
    if position["type"] == "position":
        return {"uri": entry["uri"], "at": position["positionPercentage"]}
    return {"uri": entry["uri"], "seconds": position["timestampSeconds"]}


def _timed(entries: Any, files: Files, source: File, path: Path) -> tuple[Keyframe, ...]:
    """Keyframes at a fraction, or at seconds of a source whose length is known."""
    frames = []
    for i, entry in enumerate(entries):
        at = entry.get("at")
        if at is None:
            seconds = entry["seconds"]
            if source.seconds is None and seconds > 0:
                why = "is supported only for a clip that was uploaded or sent inline; give `at` (0..1) for a URL."
                raise BodyRefused([Issue((*path, i, "seconds"), why)])
            if source.seconds is not None and seconds > source.seconds:
                why = f"got {seconds:g}, but the clip lasts {source.seconds:g} s."
                raise BodyRefused([Issue((*path, i, "seconds"), why)])
            at = seconds / source.seconds if source.seconds else 0.0
        frames.append(Keyframe(media=files[entry["uri"]].media, at=float(at)))
    return tuple(frames)


def _crossed(model: str, body: Mapping[str, Any]) -> list[Issue]:
    """Rules that join several fields."""
    issues = []
    image = body.get("promptImage")
    if isinstance(image, list):
        places = [e.get("position") for e in image]
        if not image:
            issues.append(Issue(("promptImage",), "is empty, expected at least one picture."))
        if any(p is None for p in places) and any(p is not None for p in places):
            issues.append(
                Issue(("promptImage",), "mixes pictures with and without position; use one of both.")
            )
        for place in ("first", "last"):
            if places.count(place) > 1:
                issues.append(
                    Issue(("promptImage",), f"has {places.count(place)} pictures at {place}, one expected.")
                )
        if model in ("h3_max", "kling_4") and "last" in places and "first" not in places:
            issues.append(Issue(("promptImage",), "has a last frame without a first one."))
    profile, output = body.get("proresProfile"), body.get("outputFormat", "mp4")
    if profile is not None and output not in ("prores", "hdr_prores"):
        issues.append(Issue(("proresProfile",), f"needs outputFormat prores or hdr_prores, got {output}."))
    ranges = [(i, k.get("range")) for i, k in enumerate(body.get("keyframes", ()))]
    if any(r for _, r in ranges) and not all(r for _, r in ranges):
        issues.append(Issue(("keyframes",), "either all keyframes have a range, or none."))
    for i, window in ranges:
        if window and window["end_seconds"] <= window["start_seconds"]:
            issues.append(Issue(("keyframes", i, "range"), "ends before it starts."))
    tags = [r["tag"] for r in body.get("referenceImages", ()) if r.get("tag")]
    if len(set(tags)) < len(tags):
        issues.append(Issue(("referenceImages",), "two pictures have the same tag."))
    if model == "gen4_image_turbo" and not body.get("referenceImages"):
        issues.append(Issue(("referenceImages",), "is empty, expected at least one picture."))
    return issues


def _no_roles(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without the clips, whose roles are judged apart."""
    return {k: v for k, v in body.items() if k != "referenceVideos"}
