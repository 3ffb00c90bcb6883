"""SHA-256 of files, remembered as long as a file stays what it is."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mutoscope.errors import FileError

Identity = tuple[Path, int, int]
"""Absolute path, size, time of the last change: another one means another content."""


def identity(path: str | Path) -> Identity:
    """Raises FileError if there is no such file."""
    path = Path(path).absolute()
    try:
        stat = path.stat()
    except OSError as error:
        raise FileError(f"{path} cannot be opened: {error.strerror or error}") from error
    return path, stat.st_size, stat.st_mtime_ns


def sha256_of(path: str | Path) -> str:
    """Hexadecimal digits. Reads the whole file the first time.

    Raises:
        FileError: it is missing or cannot be read.
    """
    return _sha256(identity(path))


@lru_cache(maxsize=256)
def _sha256(of: Identity) -> str:
    try:
        with of[0].open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{of[0]} cannot be read: {error.strerror or error}") from error
