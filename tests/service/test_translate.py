"""From a job to what the engine is asked for: how long, and how fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.jobs.translate import generation_request
from mutoscope.media.write import VideoWriter
from tests.service.making import resolved

CLIP = Media(asset="clip")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """4 seconds at 16 frames a second."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, width=32, height=32, fps=16) as writer:
        for i in range(64):
            writer.write(np.full((32, 32, 3), 3 * i, np.uint8))
    return path


@pytest.mark.parametrize(
    ("fields", "frames", "fps"),
    [
        ({}, 17, 17 / 4),  # as long as the clip that is followed
        ({"seconds": 2.0}, 17, 8.0),  # as long as was asked for
        ({"fps": 8.0}, 17, 8.0),
        ({"frames": 17}, 17, 8.0),
    ],
)
@pytest.mark.parametrize("part", ["source", "control"])
def test_a_followed_clip_keeps_its_pace(
    clip: Path, part: str, fields: dict[str, object], frames: int, fps: float
) -> None:
    spec = JobSpec.model_validate({"prompt": "a ball", part: {"asset": "clip"}, **fields})
    request = generation_request(spec, resolved(frames=frames, fps=8.0), {CLIP: clip})
    assert (request.frames, request.fps) == (frames, pytest.approx(fps))


def test_a_short_clip_makes_a_short_video_of_the_same_pace(clip: Path) -> None:
    spec = JobSpec(prompt="a ball", control=CLIP)
    request = generation_request(spec, resolved(frames=81, fps=8.0), {CLIP: clip})
    assert request.frames == 61, "4n+1 of the 64 that there are"
    assert request.fps == pytest.approx(61 / 4)


def test_text_alone_is_as_resolved() -> None:
    request = generation_request(JobSpec(prompt="a ball"), resolved(frames=17, fps=8.0), {})
    assert (request.frames, request.fps) == (17, 8.0)
