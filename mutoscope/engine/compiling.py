"""torch.compile for what is between products: norms, modulation, rotation and gates of a block as a few fused kernels.

Products stay as they are: how a weight is fetched, unpacked and multiplied is not the compiler's business; streaming,
LoRAs and precisions work as without. The first step takes longer by the compiler's time; results change in rounding.

For GPUs: on the processor `kernels.py` does it better, and compiling keeps it from being used.

CUDA graphs are not made. They record addresses, and here weights travel, LoRAs come and go, and a step cache leaves out
blocks; what they would save, the time to launch kernels, is little beside a block's milliseconds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from mutoscope.engine.linear import QuantLinear
from mutoscope.engine.lora import SidePath
from mutoscope.engine.wan import WanModel


def compile_blocks(model: WanModel, **options: Any) -> None:
    """Compile the blocks of a transformer, in place. Options are those of `torch.compile`."""
    _leave_products_alone()
    for block in (*model.blocks, *(model.vace_blocks if model.config.vace_layers else ())):
        block.compile(dynamic=False, **options)


@cache
def _leave_products_alone() -> None:
    """Done here and not where they are defined, because it loads the compiler, which takes a second."""
    for kind in (QuantLinear, SidePath):
        kind.forward = torch.compiler.disable(kind.forward)  # type: ignore[method-assign]
