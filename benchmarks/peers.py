"""`diffusers` with the same weight files, as its documentation says to load them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutoscope.engine.vae import VAEConfig
from mutoscope.engine.wan import WanConfig


def load_transformer(path: Path, config: WanConfig, dtype: torch.dtype) -> nn.Module:
    """GGUF in, computing in `dtype`. The config folder is what it would otherwise download."""
    diffusers = _diffusers()
    options = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.n_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.n_layers,
        "ffn_dim": config.ffn_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
    }
    model = diffusers.WanTransformer3DModel.from_single_file(
        str(path),
        config=_config_folder(path, options),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
    )
    return model.eval().requires_grad_(False)


def load_vae(path: Path, config: VAEConfig, dtype: torch.dtype) -> nn.Module:
    options = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.base_dim,
        "z_dim": config.z_dim,
        "dim_mult": [width // config.base_dim for width in config.widths],
        "num_res_blocks": config.n_res_blocks,
        "temperal_downsample": list(config.temporal),
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
    }
    model = _diffusers().AutoencoderKLWan.from_single_file(
        str(path), config=_config_folder(path, options), torch_dtype=dtype
    )
    return model.eval().requires_grad_(False)


def channels_last(vae: nn.Module) -> nn.Module:
    """With its weights in the layout that is faster here; not what its users get by default."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def padded_text(rows_BSE: Tensor, n_rows: int = 512) -> Tensor:
    """The text as its pipeline hands it over: zeros up to 512 rows."""
    return nn.functional.pad(rows_BSE, (0, 0, 0, n_rows - rows_BSE.shape[1]))


def denormalised(latents_BZFHW: Tensor, config: VAEConfig) -> Tensor:
    """Latents as its VAE wants them; ours does this itself."""
    shape = (1, -1, 1, 1, 1)
    return latents_BZFHW * torch.tensor(config.std).view(shape) + torch.tensor(config.mean).view(shape)


def _diffusers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _config_folder(path: Path, options: dict[str, Any]) -> str:
    folder = path.with_suffix(".config")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    return str(folder)
