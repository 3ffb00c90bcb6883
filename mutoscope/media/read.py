"""What a file holds, and its pictures and frames as uint8 RGB arrays.

Files are judged by their content, never by their name. Pictures and animations (GIF, APNG, animated WebP) are
read by Pillow, everything else by FFmpeg (PyAV) with an allow-list of containers: playlists and image
patterns, which could name other files or addresses, are refused.

Details that have caused bugs elsewhere:
- phones store portrait clips lying down plus a rotation, and pictures likewise (EXIF): both are applied;
- clips without colour tags are BT.601 when small and BT.709 from 720 lines up; decoders assume BT.601;
- FFmpeg's default conversion darkens, see EXACT_COLOURS;
- variable frame rates are brought to a constant one by time (frames repeat or drop), so duration is kept.
"""

from __future__ import annotations

import io
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mutoscope.errors import MediaError
from mutoscope.media.frames import check_frames, cover_resize, sample_indices
from mutoscope.request import Clip as ClipSource
from mutoscope.request import FramesHWC, Picture

MAX_PIXELS = 64_000_000
"""Larger pictures and frames are refused before they are decoded (8192 x 7812; 192 MB as RGB)."""
MAX_CLIP_FRAMES = 100_000
"""More frames than that (an hour at 25 per second is 90,000) are taken for a broken or hostile file."""
MAX_FPS = 240.0

EXACT_COLOURS = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
"""Without these flags every YUV to RGB conversion darkens by 1 to 2 of 255 (measured over random colours:
-1.0, -1.4, -0.8; with them below 0.1), which shows when clips are extended again and again."""

_PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,ivf,yuv4mpegpipe,h264,hevc,obu,av1,m4v"
_RATE_SCAN_PACKETS = 300
_SLOT_BIAS = 0.55
"""A frame belongs to the slot floor(time * fps + bias); a bit over one half, so that the millisecond rounding
of WebM does not flip between two slots when 60 fps are thinned to 30."""

Kind = Literal["image", "video", "animation"]
_Shot = Callable[[], FramesHWC]  # gives the picture; dropped and merely counted frames are never converted
_Timed = tuple[float, float, _Shot]  # with its start and length in seconds


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What a file holds. Width and height are as shown (rotation applied); fps is None for a still."""

    kind: Kind
    width: int
    height: int
    frames: int
    fps: float | None
    duration_s: float
    codec: str
    size_bytes: int
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames at a constant rate; fps is None where the source has no rate (one picture, an array)."""

    frames: FramesHWC
    fps: float | None


