"""VACE conditioning: everything that a video must follow besides its prompt, as what the model is shown.

Paper: VACE (arXiv 2503.07598), section 3. Reference: ali-vilab/VACE `vace/models/wan/wan_vace.py` and its annotators.

Every task is the same three things:
- frames, [F, H, W, 3]: gray (127.5) where there is nothing to show;
- a mask, [F, H, W]: 1 = generate, 0 = keep;
- reference pictures, each an extra latent frame in front, on white.

`prepare` builds them from a `Conditioning` (numpy only; it can be dumped and looked at), `vace_context` encodes them
into the 96 channels of the model. With c channels of latents: c of what is kept, c of what is to be made, 64 of mask.

Layers are put on top of each other in this order: the base (source clip, box tracks, or gray), then clips to extend,
then keyframes. So "this picture moves along this track" is a keyframe plus a track. docs/conditioning.md has a table
of all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE
from mutoscope.errors import RequestError
from mutoscope.media.frames import cover_resize, letterbox_white, to_gray
from mutoscope.media.read import read_clip, read_image
from mutoscope.media.write import VideoWriter, write_image
from mutoscope.planning import check_conditioning, check_length, extension_frames, keyframe_index
from mutoscope.request import Box, BoxTrack, Clip, Conditioning, FramesHWC, Keyframe, Outpaint, Picture

GRAY = 127.5
BOX_LINE_PX = 2

Frames = npt.NDArray[np.float16]
"""Frames [F, H, W, 3] in 0..255. Not bytes, because the official gray is 127.5; 16 bits hold both exactly."""
Mask = npt.NDArray[np.uint8]
"""[F, H, W], 0 (keep) or 1 (generate)."""
Kind = Literal["text", "control", "extension", "repaint"]


@dataclass(frozen=True)
class Prepared:
    """What the model is shown, before the VAE: frames [F, H, W, 3], mask [F, H, W], references [H, W, 3] each.

    `kind` is what the frames and the mask ask for, see `compose`; "text" asks for nothing.
    """

    frames: Frames
    mask: Mask
    references: tuple[FramesHWC, ...]
    kind: Kind = "text"


def prepare(
    conditioning: Conditioning, width: int, height: int, n_frames: int, fps: float | None = None
) -> Prepared:
    """Read, fit and combine all inputs. Clips to extend are brought to `fps`, that of the video.

    Raises:
        RequestError: fields that contradict each other or do not fit the video.
        MediaError: an input that cannot be read.
    """
    check_conditioning(conditioning, n_frames)
    made = _layers(conditioning, width, height, n_frames, fps)
    if not made.mask.any():
        raise RequestError(
            "Every pixel of every frame is given: nothing would be generated.",
            hint="A mask is white where something new is wanted; a keyframe fills its whole frame.",
        )
    return made


def _layers(c: Conditioning, width: int, height: int, n_frames: int, fps: float | None) -> Prepared:
    canvas = _Canvas(width, height, n_frames)
    kind: Kind = "text"
    if c.video is not None and (c.outpaint is not None or c.mask is not None or c.boxes):
        kind = "repaint"
    elif c.extend_start is not None or c.extend_end is not None or c.keyframes:
        kind = "extension"
    elif c.video is not None or c.tracks:
        kind = "control"

    if c.video is not None and c.outpaint is not None:
        canvas.outpaint(c.video, c.outpaint)
    elif c.video is not None and kind == "repaint":
        canvas.repaint(c.video, c.mask, c.boxes)
    elif c.video is not None:
        canvas.control(c.video, gray=c.control == "gray")
    if c.tracks:
        canvas.draw_tracks(c.tracks)
    if c.extend_start is not None:
        canvas.extend(c.extend_start, fps, at_start=True)
    if c.extend_end is not None:
        canvas.extend(c.extend_end, fps, at_start=False)
    for keyframe in c.keyframes:
        canvas.keyframe(keyframe)
    references = tuple(letterbox_white(read_image(r), width, height) for r in c.references)
    made = Prepared(canvas.frames, canvas.mask, references, kind)
    return made if c.compose is None else compose(made, _layers(c.compose, width, height, n_frames, fps))


def compose(first: Prepared, second: Prepared) -> Prepared:
    """Two conditionings as one, by the official rules (`vace/annotators/composition.py`). References are joined.

    An extension and anything, a repaint and a control (in either order): what the first keeps stays, the second is
    shown elsewhere. All others: where the second generates, the second is shown, and the first elsewhere. So two
    repaints repaint both their parts, and of two controls the second holds. What asks for nothing changes nothing.
    """
    references = first.references + second.references
    if "text" in (first.kind, second.kind):
        only = second if first.kind == "text" else first
        return Prepared(only.frames, only.mask, references, only.kind)
    if (first.kind, second.kind) == ("control", "repaint"):
        first, second = second, first
    if first.kind == "extension" or (first.kind, second.kind) == ("repaint", "control"):
        shown, mask = first.mask, first.mask & second.mask
    else:
        shown, mask = second.mask, first.mask | second.mask
    frames = np.where(shown[..., None], second.frames, first.frames)
    kinds = {first.kind, second.kind}
    kind: Kind = "repaint" if "repaint" in kinds else "extension" if "extension" in kinds else "control"
    return Prepared(frames, mask, references, kind)


class _Canvas:
    """The frames and the mask while they are being put together; all gray and to be generated at first."""

    def __init__(self, width: int, height: int, n_frames: int) -> None:
        self.width, self.height, self.n_frames = width, height, n_frames
        self.frames: Frames = np.full((n_frames, height, width, 3), GRAY, np.float16)
        self.mask: Mask = np.ones((n_frames, height, width), np.uint8)

    def source(self, clip: Clip, what: str, size: tuple[int, int] | None = None) -> FramesHWC:
        """Exactly `n_frames` frames, taken evenly from the whole clip as the official code does."""
        size = size or (self.width, self.height)
        frames = read_clip(clip, max_frames=self.n_frames, pick="spread", size=size).frames
        check_length(len(frames), self.n_frames, what)
        return frames

    def control(self, clip: Clip, *, gray: bool) -> None:
        frames = self.source(clip, "control clip")
        self.frames[:] = to_gray(frames) if gray else frames

    def repaint(self, clip: Clip, mask: Picture | None, boxes: tuple[Box, ...]) -> None:
        """The masked part is hidden (gray) and generated anew, the rest is kept."""
        frames = self.source(clip, "source video")
        self.mask[:] = self.box_mask(boxes) if mask is None else self.read_mask(mask)
        self.frames[:] = frames
        self.frames[self.mask == 1] = GRAY

    def read_mask(self, source: Picture) -> Mask:
        """A picture for all frames or a clip; the first channel, white (above one half) = generate."""
        if isinstance(source, np.ndarray) and source.ndim == 3:
            source = source[None]
        frames = read_clip(
            source, max_frames=self.n_frames, pick="spread", size=(self.width, self.height)
        ).frames
        if len(frames) not in (1, self.n_frames):
            raise RequestError(f"The mask has {len(frames)} frames, 1 or {self.n_frames} are needed.")
        return (frames[..., 0] > GRAY).astype(np.uint8)

    def box_mask(self, boxes: tuple[Box, ...]) -> Mask:
        mask = np.zeros((1, self.height, self.width), np.uint8)
        for box in boxes:
            x0, y0, x1, y1 = self.pixels(box)
            mask[:, y0:y1, x0:x1] = 1
        return mask

    def pixels(self, box: Box) -> tuple[int, int, int, int]:
        """Fractions of the frame to the nearest whole pixels, at least one wide and high."""
        x0, y0, x1, y1 = box
        left, top = min(round(x0 * self.width), self.width - 1), min(round(y0 * self.height), self.height - 1)
        return left, top, max(left + 1, round(x1 * self.width)), max(top + 1, round(y1 * self.height))

    def outpaint(self, clip: Clip, margin: Outpaint) -> None:
        """The source, shrunk, inside a gray canvas; the canvas is generated."""
        left, width = _inside(self.width, margin.left, margin.right)
        top, height = _inside(self.height, margin.top, margin.bottom)
        inside = np.s_[:, top : top + height, left : left + width]
        self.frames[inside] = self.source(clip, "source video", (width, height))
        self.mask[inside] = 0

    def extend(self, clip: Clip, fps: float | None, *, at_start: bool) -> None:
        """A clip that the video continues: its last (or first) frames, at most half of the video, are kept."""
        most = extension_frames(self.n_frames)
        pick: Literal["first", "last"] = "last" if at_start else "first"
        frames = read_clip(clip, max_frames=most, pick=pick, fps=fps, size=(self.width, self.height)).frames
        where = slice(0, len(frames)) if at_start else slice(self.n_frames - len(frames), self.n_frames)
        self.frames[where], self.mask[where] = frames, 0

    def keyframe(self, keyframe: Keyframe) -> None:
        index = keyframe_index(keyframe, self.n_frames)
        self.frames[index] = cover_resize(read_image(keyframe.image), self.width, self.height)
        self.mask[index] = 0

    def draw_tracks(self, tracks: tuple[BoxTrack, ...]) -> None:
        """Black box outlines on white, as VACE's layout annotator draws them."""
        self.frames[:] = 255
        for track in tracks:
            points = np.array(sorted(track.points), float).reshape(-1, 5)
            times = np.linspace(0, 1, self.n_frames)
            moving = np.stack([np.interp(times, points[:, 0], points[:, i]) for i in range(1, 5)], axis=1)
            for frame, box in zip(self.frames, moving.tolist(), strict=True):
                x0, y0, x1, y1 = self.pixels(tuple(box))
                line = BOX_LINE_PX
                frame[y0 : y0 + line, x0:x1] = frame[max(y0, y1 - line) : y1, x0:x1] = 0
                frame[y0:y1, x0 : x0 + line] = frame[y0:y1, max(x0, x1 - line) : x1] = 0


