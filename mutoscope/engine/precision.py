"""Which way each layer of the transformer computes.

    exact   float32 on the weights as the file has them
    bf16    bfloat16, the weights rounded to it
    int8    8-bit integers in all blocks (`int8.py`), bfloat16 elsewhere
    auto    int8 where the machine has fast instructions for it and the layer is large enough, else bf16
            (float32 on processors without bfloat16)

Layers that `WanModel.FLOAT32` lists are float32 in all of them. The choice depends on the file and the machine alone,
so the same request gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch

from mutoscope.engine.int8 import Int8, int8_is_fast
from mutoscope.engine.linear import Packed, Precision, Unpacked, default_compute_dtype
from mutoscope.engine.wan import WanModel
from mutoscope.errors import RequestError

PrecisionName = Literal["auto", "exact", "bf16", "int8"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)

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


def compute_dtype(name: PrecisionName, device: torch.device) -> torch.dtype:
    """Of the text encoder, the VAE and whatever the transformer does not do in integers."""
    if name == "exact":
        return torch.float32
    return torch.bfloat16 if name == "bf16" else default_compute_dtype(device)


def chooser(name: PrecisionName | torch.dtype, device: torch.device) -> Chooser:
    """Precisions for the layers of a transformer; a dtype stands for itself in all of them.

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
        if name == "int8" or (
            name == "auto" and device.type == "cpu" and int8_is_fast() and weight.numel >= MIN_INT8_NUMEL
        ):
            return main if _once_per_clip(path) else int8()
        return main

    return choose


def _once_per_clip(path: str) -> bool:
    """Keys and values of the prompt: a few rows, so that preparing the weight would cost more than it gains."""
    return ".cross_attn.k" in path or ".cross_attn.v" in path
