"""A complete model set of some hundred kilobytes with seeded random weights: tests need no training.

    folder = make_tiny_model(tmp_path)          # model.toml, dit.gguf, text.gguf, vae.gguf, vocabulary.json
    Engine(folder).generate("a red ball", seed=1)

Its videos are noise; everything else (files, loader, tokenizer, VACE branch, memory) is as in the real sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.umt5 import UMT5Config, UMT5Encoder
from mutoscope.engine.vae import VAEConfig, WanVAE
from mutoscope.engine.wan import WanConfig, WanModel
from mutoscope.manifest import (
    MANIFEST,
    Defaults,
    Limits,
    ModelFile,
    ModelFiles,
    ModelManifest,
    write_manifest,
)
from training.make_tokenizer import train_tokenizer

Z_DIM = 4
WORDS = ("a red ball falls and bounces", "a blue square moves left on a white background")
DIT = WanConfig(
    dim=32, ffn_dim=64, n_heads=2, n_layers=2, in_dim=Z_DIM, out_dim=Z_DIM, text_dim=32, freq_dim=32,
    vace_layers=(0,), vace_in_dim=2 * Z_DIM + 64,
)  # fmt: skip
TEXT_ONLY_DIT = WanConfig(**{**vars(DIT), "vace_layers": (), "vace_in_dim": 0})
TEXT = UMT5Config(vocab_size=128, dim=32, ffn_dim=64, n_layers=1, n_heads=2, head_dim=16, n_buckets=8)
VAE = VAEConfig(
    8, Z_DIM, (8, 8, 8, 8), 1, (False, True, True), mean=(0.0,) * Z_DIM, std=(1.0,) * Z_DIM,
    rgb=((0.3, 0.1, 0.0), (0.0, 0.3, 0.1), (0.1, 0.0, 0.3), (0.2, 0.2, 0.2), (0.0, 0.0, 0.0)),
)  # fmt: skip
DEFAULTS = Defaults(
    steps=4,
    guidance=2.0,
    shift=3.0,
    sampler="unipc",
    width=32,
    height=32,
    frames=5,
    fps=8.0,
    negative_prompt="blurred",
)


def make_tiny_model(parent: Path, name: str = "tiny", *, vace: bool = True, seed: int = 0) -> Path:
    """The folder of a new model set `parent/name`; without VACE it follows text only."""
    folder = parent / name
    folder.mkdir(parents=True)
    dit = DIT if vace else TEXT_ONLY_DIT
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer(WORDS, TEXT.vocab_size)
    parts: dict[str, tuple[nn.Module, Mapping[str, Any]]] = {
        "dit": (WanModel(dit), {"general.architecture": "wan", **dit.metadata}),
        "text": (UMT5Encoder(TEXT), {**TEXT.metadata, **tokenizer}),
        "vae": (WanVAE(VAE), {"general.architecture": "wan_vae", **VAE.metadata}),
    }
    for file, (module, metadata) in parts.items():
        _write(folder / f"{file}.gguf", module, metadata, generator)
    words = sorted({word for line in WORDS for word in line.split()})
    (folder / "vocabulary.json").write_text(json.dumps(words))
    manifest = ModelManifest(
        name=name,
        title="Random weights for tests",
        licence="Apache-2.0",
        files=ModelFiles(
            dit=ModelFile(path=folder / "dit.gguf"),
            text_encoder=ModelFile(path=folder / "text.gguf"),
            vae=ModelFile(path=folder / "vae.gguf"),
            vocabulary=ModelFile(path=folder / "vocabulary.json"),
        ),
        defaults=DEFAULTS,
        sizes=((32, 32),),
        limits=Limits(max_frames=33, max_pixels=128 * 128),
    )
    write_manifest(manifest, folder / MANIFEST)
    return folder


def _write(path: Path, module: nn.Module, metadata: Mapping[str, Any], generator: torch.Generator) -> None:
    writer = GGUFWriter(path, metadata)
    for name, parameter in module.state_dict().items():
        values = _values(name, parameter, generator)
        writer.add(name, tuple(values.shape), GGMLType.F32, values.numpy())
    writer.write()


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep activations near 1: norms near one, matrices by their fan-in, the rest small."""
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return 1 + 0.1 * noise
    if like.ndim >= 2 and name.endswith("weight"):
        return noise / like[0].numel() ** 0.5
    return 0.1 * noise
