"""Write the trained starter as the GGUF files that ship in the package.

    python -m training.export runs mutoscope/pocket

Into another folder it writes a whole model, which `--model FOLDER` takes. Matrices of the transformer and the text
encoder become Q8_0, other matrices and all convolutions F16, vectors F32.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mutoscope
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.quants import quantize
from mutoscope.engine.vae import VAEConfig
from training import captions, data, pca, train_dit, train_vae

POCKET, MANIFEST = Path(mutoscope.__file__).parent / "pocket", "model.toml"
QUANTISED = ("blocks.", "vace_blocks.", "enc.blk.", "token_embd", "time_projection")


def storage(name: str, tensor: Tensor) -> GGMLType:
    """The type of one tensor."""
    if tensor.dim() == 1 or "modulation" in name or "gamma" in name or "rel_b" in name:
        return GGMLType.F32
    if tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and name.startswith(QUANTISED):
        return GGMLType.Q8_0
    return GGMLType.F16


def write(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> int:
    """One file; returns its size in bytes."""
    writer = GGUFWriter(path, {"general.quantization_version": 2, **metadata})
    for name, tensor in weights.items():
        kind = storage(name, tensor)
        writer.add(name, tuple(tensor.shape), kind, quantize(kind, tensor.float().contiguous()).numpy())
    writer.write()
    return path.stat().st_size


def with_all_taps(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE weights in the official shapes: convolutions trained without temporal taps get zeros for them."""
    out = {}
    for name, w in weights.items():
        if w.dim() == 5 and w.shape[2] == 1 and w.shape[3] == 3:
            w = torch.cat((torch.zeros_like(w), torch.zeros_like(w), w), dim=2)
        out[name] = w
    return out


def preview_colours(code: pca.LinearCode, clips: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Least-squares colours of latent cells: a row of RGB per channel and one of offsets."""
    video = torch.from_numpy(np.array(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    z = code.encode(video[:, :, :1]).permute(0, 2, 3, 4, 1).flatten(0, 3)
    mean = torch.nn.functional.avg_pool2d(video[:, :, 0], 8).permute(0, 2, 3, 1).flatten(0, 2)
    design = torch.cat((z, torch.ones(len(z), 1)), dim=1)
    solution = torch.linalg.lstsq(design, mean).solution
    return tuple(tuple(round(v, 4) for v in row) for row in solution.tolist())


def export(runs: Path, root: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(runs / "dit.pt", weights_only=True)
    model = train_dit.Starter()
    model.load_state_dict(saved["weights"])
    if not saved["vace"]:
        model.start_vace()
    code = pca.LinearCode.load(runs / "code.pt")
    shards = data.shards(root, "clips", most=2)
    config: VAEConfig = replace(train_vae.CONFIG, rgb=preview_colours(code, shards[0].frames[:256]))
    tokenizer = train_dit.tokenizer_metadata(runs, root)
    about = {"general.name": "Mutoscope pocket", "general.license": "apache-2.0"}
    sizes = {
        "dit.gguf": write(out / "dit.gguf", model.dit.state_dict(),
                          {"general.architecture": "wan", **about, **train_dit.DIT.metadata}),
        "text.gguf": write(out / "text.gguf", model.text.state_dict(),
                           {**model.text.config.metadata, **about, **tokenizer}),
        "vae.gguf": write(out / "vae.gguf", with_all_taps(torch.load(runs / "vae.pt", weights_only=True)),
                          {"general.architecture": "wan_vae", **about, **config.metadata}),
    }  # fmt: skip
    (out / "vocabulary.json").write_text(json.dumps(captions.vocabulary()))
    if not (out / MANIFEST).exists():  # a folder to try, not the package's
        shutil.copy(POCKET / MANIFEST, out)
    for name, size in sizes.items():
        print(f"{name} {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the trained starter as GGUF files.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    a = parser.parse_args()
    export(a.runs, a.data, a.out)


if __name__ == "__main__":
    main()
