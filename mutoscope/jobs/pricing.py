"""What jobs cost: the shipped price list, or one's own. docs/credits.md says which numbers are whose."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutoscope.errors import FileError
from mutoscope.jobs.model import Resolved
from mutoscope.jobs.spec import JobSpec

TABLES = ("video", "edit", "image", "upscale", "reframe_rate", "hdr")
TIERS = ("draft", "360p", "540p", "720p", "1080p", "4k")
_NUMBERS = ("block_seconds", "hdr_factor", "usd_per_credit")


@dataclass(frozen=True)
class Prices:
    """A price list: whole credits by table and tier."""

    tables: dict[str, dict[str, int]]
    other: dict[str, int]
    block_seconds: float
    hdr_factor: float
    usd_per_credit: float

    @classmethod
    def load(cls, path: Path | None = None) -> Prices:
        """The list of a TOML file, or the shipped one.

        Raises:
            FileError: not TOML, or not exactly the tables and tiers of the shipped list.
        """
        path = path or Path(__file__).parent / "prices.toml"
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
            raise FileError(f"{path}: is not a readable TOML file ({e}).") from e
        expected = {*TABLES, "other", *_NUMBERS}
        if set(table) != expected:
            odd = ", ".join(sorted(set(table) ^ expected))
            raise FileError(f"{path}: {odd}: unknown or missing.", hint="Start from the shipped prices.toml.")
        for name in TABLES:
            if set(table[name]) != set(TIERS) or not all(_is_price(v) for v in table[name].values()):
                raise FileError(f"{path} [{name}]: expected a whole number for each of {', '.join(TIERS)}.")
        numbers = {name: float(table[name]) for name in _NUMBERS}
        if not all(v > 0 for v in numbers.values()):
            raise FileError(f"{path}: {', '.join(_NUMBERS)} must be above 0.")
        return cls({name: table[name] for name in TABLES}, dict(table["other"]), **numbers)

    def price(self, spec: JobSpec, resolved: Resolved, factor: float = 1.0) -> int:
        """Credits of a job at most. `factor` is the model's."""
        credits = self.tables[table_of(spec)][resolved.tier] * factor
        if spec.operation == "video":
            credits *= self.blocks(resolved)
            credits *= self.hdr_factor if spec.hdr else 1
        return math.ceil(round(credits, 6))

    def blocks(self, resolved: Resolved) -> int:
        """Begun blocks of a video. It lasts from its first frame to its last: 81 frames at 16 a second are 5 s."""
        seconds = (resolved.frames - 1) / resolved.fps
        return max(1, math.ceil(round(seconds / self.block_seconds, 6)))

    def usd(self, credits: int) -> float:
        return round(credits * self.usd_per_credit, 4)


def table_of(spec: JobSpec) -> str:
    """The table that prices a job. What goes on from a clip is new video; what follows one all the way is an edit."""
    if spec.operation != "video":
        return spec.operation
    return "edit" if spec.source or spec.control else "video"


def _is_price(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
