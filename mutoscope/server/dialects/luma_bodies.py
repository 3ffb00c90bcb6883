"""What Luma's Dream Machine API takes: bodies as types, and pure functions from them to a spec.

Facts: the official OpenAPI document (v1.1.0) and the documented error texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.spec import JobSpec, Keyframe, Media, Outpaint, Reference, Tier, first_mistake
from mutoscope.server.dialects.inputs import File, Named, like

T = TypeVar("T", bound=BaseModel)
Aspect = Literal["1:1", "16:9", "9:16", "4:3", "3:4", "21:9", "9:21"]
VideoModel = Literal["ray-2", "ray-flash-2", "ray-1-6"]
ImageModel = Literal["photon-1", "photon-flash-1"]
RESOLUTIONS = ("540p", "720p", "1080p", "4k")
DEFAULT_RESOLUTION: Tier = "720p"
IMAGE_RESOLUTION: Tier = "1080p"
PROMPT = (3, 5000)
LONGEST_S = 30

CONCEPTS: dict[str, str] = {
    "static": "static camera",
    "pan_left": "the camera pans left",
    "pan_right": "the camera pans right",
    "tilt_up": "the camera tilts up",
    "tilt_down": "the camera tilts down",
    "zoom_in": "the camera zooms in",
    "zoom_out": "the camera zooms out",
    "roll_left": "the camera rolls",
    "roll_right": "the camera rolls",
}
"""Concepts are words at the end of the prompt; those are listed that models here know."""
CAMERA_MOTIONS = tuple(f"camera {name.replace('_', ' ')}" for name in CONCEPTS)
MODES: dict[str, float] = {
    "adhere_1": 1.0, "adhere_2": 0.9, "adhere_3": 0.8, "flex_1": 0.7, "flex_2": 0.6, "flex_3": 0.5,
    "reimagine_1": 0.4, "reimagine_2": 0.3, "reimagine_3": 0.2,
}  # fmt: skip
"""Of modify: how closely the source's structure is followed."""
Mode = Literal["adhere_1", "adhere_2", "adhere_3", "flex_1", "flex_2", "flex_3", "reimagine_1", "reimagine_2",
               "reimagine_3"]  # fmt: skip


