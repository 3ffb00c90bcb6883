"""Work on finished clips and pictures that needs no model: enlarge, change the frame rate, expand to HDR.

`plan_operation` looks at the source and says what will come out; `frames_of` gives its frames one by one. A
`Delivery` writes them at the size asked for. Nothing here invents detail: enlarging is Lanczos resampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutoscope.errors import RequestError
from mutoscope.media.rate import change_rate, frames_after
from mutoscope.media.read import MAX_PIXELS, iter_frames, probe, read_image
from mutoscope.request import FramesHWC

MAX_SIDE = 8192
MAX_STILL_FPS = 1.0


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What an operation makes: size in pixels, fps in frames per second (that of a still means nothing)."""

    operation: str
    source: Path
    is_still: bool
    source_width: int
    source_height: int
    source_fps: float
    width: int
    height: int
    frames: int
    fps: float


def plan_operation(
    operation: str,
    source: Path,
    *,
    scale: int | None = None,
    size: tuple[int, int] | None = None,
    short_side: int | None = None,
    fps: float | None = None,
) -> Planned:
    """What `operation` ("upscale", "reframe_rate", "hdr") makes of `source`.

    scale       upscale: factor of both sides; twice unless anything is said
    size        upscale: pixels to fill
    short_side  upscale: pixels of the shorter side; the shape stays
    fps         reframe_rate: the new rate

    Raises:
        RequestError: what cannot come out. MediaError: a source that cannot be read.
    """
    info = probe(source)
    width, height = info.width, info.height
    source_fps = info.fps or MAX_STILL_FPS
    frames, rate = info.frames, source_fps
    if operation == "upscale":
        factor = scale or (short_side / min(width, height) if short_side else 2)
        width, height = (_even(width * factor), _even(height * factor)) if scale or not size else size
        if width < info.width and height < info.height:
            raise RequestError(
                f"{width}x{height} is smaller than the source ({info.width}x{info.height}).",
                hint="Ask for a larger size.",
            )
    if operation == "reframe_rate":
        if fps is None:
            raise RequestError("The new frame rate is missing.", hint="Give fps.")
        if info.kind == "image":
            raise RequestError("The source is a picture, a clip expected.")
        frames, rate = frames_after(info.frames, source_fps, fps), fps
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RequestError(
            f"{width}x{height} is too large: at most {MAX_SIDE} pixels a side.", hint="Ask for less."
        )
    return Planned(
        operation=operation,
        source=source,
        is_still=info.kind == "image",
        source_width=info.width,
        source_height=info.height,
        source_fps=source_fps,
        width=width,
        height=height,
        frames=frames,
        fps=rate,
    )


def _even(value: float) -> int:
    return max(2, round(value / 2) * 2)


def frames_of(planned: Planned) -> Iterator[FramesHWC]:
    """The frames, [H, W, 3], in the size of the source."""
    if planned.is_still:
        yield read_image(planned.source)
        return
    frames = iter_frames(planned.source)
    if planned.operation == "reframe_rate":
        frames = change_rate(frames, planned.source_fps, planned.fps)
    yield from frames
