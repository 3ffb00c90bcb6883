"""Fixtures of the contract tests with OpenAI's SDK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openai_house import House

from mutoscope.media.write import VideoWriter, write_image


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "data")
    with made.http:
        yield made


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "ball.png"
    write_image(path, np.full((48, 64, 3), 200, np.uint8))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """2 seconds of 32 x 48 pixels."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, width=32, height=48, fps=8) as writer:
        for i in range(16):
            writer.write(np.full((48, 32, 3), 8 * i, np.uint8))
    return path
