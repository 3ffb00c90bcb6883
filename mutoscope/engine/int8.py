"""Products of 8-bit integers: twice the speed of bfloat16 on CPUs with instructions for them (VNNI, AMX).

    x [M, K] = s_m (q_mk - 128) + c_m      every row (token) by its own range: q uint8, step s, centre c
    w [N, K] = t_n u_nk                    every output channel by its largest weight: u int8, step t

    x w^T = s_m t_n (q - 128) u^T + c_m (t_n sum_k u_nk)

The integer product and t_n are the library's (oneDNN, by `onednn::qlinear_pointwise`); steps, centres and bias
of rows follow as one pass over its float32 result. Centring doubles the resolution of what is far from symmetric,
like the result of GELU. The error is about 1 % of the product on Gaussian numbers.

Rows are worked through in pieces whose results stay in the cache: fresh memory beyond 32 MiB costs more than the
arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mutoscope.engine.linear import Packed, Shared

PIECE_BYTES = 16 << 20
"""Of one float32 result."""
CHUNK_ROWS_BYTES = 4 << 20
"""Of the float32 rows of a weight that are converted at a time."""
LEVELS = 127
_TINY = 1e-30


@cache
def int8_is_fast() -> bool:
    """Whether this CPU multiplies 8-bit integers faster than bfloat16, and torch has the kernel."""
    has_kernel = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return has_kernel and (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class Rows:
    """Activations: uint8 [M, K] with a step and a centre for each row, float32 [M, 1]."""

    q_MK: Tensor
    step_M1: Tensor
    centre_M1: Tensor


@dataclass(frozen=True)
class Weight:
    """A weight in the kernel's own layout, with float32 [N] steps and sums of rows."""

    packed: Tensor
    step_N: Tensor
    sum_N: Tensor
    zero_N: Tensor
    nbytes: int

    @property
    def n_out(self) -> int:
        return self.step_N.shape[0]


def quantize_rows(x: Tensor) -> Rows:
    """float [M, K] to 8 bits, nearest, each row by its own range."""
    q_MK = torch.empty(x.shape, dtype=torch.int8)
    step_M1, centre_M1 = torch.empty(len(x), 1), torch.empty(len(x), 1)
    for part in pieces(*x.shape):
        values = x[part].float()
        high, low = values.amax(1, keepdim=True), values.amin(1, keepdim=True)
        centre = torch.add(high, low, out=centre_M1[part]).mul_(0.5)
        step = torch.sub(high, low, out=step_M1[part]).mul_(0.5 / LEVELS).clamp_min_(_TINY)
        inverse = step.reciprocal()
        q_MK[part] = torch.addcmul(-centre * inverse, values, inverse).round_()
    # float to int8 is five times as fast as to uint8; flipping the top bit then adds 128.
    return Rows(q_MK.view(torch.uint8).bitwise_xor_(128), step_M1, centre_M1)


def quantize_weight(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight to int8 [N, K], steps [N] and sums of rows [N]; never more than a few float32 rows at a time."""
    n, k = weight.shape
    rows = weight.data.view(n, -1)
    per_chunk = max(1, CHUNK_ROWS_BYTES // (4 * k))
    u_NK = torch.empty(n, k, dtype=torch.int8)
    step_N, sum_N = torch.empty(n), torch.empty(n)
    buffer = torch.empty(min(per_chunk, n) * k)
    for start in range(0, n, per_chunk):
        part = slice(start, min(start + per_chunk, n))
        count = part.stop - start
        values = Packed(rows[part].reshape(-1), weight.type_id, (count, k)).values(torch.float32, buffer)
        step = torch.maximum(values.amax(1), -values.amin(1)).div_(LEVELS).clamp_min_(_TINY)
        rounded = torch.mul(
            values, step.reciprocal()[:, None], out=buffer[: count * k].view(count, k)
        ).round_()
        u_NK[part].copy_(rounded)
        step_N[part] = step
        sum_N[part] = rounded.sum(1).mul_(step)
    return u_NK, step_N, sum_N


def prepare(weight: Packed) -> Weight:
    """A packed weight in the layout of the kernel. Costs about as much as one product with 1,000 rows."""
    u_NK, step_N, sum_N = quantize_weight(weight)
    packed = torch.ops.onednn.qlinear_prepack(u_NK, None)
    return Weight(packed, step_N, sum_N, torch.zeros(len(step_N), dtype=torch.int64), u_NK.nbytes)


def product(rows: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    """float32 [M, N]: see the top of this file."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows.q_MK, 1.0, 128, weight.packed, weight.step_N, weight.zero_N, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    offset = torch.zeros(weight.n_out) if bias is None else bias
    y = torch.addcmul(offset, y, rows.step_M1, out=y)
    return y.addcmul_(rows.centre_M1, weight.sum_N)


def gelu_(x: Tensor) -> Tensor:
    """GELU (tanh approximation) in place on float32: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), in half the time."""
    inner = torch.square(x).mul_(1.5957691216057308 * 0.044715).add_(1.5957691216057308)
    return x.mul_(inner.mul_(x).sigmoid_())


def rows_in_cache(n_out: int) -> int:
    return max(64, PIECE_BYTES // (4 * n_out))


def pieces(n_rows: int, n_out: int) -> Iterator[slice]:
    """Parts of rows whose float32 results are at most PIECE_BYTES, of nearly equal size."""
    most = rows_in_cache(n_out)
    count = -(-n_rows // most)
    size = -(-n_rows // count)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


class Int8:
    """The `Precision` of this file: weights are converted at their first product and kept."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self._weights: dict[int, Weight] = {}

    def admit(self, weight: Packed) -> None:
        """Nothing to prepare."""

    def linear(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        """float32 [..., N], or after GELU bfloat16."""
        shared = x if isinstance(x, Shared) else Shared(x)
        shape = shared.x.shape
        ready = self._ready(weight)
        n_rows = shape[:-1].numel()
        parts = list(pieces(n_rows, ready.n_out))
        rows = shared.made("int8", lambda x: quantize_rows(x.flatten(0, -2)))
        if len(parts) == 1 and not gelu:
            return product(rows, ready, bias).view(*shape[:-1], -1)
        out = torch.empty(n_rows, ready.n_out, dtype=self.dtype if gelu else torch.float32)
        for part in parts:
            piece = Rows(rows.q_MK[part], rows.step_M1[part], rows.centre_M1[part])
            y = product(piece, ready, bias)
            out[part] = gelu_(y) if gelu else y
        return out.view(*shape[:-1], -1)

    def fuses_gelu(self, device: torch.device) -> bool:
        return True

    def rows_at_once(self, n_out: int) -> int:
        return rows_in_cache(n_out)

    def _ready(self, weight: Packed) -> Weight:
        key = weight.data.data_ptr()
        if key not in self._weights:
            with torch.inference_mode(False):
                self._weights[key] = prepare(weight)
        return self._weights[key]
