"""The passes between the products of a transformer block, each as one pass over memory (`jit.py`).

    layer norm with weight and bias   ->  8 bits by each row's range, or bfloat16
    a product, GELU                   ->  8 bits
    a product, RMS norm, rotation     ->  bfloat16 by heads, as attention wants it
    a product, times a gate           ->  added to the stream
    logits                            ->  softmax in place
    blocks of Q8_0                    ->  bfloat16

And of the VAE: RMS norm and SiLU.

A row stays in the first-level cache meanwhile; library operations would each go through memory, together two to
seven times as long (docs/LOG.md). Tensors are contiguous rows whose width `fits`; nothing is checked here. A product
comes as a `Product`: float32 still without the steps of its rows and the bias, which are brought on the way, or
bfloat16 and complete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mutoscope.engine import jit
from mutoscope.engine.jit import F32, LANES, Compiled, Kernel, Value, Variable

WIDEST = 1 << 14
"""Of a row: the scratch of a thread lies on its stack."""
LEVELS = 127
_TINY = 1e-30
_MINUS_INFINITY = -128  # the bits of it in bfloat16, as an integer
_LOG2E = 1 / math.log(2)
_KINDS = {torch.float32: "float", torch.bfloat16: "bfloat"}


@dataclass(frozen=True)
class Product:
    """Rows [M, N] of a product before its last pass, which is the caller's: y * step + bias (+ y2 * step2).

    Without step it is complete, in bfloat16. The second product is the low-rank side path of a LoRA.
    """

    y_MN: Tensor
    step_M1: Tensor | None = None
    bias: Tensor | None = None
    """[N], or of each row [M, N]."""
    y2_MN: Tensor | None = None
    step2_M1: Tensor | None = None

    @property
    def kind(self) -> str:
        if self.step_M1 is None:
            return _KINDS[self.y_MN.dtype]
        return "steps" if self.y2_MN is None else "two"

    @property
    def values(self) -> tuple[Tensor | int | None, ...]:
        """For the parameters of `_Product`."""
        width = self.y_MN.shape[1]
        bias = _zeros(width) if self.bias is None else self.bias
        return self.y_MN, self.step_M1, bias, _stride(bias, width), self.y2_MN, self.step2_M1


def fits(*widths: int) -> bool:
    """Whether kernels can be used, and for rows of these widths."""
    return all(width % LANES == 0 and width <= WIDEST for width in widths) and jit.available()


# ---------------------------------------------------------------- calls


def normed_int8(x_BLD: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """layer_norm(x) * weight + bias, with [B or 1, D] of these, to uint8 [B L, D] about 128 and steps [B L, 1]."""
    n, width = x_BLD.shape[0] * x_BLD.shape[1], x_BLD.shape[2]
    out, step = torch.empty(n, width, dtype=torch.uint8), torch.empty(n, 1)
    _normed("i8")(n, *_rows_of(x_BLD), weight, bias, _stride(weight, width), eps, width, out, step)
    return out, step


def normed_bfloat16(x_BLD: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same to bfloat16 [B, L, D]."""
    width = x_BLD.shape[2]
    out = torch.empty(x_BLD.shape, dtype=torch.bfloat16)
    n = out.numel() // width
    _normed("bfloat")(n, *_rows_of(x_BLD), weight, bias, _stride(weight, width), eps, width, out, None)
    return out


