"""Keys of LoRA files: sorted by what they say of which layer, and checked against a model's shapes. No torch.

    targets = sort_keys("x.safetensors", tensors)             # {layer as the file calls it: {part: tensor}}
    for change in placed("x.safetensors", targets, shapes):   # under our names, each shape checked, each key used
        ...

A tensor is anything with a name and a shape, so that a header is enough to know whether a file fits a model. What
may stand in a file is told in `lora_files.py`, which adds the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mutoscope.engine.wan_names import diffusers_name, our_names
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


class Named(Protocol):
    """A tensor as its header tells of it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Named)
Shapes = Mapping[str, tuple[int, ...]]
"""Of all that can be changed, under the names of our parameters; linear layers as [out, in]."""


@dataclass(frozen=True)
class Placed(Generic[T]):
    """What a file says of one layer: `pair` is (down, up) for the parameter `weight`; the rest are differences of whole
    parameters, by the part that names them."""

    stem: str
    weight: str
    parts: Mapping[str, T]
    pair: tuple[T, T] | None = None
    differences: Mapping[str, str] = field(default_factory=dict)  # part: parameter


def sort_keys(file: str, tensors: Iterable[T]) -> dict[str, dict[str, T]]:
    """Parts of each target under the file's own name for it.

    Raises:
        WeightError: a key that no LoRA of a known kind has.
    """
    targets: dict[str, dict[str, T]] = {}
    strange = []
    for tensor in tensors:
        match = _KEY.match(tensor.name)
        if match is None:
            strange.append(tensor.name)
            continue
        part = next(p for p, text in match.groupdict().items() if text is not None)
        if part in targets.setdefault(match[1], {}):
            first = targets[match[1]][part].name
            raise refused(file, f"{first!r} and {tensor.name!r} say the same",
                          hint="A file of several adapters has to be split.")  # fmt: skip
        targets[match[1]][part] = tensor
    if strange:
        kind = next(
            (k for k, signs in _OTHER_KINDS.items() if any(s in n for s in signs for n in strange)), None
        )
        hint = f"This is {kind}, which is not supported." if kind else "This does not look like a LoRA."
        raise refused(file, f"{_some(strange)} unknown", hint=hint)
    if not targets:
        raise refused(file, "holds no tensors")
    return targets


def placed(file: str, targets: Mapping[str, Mapping[str, T]], shapes: Shapes) -> list[Placed[T]]:
    """Everything that a file says, brought to a model of these shapes.

    Raises:
        WeightError: naming keys whose layer the model does not have, halves of pairs, or a wrong shape.
    """
    index = _index(shapes)
    found, unknown, given = list[Placed[T]](), list[str](), dict[str, str]()
    for name, parts in targets.items():
        stem = index.get(_plain_name(name)) or index.get(_flat_name(name))
        if stem is None:
            unknown += [tensor.name for tensor in parts.values()]
            continue
        if stem in given:
            raise refused(file, f"{given[stem]!r} and {name!r} are the same layer")
        given[stem] = name
        found.append(_place(file, stem, parts, shapes))
    if unknown:
        message = f"{_some(unknown)} of layers that the model does not have"
        raise refused(file, message, hint=_advice(unknown))
    return found


def refused(file: str, message: str, *, hint: str = "") -> WeightError:
    """An error of a LoRA file."""
    return WeightError(f"LoRA {file}: {message}.", hint=hint)


def _place(file: str, stem: str, parts: Mapping[str, T], shapes: Shapes) -> Placed[T]:
    """`stem` is a parameter's name, or that of a module without `.weight`."""
    weight = stem if stem in shapes else f"{stem}.weight"
    pair = None
    if "down" in parts or "up" in parts:
        if not ("down" in parts and "up" in parts):
            one, other = ("down", "up") if "down" in parts else ("up", "down")
            raise refused(file, f"{parts[one].name!r} has no {other!r} half")
        pair = parts["down"], parts["up"]
        _check_pair(file, *pair, weight, shapes)
    elif "diff" not in parts and ("alpha" in parts or "up_bias" in parts):
        first = next(iter(parts.values())).name
        raise refused(file, f"{first!r} stands alone, without a pair or difference")
    targets = {
        "diff": weight,
        "diff_b": f"{stem}.bias",
        "up_bias": f"{stem}.bias",
        "diff_m": f"{stem}.modulation",
    }
    differences = {part: target for part, target in targets.items() if part in parts}
    for part, target in differences.items():
        tensor, expected = parts[part], shapes.get(target)
        if expected is None:
            raise refused(file, f"{tensor.name!r} is for {target!r}, which the model does not have")
        if _without_ones(tensor.shape) != _without_ones(expected):
            shape, wanted = list(tensor.shape), list(expected)
            raise refused(file, f"{tensor.name!r} has shape {shape}, {wanted} expected")
    return Placed(stem, weight, parts, pair, differences)


def _check_pair(file: str, first: Named, second: Named, weight: str, shapes: Shapes) -> None:
    shape = shapes.get(weight)
    if shape is None or len(shape) < 2:
        raise refused(file, f"{first.name!r}: {weight!r} is no matrix that a pair could change")
    down, up = first.shape, second.shape
    rank = down[0] if down else 0
    fits = (
        len(down) >= 2
        and len(up) >= 2
        and (down[0], math.prod(down[1:])) == (rank, math.prod(shape[1:]))
        and (up[0], math.prod(up[1:])) == (shape[0], rank)
        and rank > 0
    )
    if not fits:
        raise refused(
            file,
            f"{first.name!r} {list(down)} and {second.name!r} {list(up)} do not fit {weight!r}, "
            f"[rank, {math.prod(shape[1:])}] and [{shape[0]}, rank] expected",
            hint="The LoRA was made for a model of another size.",
        )


def _index(parameters: Iterable[str]) -> dict[str, str]:
    """Each layer, and each parameter with a name of its own, under all names that files may use for it."""
    stems = {}
    for name in parameters:
        stem = name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name
        stems[stem] = stem
        if name.endswith(".modulation"):
            stems[name.rpartition(".")[0]] = name.rpartition(".")[0]
    flat = {stem.replace(".", "_"): stem for stem in stems}
    flat |= {diffusers_name(stem).replace(".", "_"): stem for stem in stems}
    return flat | stems


def _plain_name(name: str) -> str:
    """A dotted name without prefixes, official."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    translated = our_names([f"{name}."])[f"{name}."]
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
