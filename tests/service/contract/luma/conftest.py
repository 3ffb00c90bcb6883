"""Fixtures of the contract tests with Luma's SDKs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from luma_house import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    with made.http:
        yield made


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """For tests that leave nothing behind."""
    made = House(tmp_path_factory.mktemp("strict"))
    with made.http:
        yield made
