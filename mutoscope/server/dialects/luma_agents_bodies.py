"""What Luma's Agents API takes: bodies as types, and pure functions from them to a spec.

Facts: types and texts of the official SDK (luma-agents 0.5.0). A picture or clip is an `ImageRef`: a URL, data, an
uploaded file or an earlier generation; what it turned out to be is a `File`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.inline import InputKind
from mutoscope.jobs.resolve import aspect_of
from mutoscope.jobs.spec import JobSpec, Keyframe, Media, Outpaint, Reference, Tier
from mutoscope.server.dialects.inputs import File
from mutoscope.server.dialects.luma_bodies import MODES, Mode

Model = Literal["uni-1", "uni-1-max", "ray-3.2"]
Type = Literal["image", "image_edit", "video", "video_edit", "video_reframe", "layering"]
Aspect = Literal["3:1", "2:1", "21:9", "16:9", "4:3", "3:2", "1:1", "3:4", "2:3", "9:16", "1:2", "1:3"]
Purpose = Literal["input", "reference"]

MAX_PROMPT = 6000
VIDEO_ASPECTS = ("9:16", "3:4", "1:1", "4:3", "16:9", "21:9")
DEFAULT_ASPECT = "16:9"
DEFAULT_RESOLUTION = "720p"
IMAGE_RESOLUTION: Tier = "1080p"
GRID_FPS = 24
"""keyframe_indexes of a video count frames at that rate, whatever the rate of the model."""
MOST_REFERENCES = {"image": 9, "image_edit": 8}
LONGEST_EDIT_S, LONGEST_REFRAME_S = 18.0, 30.0
LARGEST_MARGIN = 4.0
MANGA = "in the style of a manga"
SIGNALS = ("pose", "depth", "normals", "trajectory", "face")
FOLLOWED = "edits follow the brightness of the source, as closely as strength says"


class Impossible(InvalidRequest):
    """Each part may be right, together they are not; or a file is not what is expected. 422 at Luma."""


class Strict(BaseModel):
    """Nothing unknown is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageRef(Strict):
    """A picture or clip: exactly one of the first four."""

    url: str | None = Field(None, max_length=2048)
    data: str | None = None
    generation_id: str | None = None
    file_id: str | None = None
    media_type: str | None = Field(None, max_length=100)

    @property
    def uri(self) -> str | None:
        """What is looked into or fetched: a URL, or a data URI of the data."""
        return self.url if self.data is None else f"data:{self.media_type};base64,{self.data}"


class Named(Strict):
    """A place of a body that names a file, and what has to be there."""

    field: str
    ref: ImageRef
    kind: InputKind


class Layering(Strict):
    resolution: Literal["1k", "2k"] = "1k"


class Signal(Strict):
    """One of the five signals of an edit. None of them is here, so none of their details matters."""

    enabled: bool | None = None
    strength: Literal["precise", "coarse"] | None = None
    blur: float | None = Field(None, ge=0, le=1)
    augmentation: float | None = Field(None, ge=0, le=1)
    sparsity: float | None = Field(None, ge=0, le=1)


class Controls(Strict):
    pose: Signal | None = None
    depth: Signal | None = None
    normals: Signal | None = None
    trajectory: Signal | None = None
    face: Signal | None = None


class Edit(Strict):
    auto_controls: bool | None = None
    strength: Mode | None = None
    controls: Controls | None = None
    keyframes: tuple[ImageRef, ...] | None = Field(None, min_length=1, max_length=64)
    keyframe_indexes: tuple[int, ...] | None = Field(None, max_length=64)


class Position(Strict):
    """The source's rectangle in the new picture, in fractions of its width and height."""

    x_norm: float = Field(ge=-2, le=2)
    y_norm: float = Field(ge=-2, le=2)
    w_norm: float = Field(gt=0, le=2)
    h_norm: float = Field(gt=0, le=2)


