"""What can be asked for: one request model that every dialect maps onto, and the body of `POST /api/v1/jobs`.

Unknown fields are refused. Files are named by `Media`: an asset of the account, a URL that the job fetches, or the
output of another job; a dialect turns data URIs into assets before it builds a spec.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mutoscope.planning import MAX_LORA_STRENGTH

Operation = Literal["video", "image", "upscale", "reframe_rate", "hdr"]
"""video, image: the generator. upscale, reframe_rate, hdr: work on a finished clip or picture (`source`)."""

MAX_PROMPT = 20_000
Tier = Literal["draft", "360p", "540p", "720p", "1080p", "4k"]
OutputFormat = Literal[
    "mp4", "webm", "gif", "png", "jpeg", "webp", "png_sequence", "prores", "hdr10", "hlg", "exr_sequence"
]
Fraction = Field(ge=0, le=1)


def first_mistake(error: ValidationError) -> tuple[str, str]:
    """The path of the first wrong field, and what is said about it."""
    first = error.errors(include_url=False)[0]
    said = "is not a field here" if first["type"] == "extra_forbidden" else first["msg"]
    return ".".join(str(part) for part in first["loc"]), said


class Strict(BaseModel):
    """Nothing unknown is ignored, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Media(Strict):
    """A picture or clip: exactly one of the three."""

    asset: str | None = Field(None, description="Id of an uploaded file.")
    url: str | None = Field(None, max_length=2048, description="https URL, fetched when the job runs.")
    job: str | None = Field(None, description="Id of a finished job of this account: its video or image.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(v is not None for v in (self.asset, self.url, self.job)) != 1:
            raise ValueError("give exactly one of asset, url and job")
        return self


class Lora(Strict):
    """A LoRA by its name; `GET /api/v1/loras` lists them."""

    name: str = Field(min_length=1, max_length=200)
    strength: float | None = Field(
        None,
        ge=-MAX_LORA_STRENGTH,
        le=MAX_LORA_STRENGTH,
        description="None: its usual one. 0: without it.",
    )


class Keyframe(Strict):
    """A picture that the video shows at a moment."""

    media: Media
    at: float = Field(0.0, ge=0, le=1, description="Moment: 0 is the first frame, 1 the last.")


class Reference(Strict):
    """A picture of an object, person or style to show."""

    media: Media
    tag: str = ""
    weight: float = Field(1.0, ge=0, le=2)


class Box(Strict):
    """Part of the frame, in fractions of its width and height."""

    x0: float = Fraction
    y0: float = Fraction
    x1: float = Fraction
    y1: float = Fraction


class TrackPoint(Box):
    """A box at a moment, 0..1."""

    at: float = Fraction


class Outpaint(Strict):
    """New picture around the source, in fractions of its own size."""

    left: float = Field(0.0, ge=0, le=4)
    right: float = Field(0.0, ge=0, le=4)
    top: float = Field(0.0, ge=0, le=4)
    bottom: float = Field(0.0, ge=0, le=4)


class JobSpec(Strict):
    """One job. Everything but `operation` has a default; None means: the model's own."""

    operation: Operation = "video"
    model: str = Field("auto", description='A model, an alias, or "auto": the router chooses.')
    prompt: str = Field("", max_length=MAX_PROMPT)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)

    keyframes: tuple[Keyframe, ...] = Field((), max_length=64)
    references: tuple[Reference, ...] = Field((), max_length=16)
    source: Media | None = Field(None, description="Clip or picture that is edited, reframed or enlarged.")
    control: Media | None = Field(None, description="Clip whose motion and structure are followed.")
    control_kind: Literal["as-is", "gray"] = "as-is"
    mask: Media | None = Field(None, description="White is repainted in `source`.")
    boxes: tuple[Box, ...] = Field((), max_length=16, description="Parts of `source` to repaint.")
    outpaint: Outpaint | None = None
    reframe: Literal["", "fit"] = Field("", description='"fit": outpaint `source` to the aspect ratio asked.')
    extend_start: Media | None = Field(None, description="The video goes on from the end of this clip.")
    extend_end: Media | None = Field(None, description="The video leads up to the start of this clip.")
    tracks: tuple[tuple[TrackPoint, ...], ...] = Field((), max_length=8)
    strength: float = Field(1.0, ge=0, le=2, description="How closely conditioning is followed.")
    loop: bool = Field(False, description="The last frame is the first. Needs a first keyframe.")

    width: int | None = Field(None, ge=16, le=8192, description="Of the delivered file, pixels.")
    height: int | None = Field(None, ge=16, le=8192)
    aspect_ratio: str | None = Field(None, pattern=r"^\d{1,2}:\d{1,2}$")
    resolution: Tier | None = None
    seconds: float | None = Field(None, gt=0, le=300)
    frames: int | None = Field(None, ge=1, le=4001)
    fps: float | None = Field(None, ge=1, le=120)
    scale: int | None = Field(None, ge=2, le=16, description="upscale: factor.")

    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0, le=100)
    shift: float | None = Field(None, gt=0, le=100)
    sampler: str | None = Field(
        None, description="unipc, dpm++, euler; distill4 for step-distilled models and LoRAs."
    )
    loras: tuple[Lora, ...] = Field((), max_length=16, description="Changes of the model, by name.")
    guidance_interval: tuple[Annotated[float, Fraction], ...] = Field(
        (0.0, 1.0),
        min_length=2,
        max_length=2,
        description="Fractions of the steps that are guided; the others take half the time.",
    )
    guidance_kept: float | None = Field(
        None, ge=0, le=100, description="The guidance of what is given and kept; the model's unless said."
    )
    guidance_kind: str = Field(
        "cfg",
        max_length=40,
        description='"cfg", or CFG-Zero*: "zero-star", "zero-star=N" leaves out N steps.',
    )
    cache: str = Field(
        "none",
        max_length=40,
        description='Steps that are not computed: "none", "easy", "tea", "mag", or "easy=0.05".',
    )
    quality: Literal["draft", "standard"] = "standard"
    hdr: bool = False
    format: OutputFormat | None = Field(None, description="mp4 for videos and png for pictures unless said.")

    priority: Literal["low", "normal", "high"] = "normal"
    optimize_for: Literal["quality", "cost", "latency"] = "quality"
    max_credits: int | None = Field(None, ge=0, description="Refuse rather than cost more.")
    fallback: bool = Field(
        True, description="Another model may take over if the chosen one fails or is full."
    )
    time_limit_s: float | None = Field(None, gt=0, description="Fail when the run takes longer.")
    webhook_url: str | None = Field(None, max_length=2048)
    metadata: dict[str, Any] = Field(default_factory=dict, description="Given back as it is, 16 kB at most.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        if self.width is not None and (self.aspect_ratio or self.resolution):
            raise ValueError("give width and height, or aspect_ratio and resolution, not both")
        if self.frames is not None and self.seconds is not None:
            raise ValueError("give frames or seconds, not both")
        if self.operation in ("upscale", "reframe_rate", "hdr") and self.source is None:
            raise ValueError(f"{self.operation} needs a source")
        generates = self.operation in ("video", "image")
        has_start = any(k.at == 0 for k in self.keyframes) or self.extend_start or self.source or self.control
        if generates and not self.prompt.strip() and not has_start and not self.references:
            raise ValueError("prompt is empty and there is no picture or clip to start from")
        return self

    @property
    def interval(self) -> tuple[float, float]:
        """`guidance_interval`, which has two numbers."""
        return self.guidance_interval[0], self.guidance_interval[1]

    def media(self) -> tuple[Media, ...]:
        """All files that the job needs, in a fixed order."""
        named = (self.source, self.control, self.mask, self.extend_start, self.extend_end)
        several = (*(k.media for k in self.keyframes), *(r.media for r in self.references))
        return (*several, *(m for m in named if m is not None))

    def dump(self) -> dict[str, Any]:
        """As stored: JSON, without what is default."""
        return self.model_dump(mode="json", exclude_defaults=True)
