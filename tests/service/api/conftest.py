"""Fixtures of the tests of our own API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_house import House, opened

from tests.service.databases import Clock, Postgres


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with opened(House(tmp_path / "data", preload="")) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def either_house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """Once on each database."""
    url = ""
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        assert isinstance(server, Postgres)
        server.make(Clock()).close()  # emptied
        url = server.url
    with opened(House(tmp_path / "data", preload="", database_url=url)) as made:
        yield made
