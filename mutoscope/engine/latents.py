"""Latents on disk and as rough pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE
from mutoscope.errors import FileError
from mutoscope.request import FramesHWC, GenerationRequest

KEY = "latents"
_HINT = "Expected latents saved by `mutoscope generate`."


def shape(channels: int, request: GenerationRequest, n_references: int) -> tuple[int, int, int, int, int]:
    """[1, C, R + 1 + (F-1)/4, H/8, W/8] of a planned request; reference pictures take latent frames of their own."""
    assert request.width is not None and request.height is not None and request.frames is not None  # noqa: PT018
    n_frames = n_references + 1 + (request.frames - 1) // TEMPORAL_STRIDE
    return (1, channels, n_frames, request.height // SPATIAL_STRIDE, request.width // SPATIAL_STRIDE)


def save(path: Path, latents_BZFHW: Tensor, info: dict[str, Any]) -> None:
    """Write latents and what made them; the file appears complete or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {KEY: latents_BZFHW.float().cpu().contiguous()}, part, metadata={"mutoscope": json.dumps(info)}
        )
        part.replace(path)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise FileError(f"{path}: the latents cannot be written ({error}).") from error


def load(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Latents [1, Z, F', h, w] and their info. Raises FileError if the file is not one that `save` wrote."""
    if not path.is_file():
        raise FileError(f"{path}: no such file.", hint=_HINT)
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {}).get("mutoscope", "{}"))
            if KEY not in file.keys():  # noqa: SIM118 - not a mapping
                raise FileError(f"{path}: holds no tensor {KEY!r}.", hint=_HINT)
            latents = file.get_tensor(KEY)
    except (SafetensorError, ValueError, OSError) as error:
        raise FileError(f"{path}: not a latents file ({error}).", hint=_HINT) from error
    if latents.ndim != 5 or latents.shape[0] != 1 or not latents.is_floating_point():
        got = f"{latents.dtype} {list(latents.shape)}".removeprefix("torch.")
        raise FileError(f"{path}: latents are {got}, float32 [1, Z, F, H, W] expected.", hint=_HINT)
    return latents, info if isinstance(info, dict) else {}


def preview(clean_BZFHW: Tensor, rgb: tuple[tuple[float, ...], ...]) -> FramesHWC:
    """A linear guess of the picture: uint8 [F', h, w, 3]. `rgb` has a row of 3 per channel, then the offsets."""
    table = torch.tensor(rgb, device=clean_BZFHW.device)
    pixels = torch.einsum("zfhw,zc->fhwc", clean_BZFHW[0].float(), table[:-1]) + table[-1]
    return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