class Body(BaseModel):
    """Nothing unknown is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    callback_url: str | None = Field(None, max_length=2048)

    def named(self) -> Iterator[Named]:
        """The files that it names."""
        return iter(())


class ImageFrame(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["image"]
    url: str


class GenerationFrame(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["generation"]
    id: str


Frame = Annotated[ImageFrame | GenerationFrame, Field(discriminator="type")]


class Keyframes(BaseModel):
    model_config = ConfigDict(extra="forbid")
    frame0: Frame | None = None
    frame1: Frame | None = None


class Concept(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: str


class Url(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str


class Weighted(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str
    weight: float = Field(1.0, ge=0, le=1)


class Identity(BaseModel):
    model_config = ConfigDict(extra="forbid")
    images: list[str] = Field(min_length=1, max_length=4)


class Character(BaseModel):
    model_config = ConfigDict(extra="forbid")
    identity0: Identity


class VideoBody(Body):
    """POST /generations/video."""

    generation_type: Literal["video"] = "video"
    model: VideoModel = "ray-1-6"
    prompt: str | None = None
    aspect_ratio: Aspect | None = None
    loop: bool = False
    resolution: str | None = None
    duration: str | None = None
    keyframes: Keyframes | None = None
    concepts: list[Concept] = Field(default_factory=list, max_length=8)

    def named(self) -> Iterator[Named]:
        for name in ("frame0", "frame1"):
            frame = getattr(self.keyframes, name) if self.keyframes else None
            if isinstance(frame, ImageFrame):
                yield Named(f"keyframes.{name}.url", frame.url, "image")


class ImageBody(Body):
    """POST /generations/image."""

    generation_type: Literal["image"] = "image"
    model: ImageModel = "photon-1"
    prompt: str | None = None
    aspect_ratio: Aspect = "16:9"
    format: Literal["jpg", "png"] = "jpg"
    image_ref: list[Weighted] = Field(default_factory=list, max_length=8)
    style_ref: list[Weighted] = Field(default_factory=list, max_length=1)
    character_ref: Character | None = None
    modify_image_ref: Weighted | None = None
    sync: bool = False
    sync_timeout: float = Field(60, gt=0, le=600)

    def named(self) -> Iterator[Named]:
        for field, url, _ in self.pictures():
            yield Named(field, url, "image")

    def pictures(self) -> Iterator[tuple[str, str, float]]:
        """Field, URL and weight of every reference."""
        if self.modify_image_ref is not None:
            yield "modify_image_ref.url", self.modify_image_ref.url, self.modify_image_ref.weight
        if self.character_ref is not None:
            for i, url in enumerate(self.character_ref.identity0.images):
                yield f"character_ref.identity0.images.{i}", url, 1.0
        for name in ("image_ref", "style_ref"):
            for i, one in enumerate(getattr(self, name)):
                yield f"{name}.{i}.url", one.url, one.weight


class ReframeBody(Body):
    """POST /generations/{image,video}/reframe."""

    generation_type: Literal["reframe_image", "reframe_video"]
    model: VideoModel | ImageModel
    media: Url
    aspect_ratio: Aspect
    prompt: str = ""
    grid_position_x: int | None = None
    grid_position_y: int | None = None
    x_start: int | None = None
    x_end: int | None = None
    y_start: int | None = None
    y_end: int | None = None
    resized_width: int | None = Field(None, gt=0)
    resized_height: int | None = Field(None, gt=0)
    format: Literal["jpg", "png"] = "jpg"
    first_frame: Url | None = None

    def named(self) -> Iterator[Named]:
        is_image = self.generation_type == "reframe_image"
        yield Named("media.url", self.media.url, "image" if is_image else "video")
        if self.first_frame is not None:
            yield Named("first_frame.url", self.first_frame.url, "image")


class ModifyBody(Body):
    """POST /generations/video/modify."""

    generation_type: Literal["modify_video"]
    model: Literal["ray-2", "ray-flash-2"]
    media: Url
    mode: Mode
    prompt: str = ""
    first_frame: Url | None = None

    def named(self) -> Iterator[Named]:
        yield Named("media.url", self.media.url, "video")
        if self.first_frame is not None:
            yield Named("first_frame.url", self.first_frame.url, "image")


class UpscaleBody(Body):
    """POST /generations/{id}/upscale."""

    generation_type: Literal["upscale_video"] = "upscale_video"
    resolution: str | None = None


Files = Mapping[str, File]


def video_spec(body: VideoBody, files: Files) -> JobSpec:
    """Text or keyframes to video; generations as keyframes are extended."""
    first = body.keyframes.frame0 if body.keyframes else None
    last = body.keyframes.frame1 if body.keyframes else None
    if body.keyframes is not None and first is None and last is None:
        raise InvalidRequest("No keyframes provided", field="keyframes")
    has_picture = isinstance(first, ImageFrame) or isinstance(last, ImageFrame)
    prompt = _prompt(body.prompt, needed=not has_picture)
    if body.loop:
        _check_loop(first, last)
    words = [prompt, *(_concept(c.key) for c in body.concepts)]
    keyframes = [
        Keyframe(media=files[frame.url].media, at=at)
        for frame, at in ((first, 0.0), (last, 1.0))
        if isinstance(frame, ImageFrame)
    ]
    return JobSpec(
        model=body.model,
        prompt=", ".join(word for word in words if word),
        keyframes=tuple(keyframes),
        extend_start=Media(job=first.id) if isinstance(first, GenerationFrame) else None,
        extend_end=Media(job=last.id) if isinstance(last, GenerationFrame) else None,
        loop=body.loop,
        aspect_ratio=body.aspect_ratio or "16:9",
        resolution=resolution(body.resolution),
        seconds=seconds(body.duration),
        webhook_url=body.callback_url,
    )


def image_spec(body: ImageBody, files: Files) -> JobSpec:
    """A picture; every kind of reference is shown to the model as one."""
    pictures = tuple(Reference(media=files[url].media, weight=weight) for _, url, weight in body.pictures())
    return JobSpec(
        operation="image", model=body.model, prompt=_prompt(body.prompt, needed=not pictures),
        references=pictures, aspect_ratio=body.aspect_ratio, resolution=IMAGE_RESOLUTION,
        format="jpeg" if body.format == "jpg" else "png", webhook_url=body.callback_url,
    )  # fmt: skip


def reframe_spec(body: ReframeBody, files: Files) -> JobSpec:
    """New picture around the source."""
    margins = _margins(body)
    is_image = body.generation_type == "reframe_image"
    first, source = body.first_frame, files[body.media.url]
    return JobSpec(
        operation="image" if is_image else "video", model=body.model, prompt=body.prompt,
        source=source.media, seconds=None if is_image else _clip_seconds(source),
        outpaint=margins, reframe="" if margins else "fit",
        keyframes=(Keyframe(media=files[first.url].media),) if first is not None else (),
        aspect_ratio=body.aspect_ratio, resolution=IMAGE_RESOLUTION if is_image else DEFAULT_RESOLUTION,
        format=("jpeg" if body.format == "jpg" else "png") if is_image else None,
        webhook_url=body.callback_url,
    )  # fmt: skip


def modify_spec(body: ModifyBody, files: Files) -> JobSpec:
    """The source's structure with another content; as long and as large, up to 1080p."""
    first, source = body.first_frame, files[body.media.url]
    size = like(source.size) if source.size is not None else (None, None)
    return JobSpec(
        model=body.model, prompt=body.prompt, control=source.media, control_kind="gray", seconds=_clip_seconds(source),
        width=size[0], height=size[1], resolution=None if source.size else DEFAULT_RESOLUTION,
        strength=MODES[body.mode], webhook_url=body.callback_url,
        keyframes=(Keyframe(media=files[first.url].media),) if first is not None else (),
    )  # fmt: skip


