"""What a clip is trained to be made from: a random VACE task, as `engine.conditioning` would build it.

text         nothing is shown
frames       given frames are kept: first, last, both, some, the beginning, the end
repaint      a box is hidden, still or following the object; or all but a box (outpaint)
track        the outline of the object's box on white
control      the clip in gray, or its outlines
reference    the object alone on white, as a latent frame in front; combined with nothing else here
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutoscope.engine.conditioning import BOX_LINE_PX, GRAY
from mutoscope.media.frames import to_gray

SHARES = {
    "text": 0.42, "first": 0.05, "last": 0.04, "both": 0.40, "some": 0.05, "start": 0.05, "end": 0.03,
    "box": 0.08, "moving": 0.03, "outside": 0.03, "track": 0.09, "gray": 0.025, "outline": 0.015,
}  # fmt: skip
"""How often each task is trained in a batch without references, relative to each other."""
NAMES, WEIGHTS = tuple(SHARES), np.array(list(SHARES.values()))


@dataclass(frozen=True)
class Shown:
    """What the model is shown: frames [F,H,W,3] in 0..255 (float32), mask [F,H,W], 1 = generate.

    `guides`: something is shown where it is to be generated; otherwise all is gray there.
    """

    frames: NDArray[np.float32]
    mask: NDArray[np.float32]
    guides: bool = False


def random_task(
    rng: np.random.Generator, clip: NDArray[np.uint8], boxes: NDArray[np.floating] | None
) -> Shown:
    """A task for a clip [F,H,W,3]; `boxes` [F,4] is the object's, in fractions of the frame (None: not known)."""
    name = NAMES[int(rng.choice(len(NAMES), p=WEIGHTS / WEIGHTS.sum()))]
    if boxes is None and name in ("moving", "track"):
        name = "text"
    return task(name, rng, clip, boxes)


def task(
    name: str, rng: np.random.Generator, clip: NDArray[np.uint8], boxes: NDArray[np.floating] | None
) -> Shown:
    """One task by its name."""
    f, h, w = clip.shape[:3]
    mask = np.ones((f, h, w), np.float32)
    if name == "text":
        return Shown(np.full(clip.shape, GRAY, np.float32), mask)
    if name == "track":
        assert boxes is not None
        return Shown(_outlines_of_boxes(clip.shape, boxes), mask, guides=True)
    if name in ("gray", "outline"):
        gray = to_gray(clip).astype(np.float32)
        return Shown(gray if name == "gray" else _edges(gray), mask, guides=True)
    if name == "first":
        mask[0] = 0
    elif name == "last":
        mask[-1] = 0
    elif name == "both":
        mask[[0, -1]] = 0
    elif name == "some":
        mask[rng.random(f) < 0.25] = 0
    elif name == "start":
        mask[: int(rng.integers(2, (f - 1) // 2 + 1))] = 0
    elif name == "end":
        mask[-int(rng.integers(2, (f - 1) // 2 + 1)) :] = 0
    elif name == "moving":
        assert boxes is not None
        mask[:] = _inside_boxes(boxes, h, w, margin=float(rng.uniform(0.03, 0.12)))
    else:
        box = _box_around(rng, boxes, h, w)
        inside = np.zeros((h, w), np.float32)
        inside[box] = 1
        mask[:] = inside if name == "box" else 1 - inside
    frames = clip.astype(np.float32)
    frames[mask == 1] = GRAY
    return Shown(frames, mask)


def _box_around(
    rng: np.random.Generator, boxes: NDArray[np.floating] | None, h: int, w: int
) -> tuple[slice, slice]:
    """A box that holds the object all the time in two of three cases, else anywhere."""
    if boxes is not None and rng.random() < 0.66:
        x0, y0 = boxes[:, :2].min(0) * (w, h)
        x1, y1 = boxes[:, 2:].max(0) * (w, h)
        grow = rng.uniform(1, 10, 4) * min(h, w) / 64
        left, top = max(0, int(x0 - grow[0])), max(0, int(y0 - grow[1]))
        return slice(top, min(h, int(y1 + grow[3]) + 1)), slice(left, min(w, int(x1 + grow[2]) + 1))
    bw, bh = rng.integers(w // 4, 3 * w // 4 + 1), rng.integers(h // 4, 3 * h // 4 + 1)
    left, top = rng.integers(0, w - bw + 1), rng.integers(0, h - bh + 1)
    return slice(top, top + bh), slice(left, left + bw)


def _inside_boxes(boxes: NDArray[np.floating], h: int, w: int, margin: float) -> NDArray[np.float32]:
    x, y = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
    b = boxes.astype(np.float32) + np.array([-margin, -margin, margin, margin], np.float32)
    across = (x > b[:, :1]) & (x < b[:, 2:3])
    down = (y > b[:, 1:2]) & (y < b[:, 3:4])
    return (across[:, None, :] & down[:, :, None]).astype(np.float32)


def _outlines_of_boxes(shape: tuple[int, ...], boxes: NDArray[np.floating]) -> NDArray[np.float32]:
    """As `conditioning` draws tracks: black outlines on white."""
    _, h, w, _ = shape
    frames = np.full(shape, 255, np.float32)
    for frame, (x0, y0, x1, y1) in zip(frames, boxes.astype(np.float64), strict=True):
        left, top = min(round(x0 * w), w - 1), min(round(y0 * h), h - 1)
        right, bottom = max(left + 1, round(x1 * w)), max(top + 1, round(y1 * h))
        line = BOX_LINE_PX
        frame[top : top + line, left:right] = frame[max(top, bottom - line) : bottom, left:right] = 0
        frame[top:bottom, left : left + line] = frame[top:bottom, max(left, right - line) : right] = 0
    return frames


def _edges(gray: NDArray[np.float32]) -> NDArray[np.float32]:
    """White lines on black where the brightness changes."""
    g = gray[..., 0]
    dx, dy = np.zeros_like(g), np.zeros_like(g)
    dx[:, :, 1:], dy[:, 1:] = np.abs(np.diff(g, axis=2)), np.abs(np.diff(g, axis=1))
    return np.repeat(np.clip((np.maximum(dx, dy) - 12) * 8, 0, 255)[..., None], 3, axis=-1)
