"""What the text encoder made of the prompts that come with models, on disk, so that it need not be made again.

The usual negative prompt is as long as several prompts, and the same in nearly every call. Only prompts of a model's
own defaults are kept, nothing that a user wrote. A file per prompt, float32 [1, L, E] as .npy, named by what it
depends on; the least used go when there are too many. A file that cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutoscope.catalog import default_cache_dir

ARITHMETIC = 2
"""To be raised when the encoder's numbers change in rounding."""
MAX_BYTES = 64 << 20
"""Of all files together; one of 140 tokens and 4,096 numbers each has 2.3 MB."""


@dataclass(frozen=True)
class TextCache:
    """The files of a folder, which appears with the first of them."""

    folder: Path
    max_bytes: int = MAX_BYTES

    def read(self, name: str) -> Tensor | None:
        """Rows float32 [1, L, E], or None if there are none."""
        path = self._path(name)
        try:
            rows = np.load(path, allow_pickle=False)
            os.utime(path)
        except (OSError, ValueError, EOFError):
            return None
        if rows.dtype != np.float32 or rows.ndim != 3 or len(rows) != 1 or not np.isfinite(rows).all():
            return None
        return torch.from_numpy(rows)

    def write(self, name: str, rows: Tensor) -> None:
        """Keep them, and drop what was not used for longest beyond `max_bytes`."""
        path = self._path(name)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as stream:
                    np.save(stream, rows.float().cpu().numpy())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            self._prune()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _prune(self) -> None:
        found = [(p.stat().st_mtime_ns, p.stat().st_size, p) for p in self.folder.glob("*.npy")]
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)


def name_of(encoder: Path, prompt: str, **how: object) -> str:
    """A name that changes with the encoder's file, with the cleaned prompt, and with how it is computed."""
    stat = encoder.stat()
    told: Mapping[str, object] = {
        "file": str(encoder.resolve()),
        "size": stat.st_size,
        "changed": stat.st_mtime_ns,
        "prompt": prompt,
        "arithmetic": ARITHMETIC,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        **how,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def default_text_cache() -> TextCache | None:
    """The user's; None if it is switched off (see `catalog.default_cache_dir`)."""
    folder = default_cache_dir()
    return None if folder is None else TextCache(folder / "text")