def upscale_spec(body: UpscaleBody, generation_id: str, out: tuple[int, int]) -> JobSpec:
    """A finished generation larger; `out` is the size of its file."""
    tier = resolution(body.resolution or "1080p")
    short = {"540p": 540, "720p": 720, "1080p": 1080, "4k": 2160}[str(tier)]
    factor = short / min(out)
    if factor <= 1:
        raise InvalidRequest(
            f"The generation has {out[0]}x{out[1]} pixels already; {tier} is not larger.", field="resolution"
        )
    width, height = (max(16, round(side * factor / 2) * 2) for side in out)
    return JobSpec(operation="upscale", source=Media(job=generation_id), width=width, height=height,
                   webhook_url=body.callback_url)  # fmt: skip


def resolution(text: str | None) -> Literal["540p", "720p", "1080p", "4k"]:
    """A resolution's name."""
    for known in RESOLUTIONS:
        if (text or DEFAULT_RESOLUTION) == known:
            return known  # type: ignore[return-value]
    raise InvalidRequest(
        f"resolution {text!r:.40} is not one of {', '.join(RESOLUTIONS)}", field="resolution"
    )


def seconds(text: str | None) -> float:
    """ "5s" to 5."""
    if text is None:
        return 5.0
    match = re.fullmatch(r"(\d{1,3})s", text)
    if match is None or not 1 <= int(match[1]) <= LONGEST_S:
        raise InvalidRequest(f"duration {text!r:.40} is not 1s to {LONGEST_S}s", field="duration")
    return float(match[1])


def _prompt(text: str | None, *, needed: bool) -> str:
    """The prompt, by Luma's rules and in its words."""
    if text is None or not text.strip():
        if needed:
            raise InvalidRequest("Prompt is required", field="prompt")
        return ""
    least, most = PROMPT
    if len(text) < least:
        raise InvalidRequest(f"Prompt is too short, minimum length is {least} characters", field="prompt")
    if len(text) > most:
        raise InvalidRequest(f"Prompt is too long, maximum length is {most} characters", field="prompt")
    return text


def _clip_seconds(source: File) -> float | None:
    """How long the result is: as the clip, if that is known."""
    if source.seconds is not None and source.seconds > LONGEST_S:
        raise InvalidRequest(
            f"media lasts {source.seconds:g} s, at most {LONGEST_S} s are taken", field="media"
        )
    return source.seconds


def _check_loop(first: Any, last: Any) -> None:
    """A loop needs a picture to come back to; what else Luma refuses is refused in its words."""
    if isinstance(first, GenerationFrame) and isinstance(last, GenerationFrame):
        raise InvalidRequest("Loop is not supported for between two videos", field="loop")
    if isinstance(first, GenerationFrame) and isinstance(last, ImageFrame):
        raise InvalidRequest("Loop is not supported for interpolate video to image", field="loop")
    if isinstance(first, ImageFrame) and isinstance(last, GenerationFrame):
        raise InvalidRequest("Loop is not supported for image to video", field="loop")
    if first is not None and last is not None:
        raise InvalidRequest("Loop is not supported for keyframes", field="loop")
    if isinstance(last, GenerationFrame):
        raise InvalidRequest("Loop is not supported for extend reverse", field="loop")
    if last is not None:
        raise InvalidRequest("Loop is not supported for end frame", field="loop")
    if not isinstance(first, ImageFrame):
        what = "extending a generation" if first is not None else "text alone"
        raise Unsupported(
            f"Loop is not supported for {what} here: it needs a picture as frame0", field="loop"
        )


def _concept(key: str) -> str:
    if key not in CONCEPTS:
        raise InvalidRequest(f"Unknown concept {key!r:.40}; known: {', '.join(CONCEPTS)}", field="concepts")
    return CONCEPTS[key]


def _margins(body: ReframeBody) -> Outpaint | None:
    """Crop bounds in pixels of the resized source, as margins; None: the source in the middle."""
    bounds = (body.x_start, body.x_end, body.y_start, body.y_end, body.resized_width, body.resized_height)
    if all(b is None for b in bounds):
        return None
    if any(b is None for b in bounds):
        raise InvalidRequest(
            "x_start, x_end, y_start, y_end, resized_width and resized_height go together", field="x_start"
        )
    x0, x1, y0, y1, width, height = (int(b) for b in bounds if b is not None)
    sides = {"left": -x0 / width, "right": x1 / width - 1, "top": -y0 / height, "bottom": y1 / height - 1}
    if any(side < 0 for side in sides.values()):
        raise Unsupported("The bounds cut into the source; crop it before reframing", field="x_start")
    if not any(sides.values()):
        raise InvalidRequest("The bounds are those of the source: nothing would be new", field="x_start")
    return Outpaint(**{name: min(side, 4.0) for name, side in sides.items()})


def body_of(kind: type[T], value: Any) -> T:
    """A JSON object as a type; no body at all is an empty one.

    Raises:
        InvalidRequest: names the first wrong field.
    """
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        field, said = first_mistake(e)
        raise InvalidRequest(f"{field}: {said}.", field=field) from e
