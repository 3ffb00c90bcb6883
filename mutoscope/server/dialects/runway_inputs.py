"""Files that a body names: looked at before the transaction, kept in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mutoscope.jobs import assets, inline
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.spec import Media
from mutoscope.server.dialects import inputs
from mutoscope.server.dialects.runway_rules import SCHEME, BodyRefused, Found, Issue
from mutoscope.server.dialects.runway_spec import File

TYPES: dict[str, tuple[str, ...]] = {"image": ("image/jpeg", "image/png", "image/webp"), "video": ()}
"""Runway takes no GIF; what clips hold is looked at by the job."""


@dataclass(frozen=True)
class Parsed:
    """A body that keeps to the rules, with the files inside of it opened and checked."""

    body: dict[str, Any]
    name: str  # the model, or the slug of a router
    found: tuple[Found, ...]
    inlines: dict[str, inline.Inline]


def look(body: dict[str, Any], name: str, found: list[Found]) -> Parsed:
    """Decode the data URIs of a body. Takes a process for each: not to be called in a transaction.

    Raises:
        BodyRefused: one or several cannot be used.
    """
    inlines: dict[str, inline.Inline] = {}
    issues = []
    for file in found:
        if not inline.is_data_uri(file.uri) or file.uri in inlines:
            continue
        kind: inline.InputKind = "video" if file.kind == "video" else "image"
        issue = Issue(file.path, "")
        try:
            inlines[file.uri] = inline.decode(file.uri, kinds=(kind,), types=TYPES[kind], field=issue.name)
        except inline.InputRefused as e:
            issues.append(Issue(file.path, f"{e.reason} {e}"))
    if issues:
        raise BodyRefused(issues)
    return Parsed(body=body, name=name, found=tuple(found), inlines=inlines)


def known(tx: Tx, account_id: str, parsed: Parsed) -> dict[str, File]:
    """Every file of a body; those inside of it are not kept yet and have a stand-in for their id.

    Raises:
        BodyRefused: an upload that is not there, or not of the expected kind.
    """
    files: dict[str, File] = {}
    issues = []
    for file in parsed.found:
        if file.uri in parsed.inlines:
            files[file.uri] = _file(Media(asset="inline"), parsed.inlines[file.uri].probed.info())
        elif file.uri.startswith(SCHEME):
            try:
                asset = assets.get(tx, account_id, file.uri.removeprefix(SCHEME))
            except NotFound as e:
                issues.append(Issue(file.path, str(e)))
                continue
            if not _fits(asset, file.kind):
                issues.append(
                    Issue(file.path, f"{inline.UNSUPPORTED_TYPE} It is {asset.mime}, {file.kind} expected.")
                )
            files[file.uri] = _file(asset.media, asset.info)
        else:
            files[file.uri] = File(Media(url=file.uri))
    if issues:
        raise BodyRefused(issues)
    return files


def keep(
    tx: Tx, account_id: str, parsed: Parsed, files: dict[str, File], *, data_dir: Path, hours: float
) -> dict[str, File]:
    """The same with the files of the body kept as assets."""
    kept = dict(files)
    for uri, data in parsed.inlines.items():
        media = assets.store(tx, account_id, data, data_dir=data_dir, hours=hours)
        kept[uri] = replace(files[uri], media=media)
    return kept


def _fits(asset: assets.Asset, kind: str) -> bool:
    if kind == "video":
        return asset.mime.startswith("video/") or asset.info.get("kind") == "animation"
    return asset.mime in TYPES.get(kind, ())


def _file(media: Media, info: dict[str, Any]) -> File:
    """From what a probe found."""
    known = inputs.File.of(media, "image", info)
    return File(media, known.seconds, known.size)
