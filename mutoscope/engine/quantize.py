"""Quantise a model file: GGUF, safetensors or .pth in, GGUF out, tensor by tensor.

    quantize_file(Path("vace-14b-bf16.safetensors"), Path("vace-14b-Q4_K_M.gguf"), "Q4_K_M")

Which tensor gets which type is decided by `mixture`, a pure function of names and shapes. It follows what
the community's files do, so that ours have their sizes:

- Wan: city96/ComfyUI-GGUF `tools/lcpp.patch`. Attention values and the second feed-forward matrix get more
  bits; embeddings, time, text and head stay F32 (or as 16-bit as the source has them).
- UMT5: llama.cpp `llama_tensor_get_type` without importance matrix. The token table is Q6_K, or Q8_0.
- VAE: convolutions have no rows to quantise, so they become F16, norms and biases F32.

"The first 2" and "every third layer" count tensors of a kind in the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mutoscope.engine import umt5, vae, wan
from mutoscope.engine.gguf import BLOCKS, GGMLType, Metadata
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.quants import dequantize, quantize, workers
from mutoscope.engine.weights import Stored, WeightSource, open_weights
from mutoscope.errors import RequestError, WeightError

F32, F16, BF16 = GGMLType.F32, GGMLType.F16, GGMLType.BF16
Q4_1, Q5_1, Q8_0 = GGMLType.Q4_1, GGMLType.Q5_1, GGMLType.Q8_0
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K

BASE: dict[str, GGMLType] = {
    "Q2_K": Q2_K,
    "Q3_K_S": Q3_K,
    "Q3_K_M": Q3_K,
    "Q3_K_L": Q3_K,
    "Q4_0": GGMLType.Q4_0,
    "Q4_1": Q4_1,
    "Q4_K_S": Q4_K,
    "Q4_K_M": Q4_K,
    "Q5_0": GGMLType.Q5_0,
    "Q5_1": Q5_1,
    "Q5_K_S": Q5_K,
    "Q5_K_M": Q5_K,
    "Q6_K": Q6_K,
    "Q8_0": Q8_0,
    "F16": F16,
    "BF16": BF16,
}
"""The names users know, and the type most tensors get."""

FILE_TYPE = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""`general.file_type`, llama.cpp's numbers."""

Shapes = Mapping[str, tuple[int, ...]]

_SIGNS = {
    "blocks.0.self_attn.q.weight": "wan",
    "vace_blocks.0.self_attn.q.weight": "wan",
    "enc.blk.0.attn_q.weight": "t5encoder",
    "decoder.middle.0.residual.0.gamma": "wan_vae",
}
"""One tensor that every model of its kind has."""

_NOT_OURS = f"not a model that can be quantised: none of the tensors {', '.join(_SIGNS)}."
_NOT_OURS_HINT = "Give a Wan 2.1 model, a UMT5 encoder or a Wan 2.1 VAE."

# Elements that a thread converts at a time: 4 MiB of float32. A multiple of every block.
_CHUNK = 1 << 20

# Written anew, or without meaning in the new file.
_NOT_COPIED = (
    "general.architecture",
    "general.quantization_version",
    "general.file_type",
    "general.alignment",
)


def quantize_file(
    src: Path, dst: Path, type_name: str, progress: Callable[[int, int], None] | None = None
) -> None:
    """Convert the model in `src` to the GGUF file `dst`; `type_name` is one of `BASE`.

    Names are translated to those of GGUF files, metadata such as the tokenizer is copied. Memory holds one
    tensor in its new type and a chunk of it as numbers. `progress(done, of)` gets bytes written. `dst`
    appears when complete.

    Raises:
        RequestError: `type_name` is unknown, or `src` and `dst` are the same file.
        FileError: `src` cannot be read, is no Wan, UMT5 or Wan VAE file, or holds numbers that do not fit.
    """
    check_type_name(type_name)
    if dst.exists() and dst.samefile(src):
        raise RequestError(f"{dst} would be written over itself.", hint="Choose another name for the result.")
    source = open_weights(src)
    architecture, tensors = _translated(source)
    types = mixture(type_name, {name: tensor.shape for name, tensor in tensors.items()})
    metadata = {
        "general.architecture": architecture,
        **dict(_copied(source.metadata)),
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPE[type_name],
    }
    writer = GGUFWriter(dst, metadata)
    with workers() as pool:
        for name, tensor in tensors.items():
            type_id = _keep_16_bits(types[name], tensor)
            writer.add(name, tensor.shape, type_id, partial(_convert, tensor, type_id, pool))
        writer.write(progress)


