"""What OpenAI's Videos API takes: bodies as types, and pure functions from them to a spec.

Facts: types and resources of the official Python SDK (3.54), and the error texts that OpenAI's APIs share. Bodies
come as JSON or as multipart forms, where nested fields are written `input_reference[image_url]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from starlette.datastructures import FormData, UploadFile

from mutoscope.jobs import plainjson
from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.inline import Inline
from mutoscope.jobs.model import Job
from mutoscope.jobs.spec import MAX_PROMPT, JobSpec, Keyframe, Lora, Media

DEFAULT_MODEL = "sora-2"
Size = Literal["720x1280", "1280x720", "1024x1792", "1792x1024"]
Seconds = Literal["4", "8", "12"]
NewSeconds = Literal["4", "8", "12", "16", "20"]
LONGEST_S = 300.0
LOW_FPS = 16.0
"""A clip of fewer frames a second keeps its own rate when it is edited: none are invented in between."""

B = TypeVar("B", bound="Body")


class Refused(InvalidRequest):
    """A field that cannot be taken, with OpenAI's code for why."""

    def __init__(self, message: str, *, field: str = "", code: str = "invalid_value", hint: str = "") -> None:
        super().__init__(message, field=field, hint=hint)
        self.code = code


class Body(BaseModel):
    """Nothing unknown is ignored. The last ones are ours: four named as other servers of this API name them, four as
    our own API does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    loras: tuple[Lora, ...] = Field((), max_length=16)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_kind: str = Field("cfg", max_length=40)
    cache: str = Field("none", max_length=40)

    @field_validator("loras", "guidance_interval", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        """In a form they are texts of JSON."""
        try:
            return plainjson.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value  # what it should have been is said as for JSON

    def ours(self) -> dict[str, Any]:
        """The part of a spec that all bodies share."""
        return {
            "prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed,
            "steps": self.num_inference_steps, "guidance": self.guidance_scale, "loras": self.loras,
            "guidance_interval": self.guidance_interval, "guidance_kind": self.guidance_kind, "cache": self.cache,
        }  # fmt: skip


class PictureReference(BaseModel):
    """Exactly one of the two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_id: str | None = None
    image_url: str | None = None


