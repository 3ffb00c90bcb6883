"""JSON that every database, log and client can take: what `json.loads` lets through beyond that is refused."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value.

    Raises:
        ValueError: not JSON; NaN, infinite numbers, characters that are none (half of a pair) and the character 0,
            which PostgreSQL cannot store; nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        check(value)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    return value


def check(value: Any) -> None:
    """Raises ValueError for a text, or a key of a table, that cannot be stored."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("it has the character \\u0000")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                raise ValueError(f"\\u{ord(value[e.start]):04x} is half of a character") from e
    elif isinstance(value, dict):
        for name, part in value.items():
            check(name)
            check(part)
    elif isinstance(value, list):
        for part in value:
            check(part)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is too large a number")
    return number
