"""Products in 8 bits on GPUs, by the library: `torch._int_mm` (integers) and `torch._scaled_mm` (floats, e4m3).

    x [M, K] = s_m q_mk            every row (token) by its largest number
    w [N, K] = t_n u_nk            every output channel by its largest weight
    x w^T    = s_m t_n (q u^T)

A weight is unpacked, rounded to 8 bits and forgotten with its product, so that it takes no memory and travels as it is
packed; with the thousands of rows of a clip that is little beside the product. Not measured on a GPU, and so never
chosen unasked. Both functions exist on the processor too, slowly: that is where tests run them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine.linear import Packed, Shared, Unpacked

INT32_BYTES = 256 << 20
"""Of integer results at a time: they are twice as large as what becomes of them."""
CHUNK = 1 << 25
"""Numbers that are rounded at a time, in float32."""
MULTIPLE = 16
"""Widths must be multiples of it."""
MIN_ROWS = 17
"""That the integer product takes."""
_TINY = 1e-30


def steps_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [R, 1]: the step of each row, so that its largest number is the largest of `dtype`."""
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    return values.abs().amax(1, keepdim=True).float().div_(most).clamp_min_(_TINY)


def rounded(values: Tensor, step_R1: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [R, K] in steps of their rows, in 8 bits, nearest."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    for q, part, step in zip(*(t.split(max(1, CHUNK // values.shape[1])) for t in (out, values, step_R1)),
                             strict=True):  # fmt: skip
        scaled = part.float() * step.reciprocal()
        if dtype == torch.int8:
            q.copy_(scaled.round_())
        else:  # beyond its largest number is none
            q.copy_(scaled.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max))
    return out


class Scaled(Unpacked):
    """`Unpacked`, but for the product, which is in `kind`: int8 or float8_e4m3fn. Results are of `dtype`."""

    def __init__(self, kind: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.kind = kind

    def linear(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        if any(n % MULTIPLE for n in weight.shape):
            return super().linear(x, weight, bias, gelu=gelu)
        given = x if isinstance(x, Shared) else Shared(x)
        w = self.unpacked(weight)
        t_N1 = steps_of(w, self.kind)
        u_NK = rounded(w, t_N1, self.kind)
        q_MK, s_M1 = given.made(str(self.kind), self._rows)
        y = self._integers(q_MK, u_NK, s_M1, t_N1) if self.kind == torch.int8 else torch._scaled_mm(
            q_MK, u_NK.T, scale_a=s_M1, scale_b=t_N1.T, out_dtype=self.dtype
        )  # fmt: skip
        y = y.view(*given.x.shape[:-1], -1)
        if bias is not None:
            y += bias
        return F.gelu(y, approximate="tanh") if gelu else y

    def fuses_gelu(self, device: torch.device) -> bool:
        return False

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        step = steps_of(rows, self.kind)
        return rounded(rows, step, self.kind), step

    def _integers(self, q_MK: Tensor, u_NK: Tensor, s_M1: Tensor, t_N1: Tensor) -> Tensor:
        m, n = len(q_MK), len(u_NK)
        out = torch.empty(max(m, MIN_ROWS), n, dtype=self.dtype, device=q_MK.device)
        if m < MIN_ROWS:
            q_MK, s_M1 = (F.pad(t, (0, 0, 0, MIN_ROWS - m)) for t in (q_MK, s_M1))
        count = -(-len(q_MK) * n * 4 // INT32_BYTES)
        for y, q, s in zip(*(t.tensor_split(count) for t in (out, q_MK, s_M1)), strict=True):
            y.copy_(torch._int_mm(q, u_NK.T).float().mul_(s).mul_(t_N1.T))
        return out[:m]