class VideoReference(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str


class CreateBody(Body):
    """POST /videos. A file as input_reference is taken out before."""

    model: str = DEFAULT_MODEL
    seconds: Seconds = "4"
    size: Size = "720x1280"
    input_reference: PictureReference | None = None


class RemixBody(Body):
    """POST /videos/{video_id}/remix."""


class EditBody(Body):
    """POST /videos/edits. None: a file was sent."""

    video: VideoReference | None = None


class ExtendBody(Body):
    """POST /videos/extensions. None: a file was sent."""

    video: VideoReference | None = None
    seconds: NewSeconds


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished video that is worked on. `seconds` as told to the client for a job, as measured for a file."""

    media: Media
    seconds: float
    fps: float
    size: Size
    model: str = DEFAULT_MODEL

    @classmethod
    def of_job(cls, job: Job) -> Clip:
        return cls(media=Media(job=job.id), seconds=float(job.vendor["seconds"]), fps=job.resolved.fps,
                   size=job.vendor["size"], model=job.model_asked)  # fmt: skip

    @classmethod
    def of_file(cls, file: Inline, media: Media) -> Clip:
        """A sent file; the result has OpenAI's 720p size of its orientation."""
        probed = file.probed
        if not 0 < probed.duration_s <= LONGEST_S:
            raise Refused(
                f"Invalid file 'video': it lasts {probed.duration_s:g} seconds. Expected at most {LONGEST_S:g}.",
                field="video",
            )
        size: Size = "1280x720" if probed.width >= probed.height else "720x1280"
        return cls(media=media, seconds=probed.duration_s, fps=probed.fps or LOW_FPS, size=size)


# -- bodies --------------------------------------------------------------------------------------------------


def unpack(value: Any, *, files: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fields and files of a JSON object or a form; only the named fields may be files.

    Raises:
        Refused: not an object, a field twice, or a file where none is expected.
    """
    if value is None:
        value = {}
    if isinstance(value, dict):
        return value, {}
    if not isinstance(value, FormData):
        raise Refused("The body must be a JSON object or a multipart form.", code="invalid_type")
    fields: dict[str, Any] = {}
    found: dict[str, bytes] = {}
    for key, part in value.multi_items():
        name, inner = _key(key)
        if name in found or (name in fields and (inner is None or inner in fields[name])):
            raise Refused(f"Duplicate parameter: '{key}'.", field=name, code="duplicate_parameter")
        if isinstance(part, UploadFile):
            if key not in files:
                raise Refused(f"Invalid type for '{key}': a file cannot be given here.", field=key,
                              code="invalid_type")  # fmt: skip
            found[name] = part.file.read()
        elif inner is None:
            fields[name] = part
        else:
            fields.setdefault(name, {})[inner] = part
    return fields, found


def _key(key: str) -> tuple[str, str | None]:
    """ "a[b]" to a and b."""
    match = re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", key)
    return (match[1], match[2]) if match else (key, None)


def body_of(kind: type[B], fields: Mapping[str, Any]) -> B:
    """Fields as a type.

    Raises:
        Refused: the first wrong field, in OpenAI's words.
    """
    try:
        body = kind.model_validate(fields)
    except ValidationError as e:
        raise refused(e.errors(include_url=False)[0]) from e
    if not body.prompt.strip():
        raise _empty("prompt")
    return body


def refused(error: ErrorDetails) -> Refused:
    """What pydantic found, in OpenAI's words."""
    name = ".".join(str(part) for part in error["loc"])
    kind, got, why = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return missing(name)
    if kind == "extra_forbidden":
        return Refused(f"Unknown parameter: '{name}'.", field=name, code="unknown_parameter")
    if kind == "literal_error" and isinstance(got, str):
        known = str(why["expected"]).replace(" or ", ", ").replace(", ,", ",")
        return Refused(f"Invalid value: '{got:.100}'. Supported values are: {known}.", field=name)
    if kind == "string_too_short":
        return _empty(name)
    if kind == "string_too_long":
        return Refused(
            f"Invalid '{name}': string too long. Expected a string with maximum length {why['max_length']}, but got "
            f"a string with length {len(str(got))} instead.",
            field=name, code="string_above_max_length",
        )  # fmt: skip
    if kind.endswith("_type") or kind == "literal_error":
        return Refused(f"Invalid type for '{name}': {_expected(error)}, but got {_kind(got)} instead.", field=name,
                       code="invalid_type")  # fmt: skip
    return Refused(f"Invalid value for '{name}': {error['msg']}.", field=name)


def missing(name: str) -> Refused:
    """A parameter that has to be there."""
    return Refused(f"Missing required parameter: '{name}'.", field=name, code="missing_required_parameter")


def _empty(name: str) -> Refused:
    return Refused(
        f"Invalid '{name}': empty string. Expected a string with minimum length 1, but got an empty string instead.",
        field=name, code="empty_string",
    )  # fmt: skip


_KINDS: Mapping[type, str] = {
    bool: "a boolean", int: "an integer", float: "a decimal number", str: "a string", list: "an array",
    dict: "an object", type(None): "null",
}  # fmt: skip


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "something else")


def _expected(error: ErrorDetails) -> str:
    kind = error["type"]
    if kind == "literal_error":
        return f"expected one of {error.get('ctx', {}).get('expected', '')}"
    names = {"string_type": "a string", "int_type": "an integer", "float_type": "a number"}
    return f"expected {names.get(kind, 'an object')}"


# -- specs ---------------------------------------------------------------------------------------------------


def create_spec(body: CreateBody, reference: Media | None, *, is_clip: bool = False) -> JobSpec:
    """Text to video; a picture is the first frame, of a clip the structure (its luminance) is followed."""
    width, height = pixels(body.size)
    common = {
        **body.ours(),
        "model": body.model,
        "width": width,
        "height": height,
        "seconds": float(body.seconds),
    }
    if reference is None:
        return JobSpec(**common)
    if is_clip:
        return JobSpec(**common, control=reference, control_kind="gray")
    return JobSpec(**common, keyframes=(Keyframe(media=reference),))


def edit_spec(body: RemixBody | EditBody, clip: Clip) -> JobSpec:
    """The clip's structure (its luminance) with what the prompt says; as long and as large."""
    width, height = pixels(clip.size)
    return JobSpec(
        **body.ours(), model=clip.model, control=clip.media, control_kind="gray", width=width, height=height,
        seconds=clip.seconds, fps=clip.fps if 1 <= clip.fps <= LOW_FPS else None,
    )  # fmt: skip


def extend_spec(body: ExtendBody, clip: Clip) -> JobSpec:
    """The clip, and what comes after it.

    Raises:
        Unsupported: the clip is longer than what is to come. A model is given at most half of a video.
    """
    new = float(body.seconds)
    if clip.seconds > new:
        raise Unsupported(
            f"An extension here is at least as long as the video: it lasts {clip.seconds:g} seconds, "
            f"{body.seconds} more were asked for.",
            field="seconds",
        )
    width, height = pixels(clip.size)
    return JobSpec(**body.ours(), model=clip.model, extend_start=clip.media, width=width, height=height,
                   seconds=clip.seconds + new)  # fmt: skip


def pixels(size: Size) -> tuple[int, int]:
    """ "720x1280" to 720 and 1280."""
    width, height = size.split("x")
    return int(width), int(height)


SIZES: tuple[str, ...] = get_args(Size)