def check_type_name(type_name: str) -> None:
    """Raises:
    RequestError: `type_name` is not in `BASE`.
    """
    if type_name not in BASE:
        raise RequestError(f"Unknown type {type_name!r}.", hint=f"Choose one of {', '.join(BASE)}.")


def mixture(type_name: str, shapes: Shapes) -> dict[str, GGMLType]:
    """The type of every tensor of a model, for names as in GGUF files and torch-order shapes.

    Raises:
        RequestError: `type_name` is not in `BASE`.
        WeightError: the names are not those of a Wan model, a UMT5 encoder or a Wan VAE.
    """
    check_type_name(type_name)
    choose = {"wan": _wan, "t5encoder": _t5, "wan_vae": _vae}[architecture_of(shapes)]
    chosen = choose(type_name, shapes)
    return {name: _fitting(chosen[name], shape) for name, shape in shapes.items()}


def architecture_of(names: Iterable[str]) -> str:
    """`general.architecture` for a model with these tensors: wan, t5encoder or wan_vae.

    Raises:
        WeightError: none of these.
    """
    architecture = _recognised(names)
    if architecture is None:
        raise WeightError(_NOT_OURS, hint=_NOT_OURS_HINT)
    return architecture


def _recognised(names: Iterable[str]) -> str | None:
    return next((_SIGNS[name] for name in names if name in _SIGNS), None)


# ---------------------------------------------------------------- mixtures


def _fitting(type_id: GGMLType, shape: tuple[int, ...]) -> GGMLType:
    """F16 instead of blocks that do not divide the rows. Real Wan widths all divide."""
    return type_id if not shape or shape[-1] % BLOCKS[type_id].elements == 0 else F16


def _split(names: Iterable[str], *endings: str) -> list[list[str]]:
    """Names by their ending, each list in file order; what matches none comes last."""
    lists: list[list[str]] = [[] for _ in range(len(endings) + 1)]
    for name in names:
        at = next((i for i, ending in enumerate(endings) if name.endswith(ending)), len(endings))
        lists[at].append(name)
    return lists


_WAN_KEPT = (
    "patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "img_emb.", "head.",
)  # fmt: skip


def _wan(type_name: str, shapes: Shapes) -> dict[str, GGMLType]:
    types = dict.fromkeys(shapes, F32)
    matrices = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _WAN_KEPT)
    ]
    values, downs, rest = _split(matrices, ".v.weight", ".ffn.2.weight")
    base = BASE[type_name]
    value = {"Q2_K": Q3_K, "Q3_K_M": Q4_K, "Q3_K_L": Q5_K, "Q4_K_M": Q6_K, "Q5_K_M": Q6_K}.get(
        type_name, base
    )
    n_first = {"Q3_K_M": 2, "Q4_K_S": 4}.get(type_name, 0)
    down = {
        "Q3_K_M": Q4_K, "Q3_K_L": Q5_K, "Q4_K_S": Q5_K, "Q4_K_M": Q6_K, "Q5_K_M": Q6_K,
        "Q4_0": Q4_1, "Q5_0": Q5_1,
    }.get(type_name, base)  # fmt: skip
    types.update(dict.fromkeys(rest, base))
    types.update(dict.fromkeys(downs, down))
    types.update((name, Q5_K if i < n_first else value) for i, name in enumerate(values))
    return types


