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
`PREFIXES` or with all dots of the layer's name as underscores (`lora_unet_blocks_0_self_attn_q`). The layer's
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
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutoscope.engine import wan
from mutoscope.engine.weights import Stored, open_weights
from mutoscope.errors import WeightError

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "model.",
)
"""What other programs put before the name of a layer, some of them several."""
FLAT_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_", "lora_")
SHOWN_KEYS = 4

_DOWN = r"(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
_UP = r"(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)"
_PARTS = {
    "down": rf"{_DOWN}(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?",
    "up": rf"{_UP}(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?",
    "up_bias": rf"{_UP}(?:\.(?!bias$)\w+)?\.bias",
    "alpha": "alpha",
    "diff": "diff|w_norm",
    "diff_b": "diff_b|b_norm",
    "diff_m": "diff_m",
}
_KEY = re.compile("^(.+?)\\.(?:" + "|".join(f"(?P<{part}>{form})" for part, form in _PARTS.items()) + ")$")
_OTHER_KINDS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_w1", "hada_w2", "hada_t1"),
    "LoKr": ("lokr_w1", "lokr_w2", "lokr_t2"),
    "OFT": ("oft_blocks", "oft_diag"),
    "LoCon with a middle product": ("lora_mid",),
}


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
        parameters = _shapes(model)
        index = _index(parameters)
        found, unknown, given = Changes(), list[str](), dict[str, str]()
        for name, parts in self.targets.items():
            stem = index.get(_plain_name(name)) or index.get(_flat_name(name))
            if stem is None:
                unknown += [stored.name for stored in parts.values()]
                continue
            if stem in given:
                raise self._error(f"{given[stem]!r} and {name!r} are the same layer")
            given[stem] = name
            self._add(found, name, stem, parts, parameters)
        if unknown:
            raise self._error(
                f"{_some(unknown)} of layers that the model does not have",
                hint=_advice(unknown),
            )
        return found

    def _add(self, found: Changes, name: str, stem: str, parts: Mapping[str, Stored],
             parameters: Mapping[str, tuple[int, ...]]) -> None:  # fmt: skip
        """Sort the parts of one target; `stem` is a parameter's name, or that of a module without `.weight`."""
        weight = stem if stem in parameters else f"{stem}.weight"
        scale = 1.0
        if "down" in parts or "up" in parts:
            if not ("down" in parts and "up" in parts):
                one, other = ("down", "up") if "down" in parts else ("up", "down")
                raise self._error(f"{parts[one].name!r} has no {other!r} half")
            scale = self._scale(stem, parts)
            pair = Pair(parts["down"], parts["up"], scale)
            self._check_pair(pair, weight, parameters)
            found.pairs[weight] = pair
        elif "diff" not in parts and ("alpha" in parts or "up_bias" in parts):
            raise self._error(
                f"{next(iter(parts.values())).name!r} stands alone, without a pair or difference"
            )
        differences = {
            "diff": (weight, 1.0),
            "diff_b": (f"{stem}.bias", 1.0),
            "up_bias": (f"{stem}.bias", scale),
            "diff_m": (f"{stem}.modulation", 1.0),
        }
        for part, (target, factor) in differences.items():
            if part not in parts:
                continue
            stored, expected = parts[part], parameters.get(target)
            if expected is None:
                raise self._error(f"{stored.name!r} is for {target!r}, which the model does not have")
            if _without_ones(stored.shape) != _without_ones(expected):
                raise self._error(
                    f"{stored.name!r} has shape {list(stored.shape)}, {list(expected)} expected"
                )
            found.differences.setdefault(target, []).append(Difference(stored, factor))

    def _check_pair(self, pair: Pair, weight: str, parameters: Mapping[str, tuple[int, ...]]) -> None:
        shape = parameters.get(weight)
        if shape is None or len(shape) < 2:
            raise self._error(f"{pair.down.name!r}: {weight!r} is no matrix that a pair could change")
        down, up = pair.down.shape, pair.up.shape
        rank = down[0] if down else 0
        fits = (
            len(down) >= 2
            and len(up) >= 2
            and (down[0], math.prod(down[1:])) == (rank, math.prod(shape[1:]))
            and (up[0], math.prod(up[1:])) == (shape[0], rank)
            and rank > 0
        )
        if not fits:
            raise self._error(
                f"{pair.down.name!r} {list(down)} and {pair.up.name!r} {list(up)} do not fit {weight!r}, "
                f"[rank, {math.prod(shape[1:])}] and [{shape[0]}, rank] expected",
                hint="The LoRA was made for a model of another size.",
            )

    def _scale(self, stem: str, parts: Mapping[str, Stored]) -> float:
        rank = parts["down"].shape[0] if parts["down"].shape else 1
        if "alpha" in parts:
            alpha = parts["alpha"].packed().values(torch.float32)
            if alpha.numel() != 1 or not bool(torch.isfinite(alpha).all()):
                raise self._error(f"{parts['alpha'].name!r} is not one finite number")
            return float(alpha.flatten()[0]) / rank
        alpha_of = {**self.config.get("alpha_pattern", {})}
        stated = next((v for k, v in alpha_of.items() if stem.endswith(k) or fnmatch.fnmatch(stem, k)), None)
        stated = self.config.get("lora_alpha") if stated is None else stated
        if stated is None:
            return 1.0
        return float(stated) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _error(self, message: str, *, hint: str = "") -> WeightError:
        return WeightError(f"LoRA {self.path.name}: {message}.", hint=hint)


