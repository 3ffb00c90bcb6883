"""Larger and smaller: Lanczos resampling of pictures and clips. It invents no detail."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mutoscope.media.frames import check_frames
from mutoscope.request import FramesHWC


def cover_lanczos(frame: FramesHWC, width: int, height: int) -> FramesHWC:
    """Scale [H, W, 3] so that width x height is covered, and crop the rest away evenly."""
    check_frames(frame, ndim=(3,), what="picture")
    src_height, src_width = frame.shape[:2]
    if (src_width, src_height) == (width, height):
        return frame
    scale = max(width / src_width, height / src_height)
    box_width, box_height = min(width / scale, src_width), min(height / scale, src_height)
    left, top = (src_width - box_width) / 2, (src_height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS, box=box))
