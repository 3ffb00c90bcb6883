"""Resizing, sampling and comparing frames: pure functions on uint8 RGB arrays, [H, W, 3] or [F, H, W, 3]."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from mutoscope.errors import MediaError
from mutoscope.request import FramesHWC

WHITE = 255
_LUMA = np.array([0.299, 0.587, 0.114])
"""BT.601 luma, the grayscale that VACE's colourisation was trained on."""


def check_frames(frames: object, *, ndim: tuple[int, ...] = (3, 4), what: str = "frames") -> FramesHWC:
    """`frames` itself if it is a non-empty uint8 RGB array of the wanted dimensions, else a MediaError."""
    shapes = " or ".join({3: "[H, W, 3]", 4: "[F, H, W, 3]"}[n] for n in ndim)
    if not isinstance(frames, np.ndarray):
        raise MediaError(f"{what}: got {type(frames).__name__}, a uint8 array {shapes} expected.")
    if frames.dtype != np.uint8 or frames.ndim not in ndim or frames.shape[-1] != 3:
        hint = "Multiply by 255 and convert first." if frames.dtype.kind == "f" else ""
        raise MediaError(
            f"{what}: got {frames.dtype} {list(frames.shape)}, uint8 {shapes} expected.", hint=hint
        )
    if frames.size == 0:
        raise MediaError(f"{what}: got an empty array {list(frames.shape)}.")
    return frames


def cover_resize(frames: FramesHWC, width: int, height: int) -> FramesHWC:
    """Scale so that `width` x `height` is covered and crop the rest away evenly (bicubic, antialiased)."""
    check_frames(frames)
    src_height, src_width = frames.shape[-3:-1]
    if (src_width, src_height) == (width, height):
        return frames
    _check_size(width, height)
    scale = max(width / src_width, height / src_height)
    box_width, box_height = min(width / scale, src_width), min(height / scale, src_height)
    left, top = (src_width - box_width) / 2, (src_height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)

    def one(image: FramesHWC) -> FramesHWC:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))

    return one(frames) if frames.ndim == 3 else np.stack([one(f) for f in frames])


def letterbox_white(image: FramesHWC, width: int, height: int) -> FramesHWC:
    """Fit the whole picture into `width` x `height`, centred on white: how VACE takes reference pictures.

    Sizes round down as in the official code. Shrinking is antialiased (the official code is not).
    """
    check_frames(image, ndim=(3,), what="reference picture")
    _check_size(width, height)
    src_height, src_width = image.shape[:2]
    if (src_width, src_height) == (width, height):
        return image
    scale = min(width / src_width, height / src_height)
    # the small amount keeps 0.1 * 30 = 2.9999… from losing a pixel
    new_width, new_height = (max(1, int(n * scale + 1e-6)) for n in (src_width, src_height))
    canvas = np.full((height, width, 3), WHITE, np.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    small = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    canvas[top : top + new_height, left : left + new_width] = np.asarray(small)
    return canvas


def to_gray(frames: FramesHWC) -> FramesHWC:
    """Luminance, repeated in the three channels."""
    check_frames(frames)
    gray = np.rint(frames @ _LUMA).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1)


def sample_indices(n_src: int, n_dst: int) -> list[int]:
    """`n_dst` indices spread evenly over `n_src` frames, both ends included; they repeat if n_dst > n_src."""
    if n_src < 1 or n_dst < 1:
        raise MediaError(f"cannot pick {n_dst} of {n_src} frames: both must be at least 1.")
    return [int(i) for i in np.rint(np.linspace(0, n_src - 1, n_dst))]


def contact_sheet(frames: FramesHWC, columns: int, *, gap: int = 2) -> FramesHWC:
    """All frames side by side in rows of `columns`, on white with `gap` pixels between them."""
    check_frames(frames, ndim=(4,))
    if columns < 1:
        raise MediaError(f"a contact sheet of {columns} columns: at least 1 expected.")
    n, height, width, _ = frames.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), WHITE, np.uint8)
    for i, frame in enumerate(frames):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def thumbnail(image: FramesHWC, longest: int) -> FramesHWC:
    """A small copy whose longer side has at most `longest` pixels; never enlarged."""
    check_frames(image, ndim=(3,), what="picture")
    height, width = image.shape[:2]
    scale = longest / max(width, height)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    _check_size(*size)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays in dB; infinity when they are equal."""
    if a.shape != b.shape:
        raise MediaError(f"cannot compare {list(a.shape)} with {list(b.shape)}: same shapes expected.")
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"a picture of {width}x{height}: at least 1x1 expected.")
