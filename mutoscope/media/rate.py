"""Another frame rate: frames in between are made from motion (FFmpeg's minterpolate), or frames are left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from typing import Any

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mutoscope.errors import MediaError
from mutoscope.media.read import EXACT_COLOURS, MAX_FPS
from mutoscope.request import FramesHWC

_MARGIN = 4
"""minterpolate looks at two frames before and two after: the first and the last one are repeated, or they would be
treated worse than the others."""
MIN_SIDE = 16
"""Smaller pictures have no blocks to follow: their neighbours are blended."""


def frames_after(n: int, fps: float, wanted_fps: float) -> int:
    """How many frames `change_rate` makes of n: the clip keeps its length."""
    return max(1, math.ceil(n * wanted_fps / fps - 1e-6))


def change_rate(frames: Iterator[FramesHWC], fps: float, wanted_fps: float) -> Iterator[FramesHWC]:
    """Frames [H, W, 3] at `fps` to frames at `wanted_fps`, frames per second."""
    for rate in (fps, wanted_fps):
        if not 0 < rate <= MAX_FPS:
            raise MediaError(f"{rate} frames per second, up to {MAX_FPS:g} expected.")
    if wanted_fps <= fps:
        yield from _thinned(frames, fps, wanted_fps)
        return
    first = next(frames, None)
    if first is None:
        raise MediaError("a clip without frames.")
    between = _blended if min(first.shape[:2]) < MIN_SIDE else _interpolated
    yield from between(chain([first], frames), fps, wanted_fps)


def _thinned(frames: Iterator[FramesHWC], fps: float, wanted_fps: float) -> Iterator[FramesHWC]:
    """Of the frames, those that are shown at the times of the new ones."""
    made = 0
    for i, frame in enumerate(frames):
        if math.floor(made * fps / wanted_fps + 1e-6) == i:
            made += 1
            yield frame


def _blended(frames: Iterator[FramesHWC], fps: float, wanted_fps: float) -> Iterator[FramesHWC]:
    """New frames are mixtures of the two that they lie between."""
    made, old = 0, 0
    previous = next(frames)
    for old, frame in enumerate(frames, 1):
        while made * fps / wanted_fps < old - 1e-6:
            share = made * fps / wanted_fps - (old - 1)
            mixed = (1 - share) * previous.astype(np.float32) + share * frame
            yield np.rint(mixed).astype(np.uint8)
            made += 1
        previous = frame
    for _ in range(made, frames_after(old + 1, fps, wanted_fps)):
        yield previous


def _interpolated(frames: Iterator[FramesHWC], fps: float, wanted_fps: float) -> Iterator[FramesHWC]:
    """Every old frame stays where it was; new ones lie between. After the last one it is held."""
    graph: Any = None
    old, made, last = 0, 0, None
    rate = Fraction(fps).limit_denominator(1001)
    wanted = Fraction(wanted_fps).limit_denominator(1001)
    for frame in frames:
        if graph is None:
            graph = _graph(frame.shape[1], frame.shape[0], rate, wanted)
            for i in range(-_MARGIN, 0):
                graph.push(_picture(frame, i, rate))
        graph.push(_picture(frame, old, rate))
        old, last = old + 1, frame
        for picture in _drain(graph):
            made += 1
            yield picture
    assert last is not None
    total = frames_after(old, fps, wanted_fps)
    for i in range(old, old + _MARGIN):
        graph.push(_picture(last, i, rate))
        for picture in _drain(graph):
            if made < total:
                made += 1
                yield picture
    for _ in range(made, total):
        yield last


def _graph(width: int, height: int, fps: Fraction, wanted: Fraction) -> Any:
    graph: Any = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="yuv444p", time_base=1 / fps)
    how = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=fdiff:scd_threshold=20"
    change = graph.add("minterpolate", f"fps={wanted.numerator}/{wanted.denominator}:{how}")
    sink = graph.add("buffersink")
    source.link_to(change)
    change.link_to(sink)
    graph.configure()
    return graph


def _picture(frame: FramesHWC, index: int, fps: Fraction) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuv444p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=EXACT_COLOURS,
    )
    picture.pts, picture.time_base = index, 1 / fps
    return picture


def _drain(graph: Any) -> Iterator[FramesHWC]:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        if frame.pts >= 0:
            yield frame.reformat(
                format="rgb24", src_colorspace=Colorspace.ITU709, interpolation=EXACT_COLOURS
            ).to_ndarray()
