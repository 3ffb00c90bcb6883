"""LoRA files: every way in which the community names its keys, brought to the parameters of our transformer.

    lora = read_lora(path)                 # keys sorted into pairs, alphas and differences; values stay in the file
    changes = lora.changes(model)          # under our names, each shape checked, each key used

What a file may say of a layer, in any mixture:

    lora_A / lora_down / lora.down         the first product, [rank, in]: "down"
    lora_B / lora_up / lora.up             the second, [out, rank]: "up"; its own bias, PEFT's lora_B.bias
    alpha                                  the pair counts alpha / rank times, and once if there is none
    diff, diff_b, diff_m                   a difference of the whole weight, of the bias, of the modulation
    w_norm, b_norm                         LyCORIS' names for the first two

with or without `.weight`, with or without the name of an adapter in between (`lora_A.default.weight`), after any of
`lora_keys.PREFIXES` or with all dots of the layer's name as underscores (`lora_unet_blocks_0_self_attn_q`). The layer's
name is official (`blocks.0.self_attn.q`) or that of diffusers (`blocks.0.attn1.to_q`).

Sources: the converters of diffusers 0.42 (`loaders/lora_conversion_utils.py`), ComfyUI (`comfy/lora.py`), kijai's
WanVideoWrapper (`diff_m`), PEFT (adapter names, rank-stabilised scale). Not done, and refused by name: DoRA, LoHa,
LoKr, OFT and convolutions with a middle product.

Details that have caused bugs, here or elsewhere:
- alpha left out, or taken for 1 where it is missing: missing means alpha = rank;
- PEFT keeps alpha outside of the tensors: in the metadata that diffusers writes, or in adapter_config.json;
- `diff` keys skipped in silence (most of them are zeros, but not all: the norms of distilled models).
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutoscope.engine.lora_keys import placed, refused, sort_keys
from mutoscope.engine.weights import Stored, open_weights
from mutoscope.errors import WeightError


@dataclass(frozen=True, eq=False)
class Pair:
    """up [out, rank] times down [rank, in] times scale, to be added to a weight."""

    down: Stored
    up: Stored
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """down and up as float32 matrices, up scaled."""
        down = self.down.packed().values(torch.float32).flatten(1)
        return down, self.up.packed().values(torch.float32).flatten(1) * self.scale


@dataclass(frozen=True, eq=False)
class Difference:
    """To be added to a parameter; `scale` times."""

    values: Stored
    scale: float = 1.0

    def tensor(self) -> Tensor:
        return self.values.packed().values(torch.float32) * self.scale


@dataclass(eq=False)
class Changes:
    """What a file changes, under the names of our parameters ("blocks.0.self_attn.q.weight")."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    differences: dict[str, list[Difference]] = field(default_factory=dict)

    def nbytes(self, itemsize: int) -> int:
        """Of what a model keeps while it has them, in numbers of `itemsize`."""
        pairs = sum(pair.down.numel + pair.up.numel for pair in self.pairs.values())
        return itemsize * (pairs + sum(d.values.numel for ds in self.differences.values() for d in ds))


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An open LoRA file: parts of each target under the file's own name for it; see `changes`."""

    path: Path
    targets: Mapping[str, Mapping[str, Stored]]
    config: Mapping[str, Any]

    def changes(self, model: nn.Module) -> Changes:
        """Everything the file says, brought to `model`.

        Raises:
            WeightError: naming keys whose layer the model does not have, halves of pairs, or a wrong shape.
        """
        found = Changes()
        for change in placed(self.path.name, self.targets, _shapes(model)):
            scale = 1.0
            if change.pair is not None:
                scale = self._scale(change.stem, change.parts)
                found.pairs[change.weight] = Pair(*change.pair, scale)
            for part, parameter in change.differences.items():
                factor = scale if part == "up_bias" else 1.0
                found.differences.setdefault(parameter, []).append(Difference(change.parts[part], factor))
        return found

    def _scale(self, stem: str, parts: Mapping[str, Stored]) -> float:
        rank = parts["down"].shape[0] if parts["down"].shape else 1
        if "alpha" in parts:
            alpha = parts["alpha"].packed().values(torch.float32)
            if alpha.numel() != 1 or not bool(torch.isfinite(alpha).all()):
                raise refused(self.path.name, f"{parts['alpha'].name!r} is not one finite number")
            return float(alpha.flatten()[0]) / rank
        alpha_of = {**self.config.get("alpha_pattern", {})}
        stated = next((v for k, v in alpha_of.items() if stem.endswith(k) or fnmatch.fnmatch(stem, k)), None)
        stated = self.config.get("lora_alpha") if stated is None else stated
        if stated is None:
            return 1.0
        return float(stated) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_lora(path: str | Path) -> LoraFile:
    """Open a LoRA file. Only its header and names are read.

    Raises:
        FileError: the file is missing or damaged; WeightError: a key that no LoRA of a known kind has.
    """
    source = open_weights(path)
    targets = sort_keys(source.path.name, source.tensors.values())
    return LoraFile(source.path, targets, _peft_config(source.path, source.metadata))


def _peft_config(path: Path, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """PEFT's settings, from the metadata that diffusers writes or from the file beside the tensors; empty if none."""
    stated = metadata.get("lora_adapter_metadata")
    if isinstance(stated, dict):
        own = {k.removeprefix("transformer."): v for k, v in stated.items()}
        return {
            k: v
            for k, v in own.items()
            if k in ("lora_alpha", "use_rslora", "alpha_pattern") and v is not None
        }
    beside = path.with_name("adapter_config.json")
    if path.name.startswith("adapter_model") and beside.is_file():
        try:
            found = json.loads(beside.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise WeightError(f"LoRA {path.name}: {beside.name} cannot be read ({error}).") from error
        return {
            k: found[k] for k in ("lora_alpha", "use_rslora", "alpha_pattern") if found.get(k) is not None
        }
    return {}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that can be changed, packed weights included."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if is_linear(module):
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)
            if getattr(module, "bias", None) is not None:
                shapes[f"{path}.bias"] = (module.out_features,)
    return shapes


def is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")
