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
bfloat16 and complete. The second, narrow product of a LoRA is made within the pass, some rows at a time: to write and
read it would take longer than to compute it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine import jit
from mutoscope.engine.jit import F32, LANES, Compiled, Kernel, Value, Variable

WIDEST = 1 << 14
"""Of a row: the scratch of a thread lies on its stack."""
LEVELS = 127
SIDE_ROWS, SIDE_WIDTH = 6, 4 * LANES
"""Of a side product that a thread makes at a time: as many sums as there are registers for."""
_TINY = 1e-30
_MINUS_INFINITY = -128  # the bits of it in bfloat16, as an integer
_LOG2E = 1 / math.log(2)
_KINDS = {torch.float32: "float", torch.bfloat16: "bfloat"}


@dataclass(frozen=True)
class Up:
    """A matrix [N, R], R a multiple of LANES, that rows of 8 bits are multiplied by within a pass.

    packed: int8 [N / 64, R / 4, 64, 4]; step: [N] of each output; start: int32 [N], what 128 too much in every number
    of a row adds, negative. N with zeros to a multiple of 64.
    """

    packed: Tensor
    step_N: Tensor
    start_N: Tensor

    @staticmethod
    def of(matrix_NR: Tensor) -> Up:
        n, r = matrix_NR.shape
        if r % LANES:
            raise ValueError(f"a matrix of rank {r}: a multiple of {LANES} expected, with zeros")
        m = F.pad(matrix_NR.float(), (0, 0, 0, -n % SIDE_WIDTH))
        step = (m.abs().amax(1) / LEVELS).clamp_min(_TINY)
        u = (m / step[:, None]).round().to(torch.int8)
        packed = u.view(-1, SIDE_WIDTH, r // 4, 4).transpose(1, 2).contiguous()
        return Up(packed, step, u.sum(1, dtype=torch.int32) * -128)


@dataclass(frozen=True)
class Side:
    """The low-rank addition of a LoRA: ((q - 128) step) [M, R] times `up`."""

    q_MR: Tensor
    step_M1: Tensor
    up: Up


@dataclass(frozen=True)
class Product:
    """Rows [M, N] of a product before its last pass, which is the caller's: y * step + bias (+ side).

    Without step it is complete but for the side.
    """

    y_MN: Tensor
    step_M1: Tensor | None = None
    bias: Tensor | None = None
    """[N], or of each row [M, N]."""
    side: Side | None = None

    @property
    def kind(self) -> tuple[str, bool]:
        """Numbers as they are, or "steps"; whether there is a side."""
        return _KINDS[self.y_MN.dtype] if self.step_M1 is None else "steps", self.side is not None

    @property
    def values(self) -> tuple[Tensor | int | None, ...]:
        """For the parameters of `_Product`."""
        width = self.y_MN.shape[1]
        bias = _zeros(width) if self.bias is None else self.bias
        base = self.y_MN, self.step_M1, bias, _stride(bias, width)
        if self.side is None:
            return *base, None, None, 0, None, None, None
        q, up = self.side.q_MR, self.side.up
        return *base, q, self.side.step_M1, q.shape[1] // 4, up.packed, up.step_N, up.start_N


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


def quantised(x_MK: Tensor | Product) -> tuple[Tensor, Tensor]:
    """float32 or bfloat16 rows, or a product, to uint8 about 128 and steps [M, 1]."""
    x = Product(x_MK) if isinstance(x_MK, Tensor) else x_MK
    n_rows, width = x.y_MN.shape
    out, step = torch.empty(n_rows, width, dtype=torch.uint8), torch.empty(n_rows, 1)
    _quantise(x.kind)(n_rows, *x.values, width, out, step)
    return out, step


def gelu_int8(product: Product, low: float, q_MN: Tensor, step_M1: Tensor) -> None:
    """GELU (tanh) of a product to uint8 whose least level is `low`, into the last two."""
    _gelu(product.kind, low)(len(q_MN), *product.values, q_MN.shape[1], q_MN, step_M1)


def gelu_bfloat16(product: Product, out_MN: Tensor) -> None:
    """GELU (tanh) of a product to bfloat16, which may be where the product lies."""
    _gelu_bfloat16(product.kind)(len(out_MN), *product.values, out_MN.shape[1], out_MN)


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


def softmax_(logits_LS: Tensor, n: int, bias_S: Tensor | None = None) -> None:
    """Over the first n of each row, in place on contiguous bfloat16; the others become 0. Statistics are float32.

    bias: float32, added to every row first.
    """
    _softmax(bias_S is not None)(len(logits_LS), logits_LS, n, logits_LS.shape[1], bias_S)


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

    def __init__(self, k: Kernel, kind: tuple[str, bool]) -> None:
        self.k = k
        self.kind, self.has_side = kind
        self.base_kind = "float" if self.kind == "steps" else self.kind
        self.y, self.step, self.bias, self.bias_stride = k.pointer(), k.pointer(), k.pointer(), k.integer()
        self.low, self.low_step, self.quads = k.pointer(), k.pointer(), k.integer()
        self.up, self.up_step, self.up_start = k.pointer(), k.pointer(), k.pointer()
        self.room = k.reserve("float", SIDE_ROWS * WIDEST) if self.has_side else ""

    def find(self, number: Value, width: Value, every: Value | int = 1) -> None:
        """Row `number` * `every`; numbers come one after the other, as `Kernel.rows` gives them."""
        row = number * every
        self.at = row * width
        self.bias_at = row * self.bias_stride
        if self.kind == "steps":
            self.factor = self.k.splat(self.k.load_one(self.step, row))
        if self.has_side:
            self.low_factor = self.k.splat(self.k.load_one(self.low_step, row))
            self._make_side(number, width, every)

    def load(self, i: Value) -> Value:
        k = self.k
        y = k.load(self.y, self.at + i, self.base_kind)
        if self.kind == "steps":
            y = y * self.factor + k.load(self.bias, self.bias_at + i)
        return y + k.load(self.room, self.side_at + i) * self.low_factor if self.has_side else y

    def _make_side(self, number: Value, width: Value, every: Value | int) -> None:
        """The side product of this row and the next ones, if this is the first of them."""
        k, lanes = self.k, range(0, SIDE_WIDTH, LANES)
        room_width = (width + (SIDE_WIDTH - 1)) / SIDE_WIDTH * SIDE_WIDTH
        place = (number - k.first_row) % SIDE_ROWS
        self.side_at = place * room_width
        with k.between(place, k.constant(1, "i64"), 1):
            rows = [k.smaller(number + g, k.n_rows - 1) * every for g in range(SIDE_ROWS)]
            starts = [row * self.quads for row in rows]
            with k.loop(width, SIDE_WIDTH) as i:
                begin = [k.load(self.up_start, i + lane, "i32") for lane in lanes]
                sums = [[Variable(b) for b in begin] for _ in rows]
                with k.loop(self.quads, 1) as quad:
                    at = i * self.quads + quad * SIDE_WIDTH
                    up = [k.load(self.up, at + lane, "i32") for lane in lanes]
                    for row_sums, start in zip(sums, starts, strict=True):
                        low = k.splat(k.load_one(self.low, start + quad, "i32"))
                        for total, four in zip(row_sums, up, strict=True):
                            total.set(k.add_dots(total.get(), low, four))
                steps = [k.load(self.up_step, i + lane) for lane in lanes]
                for g, (row, row_sums) in enumerate(zip(rows, sums, strict=True)):
                    for total, lane, step in zip(row_sums, lanes, steps, strict=True):
                        k.prefetch(self.y, row * width + i + lane, self.base_kind)
                        k.store(self.room, room_width * g + i + lane, total.get().cast("sitofp", F32) * step)


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
def _quantise(kind: tuple[str, bool]) -> Compiled:
    k = Kernel("quantise")
    x, width, out, step = _Product(k, kind), k.integer(), k.pointer(), k.pointer()
    room = k.reserve("float", WIDEST)
    with k.rows() as row:
        x.find(row, width)
        high = Variable(k.zeros())
        with k.loop(width) as i:
            y = x.load(i)
            k.store(room, i, y)
            high.set(k.maximum(high.get(), k.call("fabs", y)))
        _to_int8(k, room, k.largest(high.get()), None, width, row, out, step)
    return k.compiled()


def _gelu_of(k: Kernel, y: Value) -> Value:
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    slope = -_LOG2E * 2 * (2 / math.pi) ** 0.5
    return y / (k.exp2(y * (y * y * (slope * 0.044715) + slope)) + 1.0)


@cache
def _gelu(kind: tuple[str, bool], low: float) -> Compiled:
    k = Kernel("gelu")
    product = _Product(k, kind)
    width, out, step = k.integer(), k.pointer(), k.pointer()
    room = k.reserve("float", WIDEST)
    with k.rows() as row:
        product.find(row, width)
        high = Variable(k.zeros())
        with k.loop(width) as i:
            y = _gelu_of(k, product.load(i))
            k.store(room, i, y)
            high.set(k.maximum(high.get(), y))
        _to_int8(k, room, k.largest(high.get()), low, width, row, out, step)
    return k.compiled()


@cache
def _gelu_bfloat16(kind: tuple[str, bool]) -> Compiled:
    k = Kernel("gelu_bfloat")
    product, width, out = _Product(k, kind), k.integer(), k.pointer()
    with k.rows() as row:
        product.find(row, width)
        with k.loop(width) as i:
            k.store(out, row * width + i, _gelu_of(k, product.load(i)), "bfloat")
    return k.compiled()


@cache
def _heads(kind: tuple[str, bool], out_kind: str, norm: bool, turn: bool) -> Compiled:
    k = Kernel(f"heads_{out_kind}_{norm}_{turn}")
    product = _Product(k, kind)
    weight, eps, table, sines, common = k.pointer(), k.number(), k.pointer(), k.integer(), k.pointer()
    width, head, first, length, out_length = (k.integer() for _ in range(5))
    every, scale, out = k.integer(), k.number(), k.pointer()
    room = k.reserve("float", WIDEST)
    with k.rows() as number:
        row = number * every
        product.find(number, width, every)
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
def _gated(kind: tuple[str, bool]) -> Compiled:
    k = Kernel("gated")
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
def _softmax(biased: bool) -> Compiled:
    k = Kernel("softmax")
    x, n, width, bias = k.pointer(), k.integer(), k.integer(), k.pointer()

    def logits(at: Value, i: Value) -> Value:
        y = k.load(x, at + i, "bfloat")
        return y + k.load(bias, i) if biased else y

    with k.rows() as row:
        at = row * width
        with k.between(n, width, 1) as i:
            k.store(x, at + i, k.constant(_MINUS_INFINITY, "i16"), "i16")
        high, total = Variable(k.constant(-math.inf, F32)), Variable(k.zeros())
        with k.loop(width) as i:
            high.set(k.maximum(high.get(), logits(at, i)))
        top = k.splat(k.largest(high.get()))
        with k.loop(width) as i:
            e = k.exp2((logits(at, i) - top) * _LOG2E)
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
