"""Bring the shipped starter back into the training folder, so that training goes on from exported weights.

    python -m training.restore mutoscope/pocket runs

Writes `runs/dit.pt`, `runs/vae.pt`, `runs/tokenizer.pt` and `runs/code.pt`. What exists only in training (the attribute
heads) starts anew, as every optimiser does; Q8_0 rounding is undone by the first few hundred steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mutoscope.engine.gguf import GGUFFile
from mutoscope.engine.quants import as_tensor, dequantize
from training import pca, train_dit, train_vae

LINEAR_CODE = Path(__file__).with_name("linear_code.pt")


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file in float32."""
    with GGUFFile(path) as file:
        return {
            name: dequantize(info.type_id, as_tensor(file.data(name)).clone()).reshape(info.shape)
            for name, info in file.tensors.items()
        }


def restore_dit(model: Path) -> dict[str, Tensor]:
    """The state of `train_dit.Starter`, with fresh heads."""
    starter = train_dit.Starter()
    starter.dit.load_state_dict(tensors(model / "dit.gguf"))
    starter.text.load_state_dict(tensors(model / "text.gguf"))
    return starter.state_dict()


def restore_vae(model: Path) -> dict[str, Tensor]:
    """The state of the VAE as trained: without the temporal taps that export adds as zeros."""
    shapes = {name: w.shape for name, w in train_vae.build().state_dict().items()}
    out = {}
    for name, w in tensors(model / "vae.gguf").items():
        if w.dim() == 5 and w.shape != shapes[name]:
            w = w[:, :, -shapes[name][2] :]
        out[name] = w.reshape(shapes[name])
    return out


def restore_tokenizer(model: Path) -> dict:
    """The tokenizer's metadata as `train_dit.tokenizer_metadata` keeps it."""
    with GGUFFile(model / "text.gguf") as file:
        return {key: file.metadata[key] for key in file.metadata if key.startswith("tokenizer.")}


def restore(model: Path, runs: Path) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": restore_dit(model), "vace": True}, runs / "dit.pt")
    torch.save(restore_vae(model), runs / "vae.pt")
    torch.save(restore_tokenizer(model), runs / "tokenizer.pt")
    pca.LinearCode.load(LINEAR_CODE).save(runs / "code.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring the shipped starter back into the training folder.")
    parser.add_argument("model", type=Path)
    parser.add_argument("runs", type=Path)
    a = parser.parse_args()
    restore(a.model, a.runs)


if __name__ == "__main__":
    main()