def _inside(size: int, before: float, after: float) -> tuple[int, int]:
    """Where the source lies in `size` pixels when its margins are these fractions of it: start and length.

    A side without margin has none, whatever the rounding.
    """
    length = max(SPATIAL_STRIDE, round(size / (1 + before + after)))
    return (round((size - length) * before / (before + after)) if before + after else 0), length


Encode = Callable[[Iterator[Tensor]], Iterator[Tensor]]
"""A streaming encoder: `WanVAE.encode_stream`, whole or in tiles."""


def vace_context(prepared: Prepared, encode: Encode, device: torch.device | str = "cpu") -> Tensor:
    """The model's side input, float32 [1, 2 * Z + 64, R + 1 + (F-1)/4, H/8, W/8], R reference pictures first."""
    kept = _encoded(prepared, encode, device, lambda pixels, mask: pixels * (1 - mask))
    all_gray = prepared.kind == "text"
    made = kept if all_gray else _encoded(prepared, encode, device, lambda pixels, mask: pixels * mask)
    context = torch.cat((kept, made, mask_channels(prepared.mask).to(kept)), dim=1)
    pictures = []
    for reference in prepared.references:
        latent = torch.cat(list(encode(iter([_pixels(reference[None].astype(np.float16), device)]))), dim=2)
        pictures.append(F.pad(latent, (0, 0, 0, 0, 0, 0, 0, context.shape[1] - latent.shape[1])))
    return torch.cat((*pictures, context), dim=2)


