"""Products of few rows with a weight in Q8_0, straight from its blocks: nothing unpacked goes through memory.

With few rows (a prompt's tokens) a product costs what reading its weight costs. The library's way writes the unpacked
weight, reads it again and packs it for itself: two to two and a half times as long with 12 rows, as long with 90
(docs/LOG.md).

    y [M, N] float32 = x [M, K] bfloat16  times  w [N, K], d q of each block rounded to bfloat16

The numbers are those of the unpacked weight's product in bfloat16 with float32 sums, and those of a row depend on
no other row. A thread unpacks ROWS x GROUPS rows of the weight into its cache and keeps
ROWS x TOKENS sums in registers.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine import kernels
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.jit import Compiled, Kernel, Variable
from mutoscope.engine.kernels import WIDEST

FEW = 64
"""Up to this many rows it is faster than unpacking and the library's product."""
ROWS, TOKENS, GROUPS = 4, 6, 2
"""24 sums, 4 vectors of weights and one of activations fit into 32 registers."""
BLOCK = 32
"""Numbers of a block, and of a vector in bfloat16."""


def can(type_id: int, n_rows: int, n_in: int, n_out: int) -> bool:
    """Whether such a product on the processor should be made here."""
    fitting = n_in % BLOCK == 0 and n_out % (ROWS * GROUPS) == 0 and n_in <= WIDEST
    return type_id == GGMLType.Q8_0 and 0 < n_rows <= FEW and fitting and kernels.fits()


def product(x_MK: Tensor, blocks: Tensor, n_out: int) -> Tensor:
    """bfloat16 rows with packed Q8_0 [N, K] to float32 [M, N]."""
    n_rows, n_in = x_MK.shape
    x = F.pad(x_MK, (0, 0, 0, -n_rows % TOKENS)).contiguous()
    y = torch.empty(len(x), n_out)
    _kernel()(n_out // (ROWS * GROUPS), blocks, n_in // BLOCK, x, len(x), n_out, y)
    return y[:n_rows]


@cache
def _kernel() -> Compiled:
    k = Kernel("few_rows")
    blocks, n_blocks, x = k.pointer(), k.integer(), k.pointer()
    n_rows, n_out, out = k.integer(), k.integer(), k.pointer()
    room = k.reserve("bfloat", ROWS * GROUPS * WIDEST)
    with k.rows() as part:
        first = part * (ROWS * GROUPS)
        with k.loop(n_blocks, 1) as b:
            for r in range(ROWS * GROUPS):
                kernels.unpack_q8_0(k, blocks, (first + r) * n_blocks + b, room, n_blocks * r + b)
        with k.between(k.constant(0, "i64"), n_rows, TOKENS) as m, k.loop(GROUPS, 1) as group:
            sums = [[Variable(k.zeros()) for _ in range(TOKENS)] for _ in range(ROWS)]
            with k.loop(n_blocks, 1) as b:
                ws = [k.load_bfloats(room, ((group * ROWS + r) * n_blocks + b) * BLOCK) for r in range(ROWS)]
                for t in range(TOKENS):
                    xs = k.load_bfloats(x, ((m + t) * n_blocks + b) * BLOCK)
                    for r in range(ROWS):
                        sums[r][t].set(k.add_products(sums[r][t].get(), ws[r], xs))
            for t in range(TOKENS):
                for r in range(ROWS):
                    k.store(out, (m + t) * n_out + first + group * ROWS + r, k.sum(sums[r][t].get()))
    return k.compiled()
