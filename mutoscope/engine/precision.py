"""Which way each layer of the transformer computes.

    exact   float32 on the weights as the file has them
    bf16    bfloat16, the weights rounded to it
    fp16    float16 in its place
    int8    8-bit integers in all blocks (`int8.py`; on GPUs `scaled.py`), bfloat16 elsewhere
    fp8     8-bit floats in all blocks, on GPUs that multiply them (`scaled.py`), bfloat16 elsewhere
    auto    int8 where the processor has fast instructions for it and the layer is large enough, else bf16
            (float32 on processors and float16 on GPUs without bfloat16)

    q8 q6 q5 q4 q3 q2   auto, on weights packed anew to that many bits while the file is opened: less memory from a
            large file, without another one

A file's sidecar (`FILE.precision.json`, written by `mutoscope calibrate`) names layers that auto keeps in bfloat16.
Layers that `WanModel.FLOAT32` lists are float32 in all of them. The choice depends on the file and the machine alone,
so the same request gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mutoscope.engine.gguf import BLOCKS, GGMLType
from mutoscope.engine.int8 import Int8, int8_is_fast
from mutoscope.engine.linear import Packed, Precision, Unpacked, default_compute_dtype, once_per_clip
from mutoscope.engine.quants import CHUNK_CPU, dequantize, quantize
from mutoscope.engine.scaled import Scaled
from mutoscope.engine.wan import WanModel
from mutoscope.errors import FileError, RequestError
from mutoscope.request import PrecisionName

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


def repacked(weight: Packed, type_id: GGMLType, pool: Executor) -> Packed:
    """The weight in that type, in memory; as it is, if it is no larger or its rows do not fit the type's blocks."""
    per_weight = 8 * BLOCKS[type_id].nbytes / BLOCKS[type_id].elements
    n, k = weight.shape
    if k % BLOCKS[type_id].elements or 8 * weight.data.nbytes <= per_weight * weight.numel:
        return weight

    def anew(rows: Tensor) -> Tensor:
        return quantize(type_id, dequantize(weight.type_id, rows))

    parts = weight.data.view(n, -1).split(max(1, CHUNK_CPU // k))
    data = torch.cat(list(pool.map(anew, parts))).view(-1)
    weight.drop_pages()
    return Packed(data, type_id, weight.shape)


def compute_dtype(name: PrecisionName, device: torch.device) -> torch.dtype:
    """Of the text encoder, the VAE and whatever the transformer does not do in integers."""
    named = {"exact": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return named[name] if name in named else default_compute_dtype(device)


def chooser(
    name: PrecisionName | torch.dtype, device: torch.device, sensitive: Collection[str] = ()
) -> Chooser:
    """Precisions for the layers of a transformer; a dtype stands for itself in all of them.

    sensitive: layers that auto keeps in bfloat16.

    Raises:
        RequestError: int8 was asked for by name where there are no instructions for it.
    """
    eight_bits = _eight_bits(name, device)
    main = Unpacked(name if isinstance(name, torch.dtype) else compute_dtype(name, device))
    exact = main if main.dtype == torch.float32 else Unpacked(torch.float32)

    @cache
    def int8() -> Precision:
        return Int8() if eight_bits is None else Scaled(eight_bits, main.dtype)

    def choose(path: str, weight: Packed) -> Precision:
        if path.split(".")[0] in WanModel.FLOAT32:
            return exact
        fast = device.type == "cpu" and int8_is_fast() and weight.numel >= MIN_INT8_NUMEL
        wanted = name in ("int8", "fp8") or (
            (name == "auto" or name in REPACKED) and fast and path not in sensitive
        )
        return int8() if wanted and not once_per_clip(path) else main

    return choose


def _eight_bits(name: PrecisionName | torch.dtype, device: torch.device) -> torch.dtype | None:
    """What a GPU multiplies in for a precision of 8 bits; None for other precisions, and on the processor.

    Raises:
        RequestError: the precision was asked for by name where there are no instructions for it.
    """
    if name not in ("int8", "fp8") or (name == "int8" and device.type == "cpu" and int8_is_fast()):
        return None
    least, dtype = ((7, 5), torch.int8) if name == "int8" else ((8, 9), torch.float8_e4m3fn)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= least:
        return dtype
    processor = "a processor with VNNI or AMX instructions, or " if name == "int8" else ""
    raise RequestError(
        f"--precision {name} needs {processor}an NVIDIA GPU of compute capability "
        f"{least[0]}.{least[1]}, not {device}.",
        hint="Leave it out, or use bf16.",
    )
