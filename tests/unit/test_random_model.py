"""Random model files load, compute finite numbers of sensible size, and say of themselves what real ones say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mutoscope.engine.gguf import GGUFFile
from mutoscope.engine.vae import VAEConfig
from mutoscope.engine.wan import WanConfig, rope_table
from mutoscope.engine.weights import load_vae, load_wan
from scripts.make_random_model import CONFIGS, with_layers, write_random_model

SMALL = WanConfig(
    dim=256, ffn_dim=512, n_heads=2, n_layers=3, in_dim=16, out_dim=16, text_dim=64, freq_dim=32,
    vace_layers=(0, 2), vace_in_dim=96,
)  # fmt: skip


@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q8_0", "BF16"])
@torch.inference_mode()
def test_transformer(tmp_path: Path, type_name: str) -> None:
    write_random_model(SMALL, tmp_path / "dit.gguf", type_name)
    model = load_wan(tmp_path / "dit.gguf")
    assert model.config == SMALL
    x = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    text, time = model.text_context(torch.randn(1, 4, 64), [4]), model.time_modulation(torch.tensor([700.0]))
    velocity = model(x, time, text, rope_table((2, 4, 4), 128), model.vace_tokens(x.repeat(1, 6, 1, 1, 1)))
    assert 0.1 < velocity.std() < 10


@torch.inference_mode()
def test_vae_in_both_kinds_of_file(tmp_path: Path) -> None:
    config = VAEConfig(8, 16, (8, 16, 32, 32), 2, (False, True, True))
    frames = []
    for name in ("vae.gguf", "vae.safetensors"):
        write_random_model(config, tmp_path / name, "F16")
        frames.append(load_vae(tmp_path / name).decode(torch.ones(1, 16, 2, 2, 2)))
    assert frames[0].shape == (1, 3, 5, 16, 16)
    torch.testing.assert_close(frames[0], frames[1])


def test_published_shapes_need_no_metadata_and_others_have_it(tmp_path: Path) -> None:
    path = tmp_path / "dit.gguf"
    write_random_model(with_layers(CONFIGS["vace-1.3b"], 1), path, "Q3_K_S")
    with GGUFFile(path) as file:
        assert set(file.metadata) == {
            "general.architecture",
            "general.quantization_version",
            "general.file_type",
        }
    write_random_model(SMALL, path, "Q8_0")
    with GGUFFile(path) as file:
        assert list(file.metadata["wan.vace.layers"]) == [0, 2]
