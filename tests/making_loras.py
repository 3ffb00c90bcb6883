"""LoRA files for tests, made of what a model's file says of its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mutoscope.engine.headers import read_header

LAYERS = ("blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.1.cross_attn.v", "blocks.1.ffn.2")


def make_lora(
    path: Path,
    dit: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    size: float = 1.0,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Random pairs for a few layers of the transformer `dit` (official names), that change each about as much as
    `size` times what it is."""
    rng, shapes = np.random.default_rng(seed), read_header(dit).tensors
    tensors: dict[str, np.ndarray] = {}
    for name in LAYERS:
        n, k = shapes[f"{name}.weight"].shape
        tensors[f"diffusion_model.{name}.lora_A.weight"] = rng.standard_normal((rank, k), np.float32) / k**0.5
        tensors[f"diffusion_model.{name}.lora_B.weight"] = (
            size * rng.standard_normal((n, rank), np.float32) / rank**0.5
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.astype(np.float32) for name, t in tensors.items()}, path, metadata=metadata)
    return path