class Video(Strict):
    resolution: Literal["360p", "540p", "720p", "1080p"] | None = None
    duration: Literal["5s", "10s"] | None = None
    hdr: bool | None = None
    exr_export: bool | None = None
    loop: bool | None = None
    start_frame: ImageRef | None = None
    end_frame: ImageRef | None = None
    keyframes: tuple[ImageRef, ...] | None = Field(None, min_length=1, max_length=64)
    keyframe_indexes: tuple[int, ...] | None = Field(None, max_length=64)
    source_position: Position | None = None
    edit: Edit | None = None


class GenerationBody(Strict):
    """POST /generations."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: Model | None = None
    type: Type | None = None
    aspect_ratio: Aspect | None = None
    image_ref: tuple[ImageRef, ...] = ()
    source: ImageRef | None = None
    style: Literal["auto", "manga"] = "auto"
    output_format: Literal["png", "jpeg"] | None = None
    web_search: bool = False
    layering: Layering | None = None
    user_id: str | None = Field(None, max_length=256)
    video: Video | None = None

    @property
    def kind(self) -> Type:
        """The type; the model says it where it was left out."""
        return self.type or ("video" if self.model == "ray-3.2" else "image")

    @property
    def name(self) -> Model:
        """The model; the type says it where it was left out."""
        return self.model or ("ray-3.2" if self.kind.startswith("video") else "uni-1")

    def named(self) -> Iterator[Named]:
        """All files that it names."""
        if self.source is not None:
            clip = self.kind in ("video_edit", "video_reframe")
            yield Named(field="source", ref=self.source, kind="video" if clip else "image")
        lists: list[tuple[str, tuple[ImageRef, ...]]] = [("image_ref", self.image_ref)]
        if self.video is not None:
            for name in ("start_frame", "end_frame"):
                if (frame := getattr(self.video, name)) is not None:
                    yield Named(field=f"video.{name}", ref=frame, kind="image")
            lists.append(("video.keyframes", self.video.keyframes or ()))
            if self.video.edit is not None:
                lists.append(("video.edit.keyframes", self.video.edit.keyframes or ()))
        for name, refs in lists:
            for i, ref in enumerate(refs):
                yield Named(field=f"{name}.{i}", ref=ref, kind="image")


class FileBody(Strict):
    """POST /files: a file that will be PUT."""

    mime_type: str = Field(pattern=r"^(image|video)/[\w.+-]+$", max_length=100)
    size_bytes: int = Field(ge=1)
    expires_at: str | None = Field(None, max_length=40)
    filename: str | None = Field(None, max_length=255)
    purpose: Purpose = "input"
    user_id: str | None = Field(None, max_length=256)


class SentFileBody(Strict):
    """POST /files as a form: what stands beside its part `file`."""

    mime_type: str | None = None
    size_bytes: str | None = None
    expires_at: str | None = Field(None, max_length=40)
    filename: str | None = Field(None, max_length=255)
    purpose: Purpose = "input"
    user_id: str | None = Field(None, max_length=256)


Files = Mapping[ImageRef, File]


# -- what goes together --------------------------------------------------------------------------------------


def check(body: GenerationBody) -> None:
    """Luma's rules, and what cannot be done here; before any file is looked at.

    Raises:
        InvalidRequest: a field that cannot be taken.
        Impossible: fields that do not go together.
        Unsupported: well-formed, and nothing here can do it.
    """
    if not body.prompt.strip():
        raise InvalidRequest("prompt: is empty.", field="prompt")
    if body.kind == "layering":
        raise Unsupported(
            "layering: pictures here have one layer, and none can be taken apart.", field="type"
        )
    if body.web_search:
        raise Unsupported(
            "web_search: nothing is looked up on the web here; leave it out.", field="web_search"
        )
    for one in body.named():
        _check_ref(one)
    is_video = body.kind.startswith("video")
    _need(is_video == (body.name == "ray-3.2"), "model", f"{body.name} does not make type {body.kind}.")
    _need(body.layering is None, "layering", "is for type layering.")
    _need(is_video or body.video is None, "video", f"is not for type {body.kind}.")
    _need(not is_video or body.output_format is None, "output_format", "is for pictures.")
    _need(not is_video or not body.image_ref, "image_ref", "is for pictures; videos have keyframes.")
    most = MOST_REFERENCES.get(body.kind, 0)
    _need(is_video or len(body.image_ref) <= most, "image_ref", f"at most {most} for type {body.kind}.")
    works_on = body.kind in ("image_edit", "video_edit", "video_reframe")
    _need(not works_on or body.source is not None, "source", f"is required for type {body.kind}.")
    _need(works_on or body.source is None, "source", f"is not for type {body.kind}.")
    if is_video:
        good = body.aspect_ratio is None or body.aspect_ratio in VIDEO_ASPECTS
        _need(good, "aspect_ratio", f"videos have {', '.join(VIDEO_ASPECTS)}.")
        _check_video(body, body.video or Video())


def _check_video(body: GenerationBody, video: Video) -> None:
    _need(not video.exr_export or bool(video.hdr), "video.exr_export", "needs hdr.")
    if video.exr_export:
        raise Unsupported(
            "video.exr_export: a job delivers one file here; make the clip, then EXR frames of it with the operation "
            "hdr and the format exr_sequence of POST /api/v1/jobs.", field="video.exr_export",
        )  # fmt: skip
    if body.kind == "video":
        _check_new_video(video)
    else:
        for name in ("duration", "loop", "end_frame", "keyframes", "keyframe_indexes"):
            _need(not getattr(video, name), f"video.{name}", f"is not for type {body.kind}.")
    if body.kind != "video_edit":
        _need(video.edit is None, "video.edit", "is for type video_edit.")
    else:
        _check_edit(video, video.edit or Edit())
    if body.kind != "video_reframe":
        _need(video.source_position is None, "video.source_position", "is for type video_reframe.")
        return
    _need(body.aspect_ratio is not None, "aspect_ratio", "is required for type video_reframe.")
    _need(not video.hdr, "video.hdr", "is not for type video_reframe.")
    _need(video.start_frame is None, "video.start_frame", "is not for type video_reframe.")
    tall = body.aspect_ratio in ("9:16", "3:4") and video.resolution == "1080p"
    _need(not tall, "video.resolution", f"1080p is not available for reframing to {body.aspect_ratio}.")
    if video.source_position is not None:
        _margins(video.source_position)


def _check_new_video(video: Video) -> None:
    long = video.duration == "10s"
    if video.hdr:
        _need(video.resolution in (None, "720p", "1080p"), "video.hdr", "is for 720p and 1080p.")
        _need(not long, "video.hdr", "is for 5s.")
    ends = video.start_frame is not None or video.end_frame is not None
    if video.loop:
        _need(not long, "video.loop", "is not for 10s.")
        _need(not video.hdr, "video.loop", "is not for hdr.")
        _need(video.end_frame is None, "video.loop", "ends with its start_frame; leave end_frame out.")
    if video.keyframes is not None or video.keyframe_indexes is not None:
        _need(
            not ends and not video.loop, "video.keyframes", "do not go with start_frame, end_frame and loop."
        )
        _indexes(video.keyframes, video.keyframe_indexes, "video", 240 if long else 120)
    _need(not (ends and long), "video.duration", "start_frame and end_frame make 5s; use keyframes for 10s.")
    for name in ("start_frame", "end_frame"):
        frame = getattr(video, name)
        extends = frame is not None and frame.generation_id is not None
        _need(not (extends and video.hdr), "video.hdr", "extensions are not HDR.")
    if video.loop and (video.start_frame is None or video.start_frame.generation_id is not None):
        raise Unsupported(
            "video.loop: a loop here needs a picture as start_frame to come back to.", field="video.loop"
        )


def _check_edit(video: Video, edit: Edit) -> None:
    if edit.keyframes is not None or edit.keyframe_indexes is not None:
        _need(video.start_frame is None, "video.edit.keyframes", "do not go with start_frame.")
        _indexes(edit.keyframes, edit.keyframe_indexes, "video.edit", None)
    for name in SIGNALS if edit.controls is not None else ():
        signal = getattr(edit.controls, name)
        if signal is not None and signal.enabled is not False:
            field = f"video.edit.controls.{name}"
            raise Unsupported(
                f"{field}: no model here finds it in a clip; {FOLLOWED}. Leave it out.", field=field
            )


def _indexes(
    keyframes: tuple[ImageRef, ...] | None, indexes: tuple[int, ...] | None, at: str, last: int | None
) -> None:
    same = keyframes is not None and indexes is not None and len(keyframes) == len(indexes)
    _need(same, f"{at}.keyframe_indexes", "as many as keyframes are needed.")
    assert indexes is not None
    _need(len(set(indexes)) == len(indexes), f"{at}.keyframe_indexes", "two are the same.")
    right = all(i >= 0 and (last is None or i <= last) for i in indexes)
    _need(
        right, f"{at}.keyframe_indexes", "0 and more expected." if last is None else f"0 to {last} expected."
    )


def _check_ref(one: Named) -> None:
    ref = one.ref
    given = [n for n in ("url", "data", "generation_id", "file_id") if getattr(ref, n) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"{one.field}: exactly one of url, data, generation_id and file_id expected.", field=one.field
        )
    declared = (ref.media_type or "").lower()
    if ref.data is not None and not declared:
        raise InvalidRequest(
            f"{one.field}.media_type: is required with data.", field=f"{one.field}.media_type"
        )
    if one.kind == "video" and ref.url is not None and not declared:
        raise InvalidRequest(
            f"{one.field}.media_type: is required with the URL of a clip.", field=f"{one.field}.media_type"
        )
    if declared and (ref.url is not None or ref.data is not None) and not declared.startswith(f"{one.kind}/"):
        raise Impossible(f"{one.field}: is declared as {declared}, {one.kind}/* expected.", field=one.field)


def _need(is_right: bool, field: str, message: str) -> None:
    if not is_right:
        raise Impossible(f"{field}: {message}", field=field)


# -- specs ---------------------------------------------------------------------------------------------------


def spec_of(body: GenerationBody, files: Files) -> JobSpec:
    """The job that is asked for; `check` has passed.

    Raises:
        Impossible: what shows only with the files known.
    """
    words = [body.prompt, *([MANGA] if body.style == "manga" else [])]
    common: dict[str, Any] = {
        "model": body.name, "prompt": ", ".join(words),
        "metadata": {} if body.user_id is None else {"user_id": body.user_id},
    }  # fmt: skip
    if body.kind in ("image", "image_edit"):
        refs = (*([body.source] if body.source is not None else []), *body.image_ref)
        return JobSpec(
            operation="image", references=tuple(Reference(media=files[ref].media) for ref in refs),
            aspect_ratio=_aspect(body, files, get_args(Aspect)), resolution=IMAGE_RESOLUTION,
            format=body.output_format or "png", **common,
        )  # fmt: skip
    video = body.video or Video()
    resolution = video.resolution or DEFAULT_RESOLUTION
    common |= {"resolution": resolution, "quality": "draft" if resolution == "360p" else "standard"}
    common |= {"hdr": bool(video.hdr), "aspect_ratio": _aspect(body, files, VIDEO_ASPECTS)}
    if body.kind == "video":
        return JobSpec(**common, **_new_video(video, files))
    assert body.source is not None
    source = files[body.source]
    longest = LONGEST_EDIT_S if body.kind == "video_edit" else LONGEST_REFRAME_S
    _need(
        source.seconds is None or source.seconds <= longest + 0.1, "source",
        f"lasts {source.seconds or 0:g} s, at most {longest:g} s are taken.",
    )  # fmt: skip
    common["seconds"] = source.seconds
    if body.kind == "video_reframe":
        margins = None if video.source_position is None else _margins(video.source_position)
        return JobSpec(source=source.media, outpaint=margins, reframe="" if margins else "fit", **common)
    edit = video.edit or Edit()
    return JobSpec(
        control=source.media, control_kind="gray", strength=MODES[edit.strength or "adhere_1"],
        keyframes=_edit_keyframes(video, edit, source, files), **common,
    )  # fmt: skip


def _aspect(body: GenerationBody, files: Files, known: Sequence[str]) -> str:
    """What was asked for, else the one nearest to the source, else 16:9."""
    size = files[body.source].size if body.source is not None else None
    if body.aspect_ratio is not None or size is None:
        return body.aspect_ratio or DEFAULT_ASPECT
    shape = math.log(size[0] / size[1])
    return min(known, key=lambda name: abs(math.log(aspect_of(name)) - shape))


def _new_video(video: Video, files: Files) -> dict[str, Any]:
    spec: dict[str, Any] = {"seconds": 10.0 if video.duration == "10s" else 5.0, "loop": bool(video.loop)}
    keyframes = []
    for name, at, extension in (("start_frame", 0.0, "extend_start"), ("end_frame", 1.0, "extend_end")):
        frame = getattr(video, name)
        if frame is None:
            continue
        file = files[frame]
        if file.kind == "video":
            _need(
                frame.generation_id is not None,
                f"video.{name}",
                "is a clip, a picture or a generation expected.",
            )
            spec[extension] = file.media
        else:
            keyframes.append(Keyframe(media=file.media, at=at))
    last = GRID_FPS * spec["seconds"]
    for ref, index in zip(video.keyframes or (), video.keyframe_indexes or (), strict=True):
        keyframes.append(Keyframe(media=_picture(ref, files), at=index / last))
    return spec | {"keyframes": tuple(keyframes)}


def _edit_keyframes(video: Video, edit: Edit, source: File, files: Files) -> tuple[Keyframe, ...]:
    """Guide frames, by their place in the source's own frames."""
    if video.start_frame is not None:
        return (Keyframe(media=_picture(video.start_frame, files)),)
    keyframes = []
    for ref, index in zip(edit.keyframes or (), edit.keyframe_indexes or (), strict=True):
        field = "video.edit.keyframe_indexes"
        if index and source.frames is None:
            raise Unsupported(
                f"{field}: how many frames the clip of a URL has is not known yet; upload it, or give 0.",
                field=field,
            )
        frames = source.frames or 1
        _need(index < frames, field, f"{index} is not in the source: it has {frames} frames.")
        keyframes.append(Keyframe(media=_picture(ref, files), at=index / max(1, frames - 1)))
    return tuple(keyframes)


def _picture(ref: ImageRef, files: Files) -> Media:
    file = files[ref]
    _need(file.kind == "image", "video", "a keyframe is a clip, a picture expected.")
    return file.media


def _margins(position: Position) -> Outpaint:
    """The new picture around the source, in fractions of the source.

    Raises:
        Impossible: there would be none.
        Unsupported: the source reaches beyond the picture, or is tiny in it.
    """
    field = "video.source_position"
    sides = {
        "left": position.x_norm / position.w_norm,
        "right": (1 - position.x_norm - position.w_norm) / position.w_norm,
        "top": position.y_norm / position.h_norm,
        "bottom": (1 - position.y_norm - position.h_norm) / position.h_norm,
    }
    rounded = {name: round(side, 4) for name, side in sides.items()}
    if min(rounded.values()) < 0:
        raise Unsupported(f"{field}: the source reaches beyond the picture; crop it before.", field=field)
    if max(rounded.values()) > LARGEST_MARGIN:
        raise Unsupported(
            f"{field}: more than {LARGEST_MARGIN:g} times the source would be new on one side.", field=field
        )
    _need(any(rounded.values()), field, "the source fills the picture: nothing would be new.")
    return Outpaint(**rounded)
