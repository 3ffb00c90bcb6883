"""Write a model file of random weights: any configuration, any type, the size and layout of the real ones.

    python scripts/make_random_model.py vace-14b /var/tmp/vace.gguf --type Q4_K_M        # 12.1 GB
    python scripts/make_random_model.py vae vae.safetensors --type F16

For measuring speed and memory and for testing loaders. A text encoder comes with a tokenizer of made-up words. Blocks
are drawn at random from a small quantised pool, so that 17 billion weights take as long as writing the file; memory
holds one tensor. Matrices are scaled by their fan-in: activations stay finite and near 1, and nothing else about the
outputs means anything.
"""

from __future__ import annotations

import argparse
import json
import string
import struct
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mutoscope.catalog import OFFICIAL_NEGATIVE_PROMPT
from mutoscope.engine.gguf import BLOCKS, GGMLType, nbytes
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.quantize import BASE, FILE_TYPE, architecture_of, mixture
from mutoscope.engine.quants import quantize
from mutoscope.engine.umt5 import UMT5Config, UMT5Encoder
from mutoscope.engine.vae import VAEConfig, WanVAE
from mutoscope.engine.wan import WanConfig, WanModel

_SMALL = dict(dim=1536, ffn_dim=8960, n_heads=12, n_layers=30)
_LARGE = dict(dim=5120, ffn_dim=13824, n_heads=40, n_layers=40)
_WAN = dict(in_dim=16, out_dim=16, text_dim=4096, freq_dim=256)

CONFIGS: dict[str, WanConfig | UMT5Config | VAEConfig] = {
    "t2v-1.3b": WanConfig(**_SMALL, **_WAN),
    "vace-1.3b": WanConfig(**_SMALL, **_WAN, vace_layers=tuple(range(0, 30, 2)), vace_in_dim=96),
    "t2v-14b": WanConfig(**_LARGE, **_WAN),
    "vace-14b": WanConfig(**_LARGE, **_WAN, vace_layers=tuple(range(0, 40, 5)), vace_in_dim=96),
    "umt5-xxl": UMT5Config(
        vocab_size=256384, dim=4096, ffn_dim=10240, n_layers=24, n_heads=64, head_dim=64, n_buckets=32
    ),
    "vae": VAEConfig(96, 16, (96, 192, 384, 384), 2, (False, True, True)),
}
"""The published sizes."""

POOL_UNITS = 4096
UNIT = 256
"""Weights that are drawn together: one block of the K types, several of the others."""

_SAFETENSORS = {GGMLType.F32: "F32", GGMLType.F16: "F16", GGMLType.BF16: "BF16"}


