"""Which way each layer of the transformer computes.

    exact   float32 on the weights as the file has them
    bf16    bfloat16, the weights rounded to it
    int8    8-bit integers in all blocks (`int8.py`), bfloat16 elsewhere
    auto    int8 where the machine has fast instructions for it and the layer is large enough, else bf16
            (float32 on processors without bfloat16)

    q8 q6 q5 q4 q3 q2   auto, on weights packed anew to that many bits while the file is opened: less memory from a
            large file, without another one

A file's sidecar (`FILE.precision.json`, written by `mutoscope calibrate`) names layers that auto keeps in bfloat16.
Layers that `WanModel.FLOAT32` lists are float32 in all of them. The choice depends on the file and the machine alone,
so the same request gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mutoscope.engine.gguf import BLOCKS, GGMLType
from mutoscope.engine.int8 import Int8, int8_is_fast
from mutoscope.engine.linear import Packed, Precision, Unpacked, default_compute_dtype
from mutoscope.engine.quants import dequantize, quantize
from mutoscope.engine.wan import WanModel
from mutoscope.errors import FileError, RequestError

PrecisionName = Literal["auto", "exact", "bf16", "int8", "q8", "q6", "q5", "q4", "q3", "q2"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)

REPACKED: dict[str, GGMLType] = {
    "q8": GGMLType.Q8_0,
    "q6": GGMLType.Q6_K,
    "q5": GGMLType.Q5_K,
    "q4": GGMLType.Q4_K,
    "q3": GGMLType.Q3_K,
    "q2": GGMLType.Q2_K,
}
SIDECAR = ".precision.json"
"""What the name of a sidecar adds to that of its file."""

MIN_INT8_NUMEL = 1 << 19
"""Weights below this are multiplied in bfloat16: preparing the activations would cost what the product gains."""

REPACK_ROWS = 512
"""Rows of a weight that are packed anew at a time."""

Chooser = Callable[[str, Packed], Precision]
"""From a layer's name and weight to its precision."""


def checked(name: str) -> PrecisionName:
    """Raises RequestError for a name that is none."""
    for known in PRECISIONS:
        if name == known:
            return known
    raise RequestError(f"--precision {name}: expected one of {', '.join(PRECISIONS)}.")


def sidecar_of(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What `mutoscope calibrate` found out about this file; None if it was not asked.

    Raises:
        FileError: the sidecar is damaged, or of a file of another size.
    """
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        return None
    hint = "Run mutoscope calibrate again, or remove it."
    try:
        report: dict[str, Any] = json.loads(sidecar.read_text("utf-8"))
        size, names = report["size_bytes"], report["bf16"]
        sound = report["version"] == 1 and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{sidecar}: is not a calibration ({error!r}).", hint=hint) from error
    if not sound or size != path.stat().st_size:
        raise FileError(f"{sidecar}: is of another file, or of another version.", hint=hint)
    return report


def repacked(weight: Packed, type_id: GGMLType) -> Packed:
    """The weight in that type, in memory; as it is, if it is no larger or its rows do not fit the type's blocks."""
    per_weight = 8 * BLOCKS[type_id].nbytes / BLOCKS[type_id].elements
    if weight.shape[-1] % BLOCKS[type_id].elements or 8 * weight.data.nbytes <= per_weight * weight.numel:
        return weight
    rows = weight.data.view(weight.shape[0], -1)
    parts = [quantize(type_id, dequantize(weight.type_id, part)) for part in rows.split(REPACK_ROWS)]
    weight.drop_pages()
    return Packed(torch.cat(parts).view(-1), type_id, weight.shape)


def compute_dtype(name: PrecisionName, device: torch.device) -> torch.dtype:
    """Of the text encoder, the VAE and whatever the transformer does not do in integers."""
    if name == "exact":
        return torch.float32
    return torch.bfloat16 if name == "bf16" else default_compute_dtype(device)


def chooser(
    name: PrecisionName | torch.dtype, device: torch.device, sensitive: Collection[str] = ()
) -> Chooser:
    """Precisions for the layers of a transformer; a dtype stands for itself in all of them.

    sensitive: layers that auto keeps in bfloat16.

    Raises:
        RequestError: int8 was asked for by name where there are no instructions for it.
    """
    if name == "int8" and not (device.type == "cpu" and int8_is_fast()):
        raise RequestError(
            f"--precision int8 needs a processor with VNNI or AMX instructions, not {device}.",
            hint="Leave it out, or use bf16.",
        )
    main = Unpacked(name if isinstance(name, torch.dtype) else compute_dtype(name, device))
    exact = main if main.dtype == torch.float32 else Unpacked(torch.float32)

    @cache
    def int8() -> Int8:
        return Int8()

    def choose(path: str, weight: Packed) -> Precision:
        if path.split(".")[0] in WanModel.FLOAT32:
            return exact
        fast = device.type == "cpu" and int8_is_fast() and weight.numel >= MIN_INT8_NUMEL
        wanted = name == "int8" or ((name == "auto" or name in REPACKED) and fast and path not in sensitive)
        return int8() if wanted and not _once_per_clip(path) else main

    return choose


def _once_per_clip(path: str) -> bool:
    """Keys and values of the prompt: a few rows, so that preparing the weight would cost more than it gains."""
    return ".cross_attn.k" in path or ".cross_attn.v" in path
