"""What a dialect takes of its vendor's API, as a table that a page is made of.

Each dialect has `COVERAGE`, a tuple of `Route`. `scripts/make_api_coverage.py` turns all of them into
docs/api-coverage.md, and a test holds the table against the routes that are really there.

    COVERAGE = (
        Route("POST", "/generations", SUPPORTED, fields=(
            Part("prompt", SUPPORTED),
            Part("concepts", IGNORED, "the model has no concepts"),
            Part("callback_url", SUPPORTED),
        )),
        Route("POST", "/generations/{id}/audio", REFUSED, "no audio model"),
    )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["supported", "ignored", "refused"]
SUPPORTED: Level = "supported"
IGNORED: Level = "ignored"
"""Accepted without effect; the note says why nothing is lost, or what is."""
REFUSED: Level = "refused"
"""Answered with the vendor's error and a sentence; the note is the reason."""


@dataclass(frozen=True)
class Part:
    """One field of a route's body or query, or one value of a field (`outputFormat: gif`)."""

    name: str
    level: Level
    note: str = ""
    models: tuple[str, ...] = ()  # empty: of every model

    def __post_init__(self) -> None:
        if self.level != SUPPORTED and not self.note:
            raise ValueError(f"{self.name}: {self.level} needs a note that says why")


@dataclass(frozen=True)
class Route:
    """One method and path as the vendor writes it, below the dialect's prefix."""

    method: str
    path: str
    level: Level
    note: str = ""
    fields: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.level != SUPPORTED and not self.note:
            raise ValueError(f"{self.method} {self.path}: {self.level} needs a note that says why")
