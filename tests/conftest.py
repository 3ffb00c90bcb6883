"""Shared by all tests: nothing of the user's settings or models is seen, and there is a tiny model."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side: threads that wait for each other cost most time

import pytest

from tests.tiny import make_tiny_model

OURS = ("MUTOSCOPE_", "HF_ENDPOINT", "HF_TOKEN", "COLUMNS", "NO_COLOR", "FORCE_COLOR")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting of whoever runs the tests; models would be found in an empty place."""
    for name in os.environ:
        if name.startswith(OURS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path_factory.getbasetemp() / "no-models"))
    monkeypatch.setenv("MUTOSCOPE_CACHE", "off")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete model set with random weights (see tests/tiny.py); read only."""
    return make_tiny_model(tmp_path_factory.mktemp("models"))
