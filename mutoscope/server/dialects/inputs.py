"""Pictures and clips that a body names by URL or data URI: checked before the transaction, kept in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mutoscope.jobs import addresses, assets, inline
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.inline import Inline, InputKind
from mutoscope.jobs.spec import Media
from mutoscope.settings import Settings

LONGEST = 1920
"""Longest side of a video that is made after a clip or picture of unknown purpose: 1080p of 16:9."""


@dataclass(frozen=True)
class Named:
    """A file of a body: the field, its URI, and what it has to be."""

    field: str
    uri: str
    kind: InputKind


@dataclass(frozen=True)
class File:
    """What a URI turned out to be. Seconds and frames: of a clip. None: not known yet, as of a URL."""

    media: Media
    kind: InputKind
    seconds: float | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None  # width and height, pixels

    @classmethod
    def of(cls, media: Media, kind: InputKind, info: Mapping[str, Any]) -> File:
        """From what a probe found (`Probed.info`, `Asset.info`)."""
        size = (info["width"], info["height"]) if info.get("width") and info.get("height") else None
        return cls(media, kind, info.get("seconds") or None, info.get("frames") or None, size)


def like(size: tuple[int, int], short: int | None = None, longest: int = LONGEST) -> tuple[int, int]:
    """A size of the same shape: with that short side, or as large; even numbers of pixels, none above `longest`."""
    factor = min(short / min(size) if short else 1.0, longest / max(size))
    width, height = (max(16, round(side * factor / 2) * 2) for side in size)
    return width, height


def look(named: Iterable[Named], settings: Settings) -> dict[str, Inline]:
    """Check all URIs, and open those that hold their data. Starts processes: not to be called in a transaction.

    Raises:
        InvalidRequest: a URL that may not be fetched, or data that is not a usable picture or clip.
    """
    found: dict[str, Inline] = {}
    policy = addresses.input_policy(settings)
    for one in named:
        if inline.is_data_uri(one.uri):
            if one.uri not in found:
                found[one.uri] = inline.decode(one.uri, kinds=(one.kind,), field=one.field)
            continue
        try:
            addresses.parse(one.uri, policy)
        except addresses.Refused as e:
            raise InvalidRequest(f"{one.field}: the URL {e.reason}.", field=one.field) from e
    return found


def keep(
    tx: Tx, account_id: str, named: Iterable[Named], found: Mapping[str, Inline], settings: Settings
) -> dict[str, File]:
    """What stands in the spec for each URI; data become assets."""
    files: dict[str, File] = {}
    for one in named:
        if one.uri in files:
            continue
        if one.uri in found:
            data = found[one.uri]
            media = assets.store(
                tx, account_id, data, data_dir=settings.data_dir, hours=settings.upload_hours
            )
            files[one.uri] = File.of(media, one.kind, data.probed.info())
        else:
            files[one.uri] = File(Media(url=one.uri), one.kind)
    return files