def _encoded(
    prepared: Prepared, encode: Encode, device: torch.device | str, part: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    n = len(prepared.frames)

    def chunks() -> Iterator[Tensor]:
        for a, b in pairwise([0, *range(1, n, TEMPORAL_STRIDE), n]):
            mask = torch.from_numpy(prepared.mask[a:b]).to(device)[None, None]
            yield part(_pixels(prepared.frames[a:b], device), mask)

    return torch.cat(list(encode(chunks())), dim=2)


def _pixels(frames: Frames, device: torch.device | str) -> Tensor:
    """[F, H, W, 3] in 0..255 to float32 [1, 3, F, H, W] in -1..1."""
    return (torch.from_numpy(frames).to(device, torch.float32) / GRAY - 1).permute(3, 0, 1, 2)[None]


def mask_channels(mask: Mask) -> Tensor:
    """The 8 x 8 mask pixels of each latent cell as 64 channels: [1, 64, 1 + (F-1)/4, H/8, W/8].

    In time the mask is picked, not averaged (nearest-exact of F to its latent frames).
    """
    s = SPATIAL_STRIDE
    f, h, w = mask.shape
    cells = torch.from_numpy(mask).float().view(f, h // s, s, w // s, s).permute(2, 4, 0, 1, 3)
    cells = cells.reshape(1, s * s, f, h // s, w // s)
    n_latent = 1 + (f - 1) // TEMPORAL_STRIDE
    return F.interpolate(cells, size=(n_latent, h // s, w // s), mode="nearest-exact")


def generated(prepared: Prepared) -> Tensor:
    """Latent cells of which nothing is given: float32 [1, 1, R + 1 + (F-1)/4, H/8, W/8], 1 there, 0 elsewhere."""
    s, (h, w) = SPATIAL_STRIDE, prepared.mask.shape[1:]
    first, later = prepared.mask[:1], prepared.mask[1:]
    frames = np.concatenate((first, later.reshape(-1, TEMPORAL_STRIDE, h, w).min(1)))
    cells = frames.reshape(len(frames), h // s, s, w // s, s).min((2, 4)).astype(np.float32)
    return F.pad(torch.from_numpy(cells)[None, None], (0, 0, 0, 0, len(prepared.references), 0))


def dump(prepared: Prepared, folder: Path, fps: float) -> list[Path]:
    """Write what the model is given as PNG pictures: frames, mask (white = generate), references. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = np.repeat((prepared.mask * 255)[..., None], 3, axis=-1)
    written = []
    for name, frames in (("frames", np.rint(prepared.frames).astype(np.uint8)), ("mask", mask)):
        path = folder / name
        with VideoWriter(
            path, width=frames.shape[2], height=frames.shape[1], fps=fps, format="png-sequence"
        ) as writer:
            for frame in frames:
                writer.write(frame)
        written.append(path)
    for i, reference in enumerate(prepared.references, 1):
        path = folder / f"reference-{i}.png"
        write_image(path, reference)
        written.append(path)
    return written