def quantised(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """float32 or bfloat16 rows to uint8 about 128 and steps [M, 1]."""
    out, step = torch.empty(x_MK.shape, dtype=torch.uint8), torch.empty(len(x_MK), 1)
    _quantise(_KINDS[x_MK.dtype])(len(x_MK), x_MK, x_MK.shape[1], out, step)
    return out, step


def gelu_int8(product: Product, low: float, q_MN: Tensor, step_M1: Tensor) -> None:
    """GELU (tanh) of a product to uint8 whose least level is `low`, into the last two."""
    _gelu(product.kind, low)(len(q_MN), *product.values, q_MN.shape[1], q_MN, step_M1)


def heads(
    product: Product, out: Tensor, *,
    first: int, length: int, head: int, scale: float = 1.0, weight: Tensor | None = None, eps: float = 0.0,
    rope: Tensor | None = None, common_N: Tensor | None = None, every: int = 1,
) -> None:  # fmt: skip
    """Rows `first`, `first` + `every`, ... of B x `length` tokens: RMS norm of the whole row if there is a weight,
    rotation if there is a table, less `common_N`, times `scale`.

    Into bfloat16 [B, H, L or more, D], or, without `common` and `scale`, into float32 rows [M / every, N].
    """
    n_rows, width = product.y_MN.shape
    kernel = _heads(product.kind, _KINDS[out.dtype], weight is not None, rope is not None)
    common = _zeros(width) if common_N is None else common_N
    kernel(
        -(-n_rows // every), *product.values, weight, eps,
        rope, 0 if rope is None else rope.stride(0), common, width, head, first, length,
        out.shape[2] if out.ndim == 4 else 0, every, scale, out,
    )  # fmt: skip


def add_gated(x_BLD: Tensor, product: Product, gate: Tensor | float, first: int) -> None:
    """x += product * gate from row `first` of x on; the gate is a number or [B or 1, 1, D]."""
    width = x_BLD.shape[2]
    gate = torch.full((width,), gate) if isinstance(gate, float) else gate.contiguous()
    _gated(product.kind)(
        len(product.y_MN), *product.values, *_rows_of(x_BLD), gate, _stride(gate, width), width, first
    )


def softmax_(logits_LS: Tensor, n: int) -> None:
    """Over the first n of each row, in place on contiguous bfloat16; the others become 0. Statistics are float32."""
    _softmax()(len(logits_LS), logits_LS, n, logits_LS.shape[1])


def q8_0_to_bfloat16(blocks: Tensor, out: Tensor) -> None:
    """Packed Q8_0 (34 bytes for 32 numbers) to bfloat16, rounded once."""
    _q8_0()(out.numel() // 32, blocks, out)


def rms_silu(x_MC: Tensor, gamma: Tensor, out_MC: Tensor) -> None:
    """silu(x / |x| * gamma) on bfloat16 rows, |x| their L2 norm; both are given by their memory, in the same order."""
    width = gamma.numel()
    _rms_silu()(x_MC.numel() // width, x_MC, gamma, width, out_MC)


@cache
def _zeros(width: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(width)


def _stride(vectors: Tensor | None, width: int) -> int:
    """From one vector to the next; 0 if there is one for all."""
    return width if vectors is not None and vectors.numel() > width else 0


def _rows_of(x_BLD: Tensor) -> tuple[Tensor, int, int]:
    """Memory, rows of a sample, and numbers from one sample to the next; rows of a sample are contiguous."""
    return x_BLD, x_BLD.shape[1], x_BLD.stride(0)


# ---------------------------------------------------------------- parts of kernels


class _Rows:
    """float32 rows of samples [B, L, D] that may lie apart."""

    def __init__(self, k: Kernel) -> None:
        self.base, self.length, self.stride = k.pointer(), k.integer(), k.integer()

    def find(self, row: Value, width: Value) -> None:
        self.sample = row / self.length
        self.at = self.sample * self.stride + row % self.length * width


class _Product:
    """Rows of a `Product` of that kind."""

    def __init__(self, k: Kernel, kind: str) -> None:
        self.k, self.kind = k, kind
        self.y, self.step, self.bias, self.bias_stride = k.pointer(), k.pointer(), k.pointer(), k.integer()
        self.y2, self.step2 = k.pointer(), k.pointer()

    def find(self, row: Value, width: Value) -> None:
        self.at = row * width
        self.bias_at = row * self.bias_stride
        if self.kind in ("steps", "two"):
            self.factor = self.k.splat(self.k.load_one(self.step, row))
        if self.kind == "two":
            self.factor2 = self.k.splat(self.k.load_one(self.step2, row))

    def load(self, i: Value) -> Value:
        if self.kind not in ("steps", "two"):
            return self.k.load(self.y, self.at + i, self.kind)
        y = self.k.load(self.y, self.at + i) * self.factor + self.k.load(self.bias, self.bias_at + i)
        return y + self.k.load(self.y2, self.at + i) * self.factor2 if self.kind == "two" else y


def unpack_q8_0(k: Kernel, blocks: Value, number: Value, out: Value | str, place: Value) -> None:
    """A block of Q8_0 to bfloat16, rounded once, at the place of another number."""
    scale = k.splat(k.load_one(blocks, number * 17, "half").cast("fpext", "float"))
    for part in range(0, 32, LANES):
        numbers = k.load(blocks, number * 34 + (2 + part), "i8")
        k.store(out, place * 32 + part, numbers * scale, "bfloat")


def _to_int8(
    k: Kernel, room: str, high: Value, low: float | None, width: Value, row: Value, out: Value, step: Value
) -> None:
    """A row in `room` whose largest (absolute, without `low`) is `high` to uint8 and its step: see `int8.Rows`."""
    size = k.maximum((high if low is None else high - low) / (LEVELS if low is None else 2 * LEVELS), _TINY)
    k.store(step, row, size)
    inverse = 1.0 / size
    factor = k.splat(inverse)
    offset = k.splat(inverse * -low - LEVELS) if low is not None else k.zeros()
    with k.loop(width) as i:
        whole = k.nearest(k.load(room, i) * factor + offset)
        k.store(out, row * width + i, k.low_bytes(whole).bits("xor", -128), "i8")


# ---------------------------------------------------------------- kernels


@cache
def _normed(kind: str) -> Compiled:
    k = Kernel(f"normed_{kind}")
    x = _Rows(k)
    weight, bias, stride, eps, width = k.pointer(), k.pointer(), k.integer(), k.number(), k.integer()
    out, step = k.pointer(), k.pointer()
    room = k.reserve("float", WIDEST)
    with k.rows() as row:
        x.find(row, width)
        of_sample = x.sample * stride
        n = width.to_float()
        total, squares, high = (Variable(k.zeros()) for _ in range(3))
        with k.loop(width) as i:
            total.set(total.get() + k.load(x.base, x.at + i))
        mean = k.splat(k.sum(total.get()) / n)
        with k.loop(width) as i:
            off = k.load(x.base, x.at + i) - mean
            squares.set(squares.get() + off * off)
        factor = k.splat(1.0 / k.call("sqrt", k.sum(squares.get()) / n + eps))
        with k.loop(width) as i:
            y = (k.load(x.base, x.at + i) - mean) * factor
            y = y * k.load(weight, of_sample + i) + k.load(bias, of_sample + i)
            if kind == "i8":
                k.store(room, i, y)
                high.set(k.maximum(high.get(), k.call("fabs", y)))
            else:
                k.store(out, row * width + i, y, "bfloat")
        if kind == "i8":
            _to_int8(k, room, k.largest(high.get()), None, width, row, out, step)
    return k.compiled()


@cache
def _quantise(kind: str) -> Compiled:
    k = Kernel(f"quantise_{kind}")
    x, width, out, step = k.pointer(), k.integer(), k.pointer(), k.pointer()
    room = k.reserve("float", WIDEST)
    with k.rows() as row:
        high = Variable(k.zeros())
        with k.loop(width) as i:
            y = k.load(x, row * width + i, kind)
            k.store(room, i, y)
            high.set(k.maximum(high.get(), k.call("fabs", y)))
        _to_int8(k, room, k.largest(high.get()), None, width, row, out, step)
    return k.compiled()


@cache
def _gelu(kind: str, low: float) -> Compiled:
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    k = Kernel("gelu")
    product = _Product(k, kind)
    width, out, step = k.integer(), k.pointer(), k.pointer()
    room = k.reserve("float", WIDEST)
    slope = -_LOG2E * 2 * (2 / math.pi) ** 0.5
    with k.rows() as row:
        product.find(row, width)
        high = Variable(k.zeros())
        with k.loop(width) as i:
            y = product.load(i)
            y = y / (k.exp2(y * (y * y * (slope * 0.044715) + slope)) + 1.0)
            k.store(room, i, y)
            high.set(k.maximum(high.get(), y))
        _to_int8(k, room, k.largest(high.get()), low, width, row, out, step)
    return k.compiled()


@cache
def _heads(kind: str, out_kind: str, norm: bool, turn: bool) -> Compiled:
    k = Kernel(f"heads_{kind}_{out_kind}_{norm}_{turn}")
    product = _Product(k, kind)
    weight, eps, table, sines, common = k.pointer(), k.number(), k.pointer(), k.integer(), k.pointer()
    width, head, first, length, out_length = (k.integer() for _ in range(5))
    every, scale, out = k.integer(), k.number(), k.pointer()
    room = k.reserve("float", WIDEST)
    with k.rows() as number:
        row = number * every
        product.find(row, width)
        squares = Variable(k.zeros())
        with k.loop(width) as i:
            y = product.load(i)
            k.store(room, i, y)
            squares.set(squares.get() + y * y)
        factor = k.splat(1.0 / k.call("sqrt", k.sum(squares.get()) / width.to_float() + eps))
        sample, place = (row + first) / length, (row + first) % length
        n_heads, size = width / head, k.splat(scale)
        with k.loop(n_heads, 1) as h:
            to = ((sample * n_heads + h) * out_length + place) * head
            with k.loop(head) as d:
                i = h * head + d
                y = k.load(room, i)
                if norm:
                    y = y * factor * k.load(weight, i)
                if turn:  # of pairs (a, b): (a cos - b sin, b cos + a sin)
                    angle = (place * head + d) / 2
                    cos, sin = k.load_pairs(table, angle), k.load_pairs(table, angle + sines)
                    y = y * cos + k.swapped(y) * (sin * k.alternating(-1.0, 1.0))
                if out_kind == "bfloat":
                    k.store(out, to + d, (y - k.load(common, i)) * size, "bfloat")
                else:
                    k.store(out, number * width + i, y)
    return k.compiled()


@cache
def _gated(kind: str) -> Compiled:
    k = Kernel(f"gated_{kind}")
    product, x = _Product(k, kind), _Rows(k)
    gate, gate_stride, width, first = k.pointer(), k.integer(), k.integer(), k.integer()
    with k.rows() as row:
        product.find(row, width)
        x.find(row + first, width)
        gate_at = x.sample * gate_stride
        with k.loop(width) as i:
            y = product.load(i) * k.load(gate, gate_at + i)
            k.store(x.base, x.at + i, k.load(x.base, x.at + i) + y)
    return k.compiled()


@cache
def _softmax() -> Compiled:
    k = Kernel("softmax")
    x, n, width = k.pointer(), k.integer(), k.integer()
    with k.rows() as row:
        at = row * width
        with k.between(n, width, 1) as i:
            k.store(x, at + i, k.constant(_MINUS_INFINITY, "i16"), "i16")
        high, total = Variable(k.constant(-math.inf, F32)), Variable(k.zeros())
        with k.loop(width) as i:
            high.set(k.maximum(high.get(), k.load(x, at + i, "bfloat")))
        top = k.splat(k.largest(high.get()))
        with k.loop(width) as i:
            e = k.exp2((k.load(x, at + i, "bfloat") - top) * _LOG2E)
            total.set(total.get() + e)
            k.store(x, at + i, e, "bfloat")
        inverse = k.splat(1.0 / k.sum(total.get()))
        with k.loop(width) as i:
            k.store(x, at + i, k.load(x, at + i, "bfloat") * inverse, "bfloat")
    return k.compiled()


@cache
def _rms_silu() -> Compiled:
    k = Kernel("rms_silu")
    x, gamma, width, out = k.pointer(), k.pointer(), k.integer(), k.pointer()
    with k.rows() as row:
        at = row * width
        squares = Variable(k.zeros())
        with k.loop(width) as i:
            y = k.load(x, at + i, "bfloat")
            squares.set(squares.get() + y * y)
        factor = k.splat(1.0 / k.call("sqrt", k.maximum(k.sum(squares.get()), 1e-24)))
        with k.loop(width) as i:
            y = k.load(x, at + i, "bfloat") * factor * k.load(gamma, i)
            k.store(out, at + i, y / (k.exp2(y * -_LOG2E) + 1.0), "bfloat")
    return k.compiled()


@cache
def _q8_0() -> Compiled:
    k = Kernel("q8_0")
    blocks, out = k.pointer(), k.pointer()
    with k.rows() as row:
        unpack_q8_0(k, blocks, row, out, row)
    return k.compiled()