def write_random_model(
    config: WanConfig | UMT5Config | VAEConfig,
    path: Path,
    type_name: str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the file; its name's ending, .gguf or .safetensors, decides the kind."""
    with torch.device("meta"):
        model = _model(config)
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    types = mixture(type_name, shapes)
    weights = _Weights(seed)
    make = {name: partial(weights.draw, name, shape, types[name]) for name, shape in shapes.items()}
    if path.suffix == ".safetensors":
        _write_safetensors(path, shapes, types, make)
        return
    metadata = {
        "general.architecture": architecture_of(shapes),
        **_metadata(config, shapes),
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPE[type_name],
    }
    writer = GGUFWriter(path, metadata)
    for name, shape in shapes.items():
        writer.add(name, shape, types[name], make[name])
    writer.write(progress)


def _model(config: WanConfig | UMT5Config | VAEConfig) -> nn.Module:
    if isinstance(config, WanConfig):
        return WanModel(config)
    return UMT5Encoder(config) if isinstance(config, UMT5Config) else WanVAE(config)


def _metadata(
    config: WanConfig | UMT5Config | VAEConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Published Wan files say nothing about themselves, so these neither, unless shapes do not tell all."""
    if isinstance(config, UMT5Config):
        return {**config.metadata, **made_up_tokenizer(config.vocab_size)}
    return {} if type(config).from_tensors(shapes, {}) == config else config.metadata


def made_up_tokenizer(vocab_size: int, seed: int = 0) -> dict[str, Any]:
    """`tokenizer.ggml.*` of so many pieces: the characters of the usual prompts, then random words. No meaning."""
    rng = np.random.default_rng(seed)
    pieces = ["<pad>", "</s>", "<s>", "<unk>", "▁"]
    pieces += sorted(
        set(string.ascii_letters + string.digits + string.punctuation + OFFICIAL_NEGATIVE_PROMPT)
    )
    letters = np.array(list("▁" + string.ascii_lowercase))
    known = set(pieces)
    while len(pieces) < vocab_size:
        lengths = rng.integers(2, 11, vocab_size)
        drawn = letters[rng.integers(0, len(letters), (vocab_size, 10))]
        drawn[:, 1:] = np.where(drawn[:, 1:] == "▁", "e", drawn[:, 1:])  # words begin there, and nowhere else
        words = ("".join(word[:n]) for word, n in zip(drawn.tolist(), lengths.tolist(), strict=True))
        new = [word for word in dict.fromkeys(words) if word not in known]
        known.update(new)
        pieces += new
    types = np.ones(vocab_size, np.int32)
    types[:4] = 3, 3, 3, 2
    values = {
        "model": "t5",
        "tokens": pieces[:vocab_size],
        "scores": np.linspace(-1, -20, vocab_size, dtype=np.float32),
        "token_type": types,
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "eos_token_id": 1,
        "padding_token_id": 0,
        "unknown_token_id": 3,
    }
    return {"tokenizer.ggml." + name: value for name, value in values.items()}


class _Weights:
    """Packed random numbers for one tensor after the other."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._pools: dict[tuple[GGMLType, float, float], np.ndarray] = {}

    def draw(self, name: str, shape: tuple[int, ...], type_id: GGMLType) -> np.ndarray:
        """uint8 [nbytes]"""
        pool = self._pool(type_id, *_mean_and_deviation(name, shape))
        n_bytes = nbytes(type_id, shape)
        units = self.rng.integers(0, POOL_UNITS, -(-n_bytes // pool.shape[1]))
        return pool[units].reshape(-1)[:n_bytes]

    def _pool(self, type_id: GGMLType, mean: float, deviation: float) -> np.ndarray:
        """uint8 [POOL_UNITS, bytes of a unit]"""
        key = (type_id, mean, deviation)
        if key not in self._pools:
            noise = self.rng.standard_normal((POOL_UNITS, UNIT), np.float32)
            numbers = torch.from_numpy(mean + deviation * noise)
            self._pools[key] = quantize(type_id, numbers).numpy()
            assert self._pools[key].shape[1] == UNIT // BLOCKS[type_id].elements * BLOCKS[type_id].nbytes
        return self._pools[key]


def _mean_and_deviation(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Norms near one, matrices and convolutions by their fan-in, the rest small."""
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return 1.0, 0.1
    if len(shape) > 1 and name.endswith("weight"):
        fan_in = float(np.prod(shape[1:]))
        return 0.0, 1.0 if name.startswith("token_embd") else fan_in**-0.5
    return 0.0, 0.1


def _write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, GGMLType],
    make: Mapping[str, Callable[[], np.ndarray]],
) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        if types[name] not in _SAFETENSORS:
            raise SystemExit(f"safetensors holds {', '.join(_SAFETENSORS.values())}, not {types[name].name}")
        start, end = end, end + nbytes(types[name], shape)
        dtype = _SAFETENSORS[types[name]]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for name in shapes:
            stream.write(make[name]().data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("path", type=Path, help="a .gguf or .safetensors file to write")
    parser.add_argument("--type", default="Q4_K_M", choices=BASE, help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="fewer layers (transformers only)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = CONFIGS[args.config]
    if args.layers:
        config = with_layers(config, args.layers)
    start = time.perf_counter()
    write_random_model(config, args.path, args.type, seed=args.seed)
    seconds = time.perf_counter() - start
    print(f"{args.path}: {args.path.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s")


def with_layers(config: WanConfig | UMT5Config | VAEConfig, n_layers: int) -> WanConfig | UMT5Config:
    """The same width with fewer blocks."""
    if isinstance(config, VAEConfig):
        raise SystemExit("the VAE has no layers to leave out")
    changes: dict[str, Any] = {"n_layers": n_layers}
    if isinstance(config, WanConfig):
        changes["vace_layers"] = tuple(i for i in config.vace_layers if i < n_layers)
    return type(config)(**{**vars(config), **changes})


if __name__ == "__main__":
    main()
