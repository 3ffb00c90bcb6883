"""What nobody can make is refused when it is asked for, not when it has run."""

from __future__ import annotations

from typing import Any

import pytest

from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.resolve import resolve
from mutoscope.jobs.spec import JobSpec
from tests.service.making import make_model


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        ({"width": 8192, "height": 8192}, "width", "8192x8192.*64 million"),
        ({"resolution": "4k", "aspect_ratio": "99:1"}, "aspect_ratio", "213840x2160.*8192 pixels a side"),
        ({"resolution": "540p", "aspect_ratio": "1:99"}, "aspect_ratio", "540x53460"),
        ({"format": "png"}, "format", "png is for single pictures"),
        ({"operation": "image", "format": "mp4"}, "format", "mp4 is for videos, png, jpeg, webp expected"),
        ({"hdr": True, "format": "webm"}, "format", "webm is not for HDR: mp4, hdr10"),
        ({"operation": "hdr", "source": {"job": "j"}, "format": "gif"}, "format", "gif is not for HDR"),
        ({"scale": 2}, "scale", "upscale only"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(asked: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        resolve(JobSpec.model_validate({"prompt": "a red ball", **asked}), make_model())
    assert refused.value.field == field


@pytest.mark.parametrize(
    "asked",
    [
        {"width": 8192, "height": 7812},
        {"resolution": "4k", "aspect_ratio": "21:9"},
        {"operation": "image", "format": "webp"},
        {"hdr": True},
        {"hdr": True, "format": "prores"},
        {"operation": "upscale", "scale": 2, "source": {"job": "j"}, "format": "png"},
    ],
)
def test_what_can(asked: dict[str, Any]) -> None:
    assert resolve(JobSpec.model_validate({"prompt": "a red ball", **asked}), make_model()).out_width