def probe(path: str | Path) -> MediaInfo:
    """Describe a file without decoding it all: at most one frame, or the pictures of an animation."""
    path = _existing_file(path)
    with _open_picture(path) as image:
        if image is not None:
            with _damaged_picture(path):
                return _probe_picture(path, image)
    frame_rate = _frame_rate(path)
    with _open_video(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(f"{path}: holds no frame that can be decoded.")
        n = stream.frames or _count_packets(path)
        width, height = _display_size(stream, first.rotation)
        return MediaInfo(
            kind="video",
            width=width,
            height=height,
            frames=n,
            fps=frame_rate,
            duration_s=_promised_end(stream) or n / frame_rate,
            codec=stream.codec_context.name,
            size_bytes=path.stat().st_size,
            metadata={k.lower(): v for k, v in container.metadata.items()},
        )


def read_image(source: Picture) -> FramesHWC:
    """One picture as uint8 [H, W, 3]: upright, transparency on white, 16 bits and palettes made 8-bit sRGB.

    Of an animation the first frame is taken; a video is refused.
    """
    if not isinstance(source, (str, Path)):
        return check_frames(source, ndim=(3,), what="picture")
    path = _existing_file(source)
    with _open_picture(path) as image:
        if image is not None:
            return _to_rgb(path, image)
    with _open_video(path):
        raise MediaError(f"{path}: is a video, a picture expected.", hint="Extract the frame you mean first.")


def read_clip(
    source: ClipSource,
    *,
    max_frames: int,
    pick: Literal["first", "last", "spread"] = "first",
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> Clip:
    """At most `max_frames` frames of a clip as uint8 [F, H, W, 3]; never more than those are held in memory.

    pick   "first" or "last" frames, or "spread" evenly over the whole clip (first and last included)
    fps    bring the clip to this rate first (frames repeat or drop); None keeps the clip's own
    size   (width, height) that each frame is scaled and cropped to as it comes

    A still picture is a clip of one frame.
    """
    if max_frames < 1:
        raise MediaError(f"max_frames={max_frames}: at least 1 expected.")
    if not isinstance(source, (str, Path)):
        frames = check_frames(source, ndim=(4,), what="clip")
        n = len(frames)
        chosen = {
            "first": range(min(n, max_frames)),
            "last": range(max(0, n - max_frames), n),
            "spread": sample_indices(n, min(n, max_frames)),
        }[pick]
        frames = frames[np.fromiter(chosen, int)]
        return Clip(frames=cover_resize(frames, *size) if size else frames, fps=None)

    path = _existing_file(source)
    rate = fps if fps is not None else probe(path).fps

    def fitted(shot: _Shot) -> FramesHWC:
        return cover_resize(shot(), *size) if size else shot()

    if pick == "first":
        kept = [fitted(shot) for shot in islice(_shots(path, fps), max_frames)]
    elif pick == "last":
        kept = [*deque((fitted(shot) for shot in _shots(path, fps)), maxlen=max_frames)]
    else:
        n = sum(1 for _ in _shots(path, fps))  # decoded twice: no header can be trusted with the count
        wanted = set(sample_indices(n, min(n, max_frames)))
        kept = [fitted(shot) for i, shot in enumerate(_shots(path, fps)) if i in wanted]
    if len({frame.shape for frame in kept}) > 1:
        raise MediaError(f"{path}: the frame size changes within the clip.", hint="Re-encode it at one size.")
    return Clip(frames=np.stack(kept), fps=rate)


def iter_frames(path: str | Path, *, fps: float | None = None) -> Iterator[FramesHWC]:
    """The frames of a clip one by one at a constant rate: its own (`probe(path).fps`) or `fps`."""
    return (shot() for shot in _shots(_existing_file(path), fps))


def _shots(path: Path, fps: float | None) -> Iterator[_Shot]:
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise MediaError(f"fps={fps}: more than 0 and at most {MAX_FPS:g} expected.")
    with _open_picture(path) as image:
        if image is not None:
            if _is_animated(image):
                rate = fps or _animation_rate(_animation_timing(path, image))
                yield from _constant_rate(path, _animation_frames(path, image), rate)
            else:
                yield partial(_to_rgb, path, image)
            return
    rate = fps or _frame_rate(path)
    with _open_video(path) as (container, stream):
        yield from _constant_rate(path, _video_frames(path, container, stream), rate)


# -- pictures and animations (Pillow) ------------------------------------------------------------------------


@contextmanager
def _open_picture(path: Path) -> Iterator[Image.Image | None]:
    """The file as a picture, or None if it is none."""
    try:
        image = Image.open(path, formats=[f for f in _PICTURES if f in _known_formats()])
    except UnidentifiedImageError:
        yield None
        return
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise MediaError(f"{path}: has more than {MAX_PIXELS / 1e6:g} million pixels.", hint=_SHRINK) from e
    except (OSError, SyntaxError, ValueError) as e:
        raise MediaError(f"{path}: cannot be read as a picture ({e}).", hint=_DAMAGED) from e
    with image:
        _check_pixels(path, *image.size)
        yield image


_SHRINK = "Scale it down first."
_CUT_OUT = "Cut out the part you need."
_DAMAGED = "The file is damaged or cut short; fetch it again or re-export it."


def _known_formats() -> set[str]:
    Image.init()
    return set(Image.OPEN)


def _probe_picture(path: Path, image: Image.Image) -> MediaInfo:
    codec = (image.format or "").lower()
    metadata = _picture_metadata(image)
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    width, height = image.size[::-1] if turned else image.size
    frames, fps, duration_s = 1, None, 0.0
    if _is_animated(image):
        timing = _animation_timing(path, image)
        frames, fps, duration_s = len(timing), _animation_rate(timing), sum(timing)
    return MediaInfo(
        kind="animation" if frames > 1 else "image",
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        duration_s=duration_s,
        codec=codec,
        size_bytes=path.stat().st_size,
        metadata=metadata,
    )


def _picture_metadata(image: Image.Image) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in image.info.items():
        if isinstance(value, bytes) and key == "comment":
            found[key] = value.decode("utf-8", "replace")
        elif isinstance(value, str):
            found[str(key).lower()] = value
    description = image.getexif().get(0x010E)
    if isinstance(description, str) and description:
        found.setdefault("comment", description)
    return found


def _is_animated(image: Image.Image) -> bool:
    return image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1


def _animation_timing(path: Path, image: Image.Image) -> list[float]:
    """How long each frame is shown, in seconds."""
    n: int = getattr(image, "n_frames", 1)
    if n > MAX_CLIP_FRAMES:
        raise MediaError(f"{path}: has {n} frames, at most {MAX_CLIP_FRAMES} expected.")
    seconds = []
    with _damaged_picture(path):
        for i in range(n):
            image.seek(i)
            if image.format not in ("GIF", "PNG"):
                image.load()  # only then does Pillow know the time
            # 0 or 1 hundredth means "as fast as possible"; browsers show such frames for a tenth of a second
            milliseconds = float(image.info.get("duration") or 0)
            seconds.append(milliseconds / 1000 if milliseconds > 10 else 0.1)
        image.seek(0)
    return seconds


def _animation_rate(seconds: list[float]) -> float:
    """GIF times are hundredths, so 16 fps is written 6, 6, 6, 7: near-equal times mean their average.

    A frame held much longer than the others must not slow the rest down: very unequal times mean the median.
    """
    median = statistics.median(seconds)
    steady = [s for s in seconds if abs(s - median) <= 0.011]
    rate = 1 / (statistics.fmean(steady) if len(steady) >= 0.9 * len(seconds) else median)
    whole = max(1.0, float(round(rate)))
    return min(MAX_FPS, whole if abs(rate - whole) < 0.02 * rate else rate)


def _animation_frames(path: Path, image: Image.Image) -> Iterator[_Timed]:
    t = 0.0
    for i, seconds in enumerate(_animation_timing(path, image)):
        with _damaged_picture(path):
            image.seek(i)
            frame = _to_rgb(path, image)
        yield t, seconds, partial(np.asarray, frame)  # made now: the next seek overwrites the picture
        t += seconds


def _to_rgb(path: Path, image: Image.Image) -> FramesHWC:
    with _damaged_picture(path):
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            raise MediaError(f"{path}: holds floating-point pixels, 8 or 16 bits per channel expected.")
        if upright.mode.startswith("I"):  # 16-bit gray, in one of several spellings
            gray16 = np.asarray(upright)
            if gray16.min() < 0 or gray16.max() > 65535:
                raise MediaError(f"{path}: holds 32-bit pixels, 8 or 16 bits per channel expected.")
            upright = Image.fromarray(((gray16.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
            upright = _on_white(upright.convert("RGBA"), icc=upright.info.get("icc_profile"))
        if upright.mode in ("RGB", "CMYK"):
            upright = _to_srgb(upright)
        return np.asarray(upright.convert("RGB"))


def _on_white(rgba: Image.Image, *, icc: bytes | None) -> Image.Image:
    flat = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    flat.alpha_composite(rgba)
    rgb = flat.convert("RGB")
    if icc:
        rgb.info["icc_profile"] = icc
    return rgb


def _to_srgb(image: Image.Image) -> Image.Image:
    """Honour an embedded colour profile (phones write Display P3); one that cannot be used is left out."""
    icc = image.info.get("icc_profile")
    if not icc:
        return image
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image


@contextmanager
def _damaged_picture(path: Path) -> Iterator[None]:
    """Pillow reports broken data in many ways; all of them mean this."""
    try:
        yield
    except MediaError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as e:
        raise MediaError(f"{path}: cannot be decoded ({e}).", hint=_DAMAGED) from e


# -- video (FFmpeg) ------------------------------------------------------------------------------------------


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    options = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
    try:
        # "file:" so that a name like "concat:a|b" or "http:x" is a name and not a command
        container = av.open(f"file:{path.resolve()}", options=options)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise MediaError(
            f"{path}: is neither a picture nor a video, or it is damaged ({_reason(e)}).",
            hint="Expected: PNG, JPEG, WebP, GIF, MP4, MOV, WebM, MKV, AVI.",
        ) from e
    with container:
        if not container.streams.video:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise MediaError(f"{path}: has no video stream (found: {kinds}).")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        _check_pixels(path, stream.width, stream.height)
        try:
            yield container, stream
        except av.FFmpegError as e:
            raise MediaError(f"{path}: cannot be decoded ({_reason(e)}).", hint=_DAMAGED) from e


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _frame_rate(path: Path) -> float:
    """The declared average rate if the first packets keep to it; else one over their median distance."""
    times: list[float] = []
    with _open_video(path) as (container, stream):
        for packet in islice(container.demux(stream), _RATE_SCAN_PACKETS):
            if packet.pts is not None:
                times.append(float(packet.pts * packet.time_base))
        declared = float(stream.average_rate or stream.guessed_rate or 0)
    times.sort()
    gaps = [b - a for a, b in pairwise(times) if b > a]
    if not gaps:
        return min(declared, MAX_FPS) if declared > 0 else 25.0
    measured = min(MAX_FPS, 1 / statistics.median(gaps))
    return declared if declared > 0 and abs(measured - declared) <= 0.05 * declared else measured


def _count_packets(path: Path) -> int:
    with _open_video(path) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def _promised_end(stream: Any) -> float | None:
    """How long the video stream says it is, in seconds: MP4 in the header, Matroska in a tag."""
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def _video_frames(path: Path, container: Any, stream: Any) -> Iterator[_Timed]:
    start: float | None = None
    end = 0.0
    aspect = stream.sample_aspect_ratio
    default_length = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    for n, frame in enumerate(container.decode(stream)):
        if n >= MAX_CLIP_FRAMES:
            raise MediaError(f"{path}: has more than {MAX_CLIP_FRAMES} frames.", hint=_CUT_OUT)
        _check_pixels(path, frame.width, frame.height)  # a stream may change its size on the way
        t = end if frame.time is None else frame.time
        length = float(frame.duration * frame.time_base) if frame.duration else default_length
        start = t if start is None else start
        end = max(end, t + length)
        yield t, length, partial(_frame_to_rgb, frame, aspect)
    if start is None:
        raise MediaError(f"{path}: holds no frame that can be decoded.")
    promised = _promised_end(stream)
    if promised is not None and end - start < 0.8 * promised:
        raise MediaError(
            f"{path}: is cut short: {end - start:.2f} s of {promised:.2f} s can be read.", hint=_DAMAGED
        )


def _frame_to_rgb(frame: Any, aspect: Any) -> FramesHWC:
    space = frame.colorspace
    if space not in {c.value for c in Colorspace} and not frame.format.is_rgb:
        space = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    source = None if frame.format.is_rgb else int(space)
    alpha = any(c.is_alpha for c in frame.format.components)
    pixels = frame.reformat(
        width=_square_pixel_width(frame.width, aspect),
        format="rgba" if alpha else "rgb24",
        src_colorspace=source,
        interpolation=EXACT_COLOURS,
    ).to_ndarray()
    if alpha:
        pixels = np.asarray(_on_white(Image.fromarray(pixels), icc=None))
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns))


def _square_pixel_width(width: int, aspect: Any) -> int:
    return round(width * float(aspect)) if aspect and 0.1 < float(aspect) < 10 else width


def _display_size(stream: Any, rotation: int) -> tuple[int, int]:
    size = (_square_pixel_width(stream.width, stream.sample_aspect_ratio), stream.height)
    return size[::-1] if round(rotation / 90) % 2 else size


def _constant_rate(path: Path, timed: Iterator[_Timed], fps: float) -> Iterator[_Shot]:
    """Each slot of 1/fps seconds shows the frame whose turn it is: frames of a steady clip pass unchanged."""
    slot, start = 0, 0.0
    held: _Timed | None = None
    for t, length, shot in timed:
        if held is None:
            start = t
        else:
            until = math.floor((t - start) * fps + _SLOT_BIAS)
            while slot < until:
                yield held[2]
                slot = _next_slot(path, slot)
        held = (t, length, shot)
    if held is None:
        raise MediaError(f"{path}: holds no frame that can be decoded.")
    until = max(1, math.floor((held[0] + held[1] - start) * fps + _SLOT_BIAS))
    while slot < until:
        yield held[2]
        slot = _next_slot(path, slot)


def _next_slot(path: Path, slot: int) -> int:
    if slot + 1 >= MAX_CLIP_FRAMES:
        raise MediaError(f"{path}: its timestamps span more than {MAX_CLIP_FRAMES} frames.", hint=_CUT_OUT)
    return slot + 1


# -- both ----------------------------------------------------------------------------------------------------


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    try:
        if not path.exists():
            raise MediaError(f"{path}: no such file.")
        if path.is_dir():
            raise MediaError(f"{path}: is a folder, a picture or clip expected.")
        if not path.is_file():
            raise MediaError(f"{path}: is not a regular file.")
        if path.stat().st_size == 0:
            raise MediaError(f"{path}: is empty (0 bytes).")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as e:
        raise MediaError(f"{path}: cannot be opened ({_reason(e)}).") from e
    return path


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{path}: says it is {width}x{height} pixels.", hint=_DAMAGED)
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path}: {width}x{height} are {width * height / 1e6:.0f} million pixels, "
            f"at most {MAX_PIXELS / 1e6:g} million expected.",
            hint=_SHRINK,
        )
