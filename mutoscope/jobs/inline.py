"""Files that come inside of a request: data URIs, checked before anything is written.

What counts is the content. The declared type must be of the same kind, and nothing else is taken from it.
`InputRefused.reason` is the short sentence that vendors' APIs give for the same thing.
"""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mutoscope.errors import MediaError
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.media import sandbox, sniff

InputKind = Literal["image", "video"]
ANY: tuple[InputKind, ...] = ("image", "video")
MAX_BYTES = 16 * 2**20

INVALID_DATA_URI = "Invalid data URI."
UNSUPPORTED_TYPE = "Unsupported asset type."
TOO_LARGE = "Asset is too large."

_HEADER = re.compile(
    r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?(?P<params>(;[\w.+-]+=[\w.+-]+)*)(?P<base64>;base64)?",
    re.IGNORECASE | re.ASCII,
)
_ANIMATIONS = ("image/gif", "image/png", "image/webp", "image/avif")


class InputRefused(InvalidRequest):
    """A picture or clip in a request that cannot be used."""

    def __init__(self, message: str, *, reason: str, field: str = "", hint: str = "") -> None:
        super().__init__(message, field=field, hint=hint)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Inline:
    """A checked file: its bytes, and what they hold by their content."""

    data: bytes
    probed: sandbox.Probed

    @property
    def mime(self) -> str:
        return self.probed.mime

    @property
    def kind(self) -> InputKind:
        """An animation counts as a picture here; it is taken for a clip where one is expected."""
        return "video" if self.probed.kind == "video" else "image"


def is_data_uri(uri: str) -> bool:
    return uri[:5].lower() == "data:"


def decode(
    uri: str,
    *,
    kinds: Collection[InputKind] = ANY,
    max_bytes: int = MAX_BYTES,
    types: Collection[str] = (),
    field: str = "",
) -> Inline:
    """A data URI as a checked file. Takes some milliseconds and a process: not to be called in a transaction.

    kinds      what is expected; an animation (GIF, WebP) is both
    max_bytes  of the decoded file
    types      media types to take; empty: all that can be read
    field      name of the field in the caller's spelling, for messages

    Raises:
        InputRefused: not a base64 data URI, too large, not of an expected kind, damaged or hostile.
    """
    header, comma, payload = uri.partition(",")
    found = _HEADER.fullmatch(header) if len(header) <= 256 else None
    if not comma or found is None or found["base64"] is None:
        raise InputRefused(
            _say(field, "is not a data URI of the form data:<type>;base64,<data>"),
            reason=INVALID_DATA_URI, field=field,
        )  # fmt: skip
    if len(payload) > (max_bytes + 2) // 3 * 4:
        raise _too_large(len(payload) // 4 * 3, max_bytes, field)
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputRefused(
            _say(field, f"holds no valid base64 after the comma ({e})"),
            reason=INVALID_DATA_URI, field=field, hint="Use the standard alphabet with padding, without line breaks.",
        ) from e  # fmt: skip
    declared = (found["mime"] or "").lower()
    return check(data, kinds=kinds, max_bytes=max_bytes, types=types, field=field, declared=declared)


def check(
    data: bytes,
    *,
    kinds: Collection[InputKind] = ANY,
    max_bytes: int = MAX_BYTES,
    types: Collection[str] = (),
    field: str = "",
    declared: str | None = None,
) -> Inline:
    """The same for bytes, for example of a form field; `declared` is the sender's opinion of their type."""
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes, field)
    if not data:
        raise InputRefused(_say(field, "is empty"), reason=INVALID_DATA_URI, field=field)
    mime = sniff.mime_of(data[: sniff.HEAD_BYTES])
    if declared is not None and declared.partition("/")[0] not in (mime.partition("/")[0], ""):
        raise InputRefused(
            _say(field, f"is declared as {declared}, but holds {mime or 'no picture or clip'}"),
            reason=UNSUPPORTED_TYPE, field=field,
        )  # fmt: skip
    refuse_type(mime, kinds=kinds, types=types, field=field)
    with tempfile.TemporaryDirectory(prefix="mutoscope-input-") as folder:
        path = Path(folder) / f"input{sniff.extension(mime)}"
        path.write_bytes(data)
        probed = probe(path, field=field)
    refuse_kind(probed, kinds=kinds, field=field)
    return Inline(data=data, probed=probed)


def probe(path: Path, *, field: str = "") -> sandbox.Probed:
    """What a file holds; a file that cannot be used is the sender's fault.

    Raises:
        InputRefused: it cannot be opened.
    """
    try:
        return sandbox.probe(path)
    except MediaError as e:
        text = e.message.rstrip(".")
        raise InputRefused(_say(field, text), reason=UNSUPPORTED_TYPE, field=field, hint=e.hint) from e


def refuse_type(
    mime: str, *, kinds: Collection[InputKind], types: Collection[str] = (), field: str = ""
) -> None:
    """Raise if a file of this type cannot be meant; before it is opened."""
    expected = (
        ", ".join(types)
        if types
        else " or ".join(f"a{'n' if k == 'image' else ''} {k}" for k in sorted(kinds))
    )
    if not mime:
        raise InputRefused(
            _say(field, f"holds no picture or clip that can be read; {expected} expected"),
            reason=UNSUPPORTED_TYPE, field=field, hint=sniff.EXPECTED,
        )  # fmt: skip
    is_kind = mime.partition("/")[0] in kinds or ("video" in kinds and mime in _ANIMATIONS)
    if (types and mime not in types) or not is_kind:
        raise InputRefused(
            _say(field, f"holds {mime}; {expected} expected"), reason=UNSUPPORTED_TYPE, field=field
        )


def refuse_kind(probed: sandbox.Probed, *, kinds: Collection[InputKind], field: str = "") -> None:
    """Raise if what a file turned out to hold is not what is expected."""
    fits = {"image": "image" in kinds, "video": "video" in kinds, "animation": True}[probed.kind]
    if not fits:
        expected = "a clip" if probed.kind == "image" else "a picture"
        got = "a still picture" if probed.kind == "image" else "a clip"
        raise InputRefused(
            _say(field, f"holds {got} ({probed.mime}), {expected} expected"),
            reason=UNSUPPORTED_TYPE,
            field=field,
        )


def _too_large(size: int, max_bytes: int, field: str) -> InputRefused:
    return InputRefused(
        _say(field, f"has {size / 2**20:.1f} MiB, at most {max_bytes / 2**20:.1f} MiB expected"),
        reason=TOO_LARGE, field=field, hint="Upload the file first, or name it by URL.",
    )  # fmt: skip


def _say(field: str, text: str) -> str:
    return f"{field or 'The file'} {text}."
