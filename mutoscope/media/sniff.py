"""What a file is by its first bytes. Names and declared types are not asked: they are the sender's opinion."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 4096
EXPECTED = "Expected: JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF; MP4, MOV, WebM, MKV, AVI."

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"FLV\x01", "video/x-flv"),
    (b"OggS", "video/ogg"),
    (b"\x00\x00\x01\xba", "video/mpeg"),
    (b"\x00\x00\x01\xb3", "video/mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video/x-ms-wmv"),
)
_STILL_BRANDS = (b"avif", b"avis")
_PICTURE_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"crx ")  # not readable here
_QUICKTIME_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
EXTENSIONS = {
    "image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp", "image/gif": ".gif", "image/bmp": ".bmp",
    "image/tiff": ".tiff", "image/avif": ".avif", "video/mp4": ".mp4", "video/quicktime": ".mov",
    "video/webm": ".webm", "video/x-matroska": ".mkv", "video/x-msvideo": ".avi", "video/x-flv": ".flv",
    "video/ogg": ".ogv", "video/mpeg": ".mpg", "video/x-ms-wmv": ".wmv", "video/mp2t": ".ts",
}  # fmt: skip


def mime_of(head: bytes) -> str:
    """The type that the first bytes of a file speak for; empty for everything that is not a picture or a clip."""
    for start, mime in _STARTS:
        if head.startswith(start):
            return mime
    if head[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}.get(head[8:12], "")
    if head[:4] == b"\x1aE\xdf\xa3":
        return "video/webm" if b"webm" in head[:64] else "video/x-matroska"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _STILL_BRANDS:
            return "image/avif"
        if brand in _PICTURE_BRANDS:
            return "image/avif" if b"avif" in head[16:64] else ""
        return "video/quicktime" if brand == b"qt  " else "video/mp4"
    if head[4:8] in _QUICKTIME_ATOMS:
        return "video/quicktime"
    if len(head) > 188 and head[0] == 0x47 and head[188] == 0x47:
        return "video/mp2t"
    return ""


def mime_of_file(path: Path) -> str:
    """The type of a file by its content; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return mime_of(file.read(HEAD_BYTES))
    except OSError:
        return ""


def extension(mime: str) -> str:
    """The usual ending of a name, with its dot."""
    return EXTENSIONS.get(mime, ".bin")