def read_lora(path: str | Path) -> LoraFile:
    """Open a LoRA file. Only its header and names are read.

    Raises:
        FileError: the file is missing or damaged; WeightError: a key that no LoRA of a known kind has.
    """
    source = open_weights(path)
    targets: dict[str, dict[str, Stored]] = {}
    strange = []
    for tensor in source.tensors.values():
        match = _KEY.match(tensor.name)
        if match is None:
            strange.append(tensor.name)
            continue
        part = next(p for p, text in match.groupdict().items() if text is not None)
        if part in targets.setdefault(match[1], {}):
            first = targets[match[1]][part].name
            raise WeightError(f"LoRA {source.path.name}: {first!r} and {tensor.name!r} say the same.",
                              hint="A file of several adapters has to be split.")  # fmt: skip
        targets[match[1]][part] = tensor
    if strange:
        kind = next(
            (k for k, signs in _OTHER_KINDS.items() if any(s in n for s in signs for n in strange)), None
        )
        hint = f"This is {kind}, which is not supported." if kind else "This does not look like a LoRA."
        raise WeightError(f"LoRA {source.path.name}: {_some(strange)} unknown.", hint=hint)
    if not targets:
        raise WeightError(f"LoRA {source.path.name}: holds no tensors.")
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


def _index(parameters: Iterable[str]) -> dict[str, str]:
    """Each layer, and each parameter with a name of its own, under all names that files may use for it."""
    stems = {}
    for name in parameters:
        stem = name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name
        stems[stem] = stem
        if name.endswith(".modulation"):
            stems[name.rpartition(".")[0]] = name.rpartition(".")[0]
    flat = {stem.replace(".", "_"): stem for stem in stems}
    flat |= {wan.diffusers_name(stem).replace(".", "_"): stem for stem in stems}
    return flat | stems


def _plain_name(name: str) -> str:
    """A dotted name without prefixes, official."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    translated = wan.our_names([f"{name}."])[f"{name}."]
    return translated.removesuffix(".")


def _flat_name(name: str) -> str:
    prefix = next((p for p in FLAT_PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix).lstrip("_").replace(".", "_")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_KEYS]) + (
        f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    )
    return f"{len(names)} key{'s' if len(names) > 1 else ''} ({shown})"


def _advice(unknown: list[str]) -> str:
    if any("_img" in name or "img_emb" in name or "add_k_proj" in name for name in unknown):
        return "It was made for an image-to-video model; use one for text-to-video or VACE."
    if any("lora_te" in name or "text_encoder" in name for name in unknown):
        return "It changes a text encoder too, which is not supported."
    return "It was made for another model."
