"""Fixtures of the contract tests with Runway's SDKs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runway_house import House

from mutoscope.media.write import VideoWriter, write_image


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    with house.http:
        yield house
    house.db.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "ball.png"
    write_image(path, np.full((32, 32, 3), 200, np.uint8))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, width=32, height=32, fps=8) as writer:
        for i in range(16):
            writer.write(np.full((32, 32, 3), 8 * i, np.uint8))
    return path
