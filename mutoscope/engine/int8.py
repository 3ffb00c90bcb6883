"""Products of 8-bit integers: twice the speed of bfloat16 on CPUs with instructions for them (VNNI, AMX).

    x [M, K] = s_m (q_mk - z) + c          every row (token) by its own range: q uint8, step s
    w [N, K] = t_n u_nk                    every output channel by its largest weight: u int8, step t

    x w^T = s_m t_n (q - z) u^T + c sum_k w_nk

The integer product and t_n are the library's (oneDNN, by `onednn::qlinear_pointwise`); s_m and an offset follow as one
pass over its float32 result. Most activations are about symmetric: z = 128, c = 0. Those after GELU are not: z = 0
and c is the least that GELU gives, which doubles their resolution. The error is about 1 % of the product on
Gaussian numbers.

Rows are worked through in pieces whose results stay in the cache: fresh memory beyond 32 MiB costs more than the
arithmetic on it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import psutil
import torch
from torch import Tensor

from mutoscope.engine import kernels
from mutoscope.engine.kernels import Product
from mutoscope.engine.linear import Packed, Shared

PIECE_BYTES = 18 << 20
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
    """Activations: uint8 [M, K], float32 [M, 1] steps, and what all rows have in common: zero point and offset."""

    q_MK: Tensor
    step_M1: Tensor
    zero: int
    offset: float

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.q_MK[part], self.step_M1[part], self.zero, self.offset)


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


def quantize_rows(x: Tensor, low: float | None = None) -> Rows:
    """float [M, K] to 8 bits, nearest, each row by its own range. `low`: what no number is below, if that is known."""
    if low is None and x.device.type == "cpu" and kernels.fits(x.shape[1]) and x.is_contiguous():
        return Rows(*kernels.quantised(x), 128, 0.0)
    q_MK = torch.empty(x.shape, dtype=torch.int8)
    step_M1 = torch.empty(len(x), 1)
    for part in pieces(*x.shape):
        values = x[part].float()
        high = values.amax(1, keepdim=True)
        if low is None:
            high = torch.maximum(high, -values.amin(1, keepdim=True))
            step = torch.div(high, LEVELS, out=step_M1[part]).clamp_min_(_TINY)
            scaled = values * step.reciprocal()
        else:
            step = torch.div(high - low, 2 * LEVELS, out=step_M1[part]).clamp_min_(_TINY)
            inverse = step.reciprocal()
            scaled = torch.addcmul(-LEVELS - low * inverse, values, inverse)
        q_MK[part] = scaled.round_()
    # float to int8 is five times as fast as to uint8; flipping the top bit then adds 128.
    zero, offset = (128, 0.0) if low is None else (128 - LEVELS, low)
    return Rows(q_MK.view(torch.uint8).bitwise_xor_(128), step_M1, zero, offset)


def rows_of(given: Shared) -> Rows:
    """Activations [..., K] as 8-bit rows, made once."""
    rows: Rows = given.made("int8", lambda x: quantize_rows(x.flatten(0, -2), given.low))
    return rows


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


def unfinished(rows: Rows, weight: Weight, bias: Tensor | None) -> Product:
    """What the kernel computes, [M, N], and what remains to be done to it."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows.q_MK, 1.0, rows.zero, weight.packed, weight.step_N, weight.zero_N, None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    if rows.offset:
        shift = weight.sum_N * rows.offset
        bias = shift if bias is None else bias + shift
    return Product(y, rows.step_M1, bias)