def _more_bits(i: int, n: int) -> bool:
    """llama.cpp's choice of layers for a better type: the outer eighths and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _t5(type_name: str, shapes: Shapes) -> dict[str, GGMLType]:
    types = dict.fromkeys(shapes, F32)
    matrices = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not name.endswith("attn_rel_b.weight")
    ]
    tables, values, downs, rest = _split(matrices, "token_embd.weight", "attn_v.weight", "ffn_down.weight")
    base = BASE[type_name]

    def value(i: int) -> GGMLType:
        match type_name:
            case "Q2_K":
                return Q3_K
            case "Q3_K_M":
                return Q5_K if i < 2 else Q4_K
            case "Q3_K_L":
                return Q5_K
            case "Q4_K_S" if i < 4:
                return Q5_K
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, len(values)):
                return Q6_K
        return base

    def down(i: int) -> GGMLType:
        match type_name:
            case "Q2_K":
                return Q3_K
            case "Q3_K_M":
                return Q5_K if i < len(downs) // 16 else Q4_K
            case "Q3_K_L":
                return Q5_K
            case "Q4_K_S" if i < len(downs) // 8:
                return Q5_K
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, len(downs)):
                return Q6_K
        return base

    types.update(dict.fromkeys(rest, base))
    types.update(dict.fromkeys(tables, base if base in (Q8_0, F16, BF16) else Q6_K))
    types.update((name, value(i)) for i, name in enumerate(values))
    types.update((name, down(i)) for i, name in enumerate(downs))
    return types


def _vae(type_name: str, shapes: Shapes) -> dict[str, GGMLType]:
    wide = BF16 if type_name == "BF16" else F16
    return {
        name: wide if name.endswith(".weight") and len(shape) > 2 else F32 for name, shape in shapes.items()
    }


# ---------------------------------------------------------------- conversion


def _translated(source: WeightSource) -> tuple[str, dict[str, Stored]]:
    """The architecture, and the tensors under the names of GGUF files."""
    translators = {"wan": wan.our_names, "t5encoder": umt5.our_names, "wan_vae": vae.our_names}
    for architecture, our_names in translators.items():
        names = our_names(source.tensors)
        tensors = {ours: source.tensors[theirs] for theirs, ours in names.items()}
        if _recognised(tensors) == architecture:
            if len(tensors) < len(names):
                raise WeightError(
                    f"{source.path.name}: some of its {len(names)} tensors are one under two names"
                )
            return architecture, tensors
    raise WeightError(f"{source.path.name}: {_NOT_OURS}", hint=_NOT_OURS_HINT)


def _copied(metadata: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Metadata for the new file: unchanged from GGUF; from safetensors as GGUF can hold it."""
    for key in metadata:
        if key in _NOT_COPIED or key.startswith("comfy.gguf.orig_shape."):
            continue
        yield key, metadata.encoded(key) if isinstance(metadata, Metadata) else _portable(metadata[key])


def _portable(value: object) -> object:
    """A decoded JSON value as GGUF can hold it; what has no form there stays JSON text."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value:
        kinds = {type(item) for item in value}
        if kinds == {int, float}:
            return [float(item) for item in value]
        if len(kinds) == 1 and kinds <= {bool, int, float, str}:
            return value
    return json.dumps(value)


def _keep_16_bits(type_id: GGMLType, tensor: Stored) -> GGMLType:
    """Matrices that stay unquantised are not blown up to F32 where the source has 16 bits, as is usual."""
    return GGMLType(tensor.type_id) if type_id == F32 and _is_16_bit_matrix(tensor) else type_id


def _is_16_bit_matrix(tensor: Stored) -> bool:
    is_matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    return is_matrix and tensor.type_id in (F16, BF16)


def _convert(tensor: Stored, type_id: GGMLType, pool: ThreadPoolExecutor) -> np.ndarray:
    """The bytes of a tensor in another type, uint8 [nbytes]. Chunks may cross rows: both are whole blocks."""
    packed = tensor.read()
    if tensor.type_id == type_id:
        return packed.numpy()
    old, new = BLOCKS[tensor.type_id], BLOCKS[type_id]
    out = torch.empty(tensor.numel // new.elements * new.nbytes, dtype=torch.uint8)
    old_step, new_step = (_CHUNK // block.elements * block.nbytes for block in (old, new))

    def convert_chunk(i: int) -> None:
        numbers = dequantize(tensor.type_id, packed[i * old_step : (i + 1) * old_step])
        out[i * new_step : (i + 1) * new_step] = quantize(type_id, numbers)

    try:
        for _ in pool.map(convert_chunk, range(-(-tensor.numel // _CHUNK))):
            pass
    except ValueError as error:
        raise WeightError(f"{tensor.path.name}: tensor {tensor.name!r}: {error}") from None
    return out.numpy()