def product(rows: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    """float32 [M, N]: see the top of this file."""
    p = unfinished(rows, weight, bias)
    y, step = p.y_MN, rows.step_M1
    return y.mul_(step) if p.bias is None else torch.addcmul(p.bias, y, step, out=y)


def gelu_(x: Tensor) -> Tensor:
    """GELU (tanh approximation) in place on float32: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), in half the time."""
    twice = 2 * (2 / math.pi) ** 0.5
    inner = torch.addcmul(torch.tensor(twice), x, x, value=twice * 0.044715)
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
    """The `Precision` of this file.

    Weights are converted when they are needed, those that are needed next in a thread beside, and kept as far as
    `settle` allows; what is kept or not changes no result.
    """

    dtype = torch.bfloat16
    AHEAD = 8
    """Weights that are converted before they are needed: those of one block."""
    RECENT = 2
    """Weights that are held for a moment though they are not kept."""

    def __init__(self) -> None:
        self._order: dict[int, Packed] = {}
        self._following: dict[int, int] = {}
        self._last: int | None = None
        self._ready: dict[int, Weight] = {}
        self._recent: OrderedDict[int, Weight] = OrderedDict()
        self._coming: OrderedDict[int, Future[Weight]] = OrderedDict()
        self._room_bytes = psutil.virtual_memory().available // 2  # until told otherwise
        self.kept_bytes = 0
        self._thread: ThreadPoolExecutor | None = None

    def admit(self, weight: Packed) -> None:
        """Until it is seen otherwise, weights are expected in the order in which they are admitted."""
        key = weight.data.data_ptr()
        if self._order and key not in self._order:
            self._following[next(reversed(self._order))] = key
        self._order[key] = weight

    def settle(self, room_bytes: int) -> int:
        """Forgets what is kept beyond. The block in work and the one ahead of it are needed in any case."""
        sizes = sorted((weight.numel for weight in self._order.values()), reverse=True)
        in_work = sum(sizes[: self.AHEAD + self.RECENT + 2])
        self._room_bytes = max(0, room_bytes - in_work) if sum(sizes) > room_bytes else room_bytes
        if self.kept_bytes > self._room_bytes:
            self._ready.clear()
            self.kept_bytes = 0
        return min(sum(sizes), max(room_bytes, in_work))

    def linear(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        """float32 [..., N]. `bias` may also be one of each row, float32 [M, N]."""
        given = x if isinstance(x, Shared) else Shared(x)
        shape = given.shape
        ready = self._converted(weight)
        n_rows = shape[:-1].numel()
        rows = rows_of(given)
        parts = list(pieces(n_rows, ready.n_out))
        out = torch.empty(n_rows, ready.n_out) if len(parts) > 1 else None
        for part in parts:
            y = product(rows[part], ready, bias[part] if bias is not None and bias.ndim == 2 else bias)
            y = gelu_(y) if gelu else y
            if out is not None:
                out[part] = y
        return (y if out is None else out).view(*shape[:-1], -1)

    def products(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None
    ) -> Iterator[tuple[slice, Product]]:
        rows, ready = rows_of(x if isinstance(x, Shared) else Shared(x)), self._converted(weight)
        for part in pieces(len(rows.q_MK), ready.n_out):
            yield (
                part,
                unfinished(rows[part], ready, bias[part] if bias is not None and bias.ndim == 2 else bias),
            )

    def fuses_gelu(self, device: torch.device) -> bool:
        return True

    def rows_at_once(self, n_out: int) -> int:
        return rows_in_cache(n_out)

    def _converted(self, weight: Packed) -> Weight:
        """From what is kept, or from the thread, or made here; and the next ones are sent for."""
        key = weight.data.data_ptr()
        if self._last is not None and self._last != key:
            self._following[self._last] = key
        self._last = key
        if key in self._ready:
            return self._ready[key]
        made = self._recent.get(key)
        if made is None:
            coming = self._coming.pop(key, None)
            self._send_for_those_after(key)
            made = _prepare_and_drop(weight) if coming is None else coming.result()
            if self.kept_bytes + made.nbytes <= self._room_bytes:
                self._ready[key] = made
                self.kept_bytes += made.nbytes
                return made
        # The wide layers take turns, a run of tokens each: what is not kept must outlast that.
        self._recent[key] = made
        self._recent.move_to_end(key)
        while len(self._recent) > self.RECENT:
            self._recent.popitem(last=False)
        return made

    def _send_for_those_after(self, key: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "int8")
        here = key
        for _ in range(self.AHEAD):
            if key not in self._following:
                break
            key = self._following[key]
            held = key in self._ready or key in self._recent or key in self._coming
            if key != here and key in self._order and not held:
                self._coming[key] = self._thread.submit(_prepare_and_drop, self._order[key])
        while len(self._coming) > self.AHEAD:
            self._coming.popitem(last=False)[1].cancel()


def _prepare_and_drop(weight: Packed) -> Weight:
    """`prepare`, then let go of the file's pages: they are not needed beside the converted weight."""
    with torch.inference_mode(False), torch.no_grad():
        made = prepare(weight)
    weight.drop_pages()
    return made
