"""Quantised tensor types: packed bytes to numbers and back. Each type is a row of `QUANTS`.

Layouts: ggml `src/ggml-common.h` and gguf-py `gguf/quants.py`, ggml commit d99724f. Values are bit-exact
with gguf-py: the same float32 products and differences in the same order.

Shapes: N blocks, one type's block has E elements in B bytes.

    dequantize(blocks_NB uint8, y_NE float32) -> None       fills y
    quantize(x_NE float32) -> blocks_NB uint8

How it is fast in plain torch (measured in docs/quants.md):
- work goes in chunks that stay in the cache, so only packed bytes and final values touch memory;
- bits are unpacked four bytes at a time, as int32 words (`_unpack`);
- one float32 scratch is reused for all chunks and cast once into the result.

Details that have caused bugs:
- w = d*q - m must round twice; a fused multiply-add differs in the last bit.
- Q3_K's high bit is inverted: a clear bit subtracts 4.
- Q6_K's 32-element planes pair low nibbles of bytes 0-31, 32-63, then the high nibbles of the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mutoscope.engine.gguf import BLOCKS, GGMLType, type_name
from mutoscope.errors import GGUFError

# 2 MiB of float32 scratch: the measured optimum on CPU. A GPU wants few, large launches.
CHUNK_CPU = 1 << 19
CHUNK_GPU = 1 << 25

FLOAT16_MAX = 65504.0
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Quant:
    """One tensor type. The functions see whole blocks only; sizes were checked before."""

    type_id: GGMLType
    dequantize: Callable[[Tensor, Tensor], None]
    quantize: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:
        return self.type_id.name

    @property
    def block(self) -> int:
        return BLOCKS[self.type_id].elements

    @property
    def nbytes(self) -> int:
        return BLOCKS[self.type_id].nbytes


def dequantize(
    type_id: int, packed: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Numbers of packed rows: uint8 [..., row bytes] to `dtype` [..., columns], on the device of `packed`.

    `out`, contiguous and of the result's shape, receives the values in its own dtype (then `dtype` is not
    used). Values are computed in float32 and rounded once.

    Raises:
        GGUFError: the type has no row in `QUANTS`, or the last dimension is not a whole number of blocks.
        ValueError: `packed` is not uint8, or `out` has the wrong shape or layout.
    """
    quant = _row(type_id)
    shape = (*packed.shape[:-1], _columns(quant, packed))
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out has shape {list(out.shape)}, expected contiguous {list(shape)}")
    blocks_NB = packed.reshape(-1, quant.nbytes)
    out_NE = out.view(-1, quant.block)
    step = max(1, (CHUNK_CPU if packed.device.type == "cpu" else CHUNK_GPU) // quant.block)
    direct = out.dtype == torch.float32
    scratch_NE = (
        out_NE if direct else out_NE.new_empty(min(step, len(out_NE)), quant.block, dtype=torch.float32)
    )
    for start in range(0, len(blocks_NB), step):
        chunk_NB, result_NE = blocks_NB[start : start + step], out_NE[start : start + step]
        y_NE = result_NE if direct else scratch_NE[: len(chunk_NB)]
        quant.dequantize(chunk_NB, y_NE)
        if not direct:
            result_NE.copy_(y_NE)
    return out


def quantize(type_id: int, x: Tensor) -> Tensor:
    """Pack rows of numbers: float [..., columns] to uint8 [..., row bytes], on the device of `x`.

    Raises:
        GGUFError: the type has no row in `QUANTS`, or the last dimension is not a whole number of blocks.
        ValueError: a number is not finite, or beyond what the type's float16 factors reach.
    """
    quant = _row(type_id)
    columns = x.shape[-1] if x.ndim else 1
    if columns % quant.block:
        raise GGUFError(f"{quant.name}: rows of {columns} values, expected a multiple of {quant.block}")
    limit = FLOAT32_MAX if quant.type_id in (GGMLType.F32, GGMLType.BF16) else FLOAT16_MAX
    if x.numel() and not (peak := x.abs().max().item()) <= limit:
        raise ValueError(f"{quant.name} holds numbers up to {limit:g}, got {peak:g}")
    blocks_NE = x.reshape(-1, quant.block)
    step = max(1, (CHUNK_CPU if x.device.type == "cpu" else CHUNK_GPU) // quant.block)
    packed_NB = torch.empty(len(blocks_NE), quant.nbytes, dtype=torch.uint8, device=x.device)
    for start in range(0, len(blocks_NE), step):
        packed_NB[start : start + step] = quant.quantize(blocks_NE[start : start + step].float())
    return packed_NB.view(*x.shape[:-1], columns // quant.block * quant.nbytes)


def dequantize_rows(type_id: int, packed: Tensor, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows of a packed table: uint8 [R, row bytes], int64 [L] to `dtype` [L, columns].

    Touches nothing but those rows, so a token table can stay in its memory-mapped file.
    """
    return dequantize(type_id, packed.index_select(0, rows), dtype)


def as_tensor(data: np.ndarray) -> Tensor:
    """A tensor over the memory of a read-only array such as `GGUFFile.data` gives. Never write to it."""
    return torch.from_numpy(np.asarray(_Borrowed(data)))


class _Borrowed:
    """Keeps a read-only array alive and lends its memory: torch warns about arrays that say read-only."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _row(type_id: int) -> Quant:
    if type_id not in QUANTS:
        raise GGUFError(
            f"tensor type {type_id} ({type_name(type_id)}) has no conversion to numbers.",
            hint=f"Supported: {', '.join(quant.name for quant in QUANTS.values())}.",
        )
    return QUANTS[type_id]


def _columns(quant: Quant, packed: Tensor) -> int:
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed has dtype {packed.dtype}, expected torch.uint8")
    if packed.ndim == 0 or packed.shape[-1] % quant.nbytes:
        raise GGUFError(
            f"{quant.name}: rows of {packed.shape[-1] if packed.ndim else 0} bytes, "
            f"expected a multiple of {quant.nbytes}"
        )
    return packed.shape[-1] // quant.nbytes * quant.block


# ---------------------------------------------------------------- bits to numbers


def _as(dtype: torch.dtype, bytes_NB: Tensor) -> Tensor:
    """Reinterpret a part of each block. The copy gives it the alignment and strides `view` insists on."""
    return bytes_NB.clone(memory_format=torch.contiguous_format).view(dtype)


def _half(bytes_NB: Tensor) -> Tensor:
    """uint8 [N, 2k] holding float16 to float32 [N, k]."""
    return _as(torch.float16, bytes_NB).float()


def _signed(bytes_NB: Tensor) -> Tensor:
    return _as(torch.int8, bytes_NB)


def _words(bytes_NB: Tensor, groups: int = 1) -> Tensor:
    """uint8 [N, B] as int32 [N, groups, B / groups / 4]: bit operations then treat four bytes at once."""
    return _as(torch.int32, bytes_NB).view(len(bytes_NB), groups, -1)


def _shift(words: Tensor, by: int) -> Tensor:
    """Shift right by `by` bits, left if negative. Stray bits of neighbours are left for a mask."""
    return words >> by if by > 0 else words << -by if by < 0 else words


def _unpack(words_NGW: Tensor, shifts: range, mask: int) -> Tensor:
    """Bit fields of packed bytes: int32 [N, G, W] to int32 [N, G, len(shifts), W].

    Plane k holds `(byte >> shifts[k]) & mask` of every byte. `mask` applies to one byte.
    """
    n, groups, width = words_NGW.shape
    planes = words_NGW.new_empty(n, groups, len(shifts), width)
    for k, shift in enumerate(shifts):
        torch.bitwise_and(_shift(words_NGW, shift), mask * 0x01010101, out=planes[:, :, k])
    return planes


NIBBLES, PAIRS, BITS = range(0, 8, 4), range(0, 8, 2), range(8)


def _bytes(words: Tensor, *shape: int) -> Tensor:
    return words.view(torch.uint8).view(words.shape[0], *shape)


def _f32(blocks: Tensor, y: Tensor) -> None:
    y.copy_(_as(torch.float32, blocks))


def _f16(blocks: Tensor, y: Tensor) -> None:
    y.copy_(_as(torch.float16, blocks))


def _bf16(blocks: Tensor, y: Tensor) -> None:
    y.copy_(_as(torch.bfloat16, blocks))


def _q4_0(blocks: Tensor, y: Tensor) -> None:
    q = _bytes(_unpack(_words(blocks[:, 2:]), NIBBLES, 0x0F), 32).view(torch.int8).sub_(8)
    y.copy_(q).mul_(_half(blocks[:, :2]))


def _q4_1(blocks: Tensor, y: Tensor) -> None:
    d, m = _half(blocks[:, :4]).split(1, dim=1)
    q = _bytes(_unpack(_words(blocks[:, 4:]), NIBBLES, 0x0F), 32)
    y.copy_(q).mul_(d).add_(m)


@cache
def _spread_bits(device: torch.device) -> Tensor:
    """int64 [256]: entry b, read as 8 bytes, holds bit k of b in byte k, at the place of a fifth bit (16)."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits * 16).to(torch.uint8).view(torch.int64).view(256).to(device)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Q5_0 and Q5_1: uint8 [N, 16] nibbles and uint8 [N, 4] with bit i for element i, to uint8 [N, 32]."""
    q = _bytes(_unpack(_words(low), NIBBLES, 0x0F), 32)
    fifth = _spread_bits(high.device).index_select(0, high.int().view(-1))
    return q.bitwise_or_(fifth.view(torch.uint8).view(-1, 32))


def _q5_0(blocks: Tensor, y: Tensor) -> None:
    q = _five_bits(blocks[:, 6:], blocks[:, 2:6]).view(torch.int8).sub_(16)
    y.copy_(q).mul_(_half(blocks[:, :2]))


def _q5_1(blocks: Tensor, y: Tensor) -> None:
    d, m = _half(blocks[:, :4]).split(1, dim=1)
    y.copy_(_five_bits(blocks[:, 8:], blocks[:, 4:8])).mul_(d).add_(m)


def _q8_0(blocks: Tensor, y: Tensor) -> None:
    y.copy_(_signed(blocks[:, 2:])).mul_(_half(blocks[:, :2]))


def _q2_k(blocks: Tensor, y: Tensor) -> None:
    d, dmin = _half(blocks[:, 80:]).split(1, dim=1)
    scales = blocks[:, :16]
    scale, low = (scales & 0x0F).float().mul_(d), (scales >> 4).float().mul_(dmin)
    q = _bytes(_unpack(_words(blocks[:, 16:80], 2), PAIRS, 0x03), 16, 16)
    y.view(-1, 16, 16).copy_(q).mul_(scale.unsqueeze(-1)).sub_(low.unsqueeze(-1))


def _q3_k_scales(packed: Tensor) -> Tensor:
    """uint8 [N, 12] to int8 [N, 16]: low nibbles in bytes 0-7, two high bits each in bytes 8-11."""
    low = _unpack(_words(packed[:, :8]), NIBBLES, 0x0F).view(-1, 4)
    high = _unpack(_words(packed[:, 8:]), PAIRS, 0x03).view(-1, 4)
    return _signed(_bytes(low.bitwise_or_(high << 4), 16)).sub_(32)


def _q3_k(blocks: Tensor, y: Tensor) -> None:
    scale = _q3_k_scales(blocks[:, 96:108]).float().mul_(_half(blocks[:, 108:]))
    low = _unpack(_words(blocks[:, 32:96], 2), PAIRS, 0x03)
    high = _unpack(_words(blocks[:, :32]), BITS, 0x01).view_as(low)
    q = _bytes(low.bitwise_or_(high.bitwise_left_shift_(2)), 16, 16).view(torch.int8).sub_(4)
    y.view(-1, 16, 16).copy_(q).mul_(scale.unsqueeze(-1))


def _q4_k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, 12] to scales and minima, uint8 [N, 8] each, 6 bits wide."""
    scale, low, rest = _words(packed).view(-1, 3).unbind(1)
    six, four, two = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    scales = torch.stack((scale & six, (rest & four) | ((scale >> 2) & two)), dim=1)
    lows = torch.stack((low & six, ((rest >> 4) & four) | ((low >> 2) & two)), dim=1)
    return _bytes(scales, 8), _bytes(lows, 8)


def _affine_k(blocks: Tensor, q: Tensor, y: Tensor) -> None:
    """Q4_K and Q5_K: d*scale*q - dmin*low, both 6-bit per 32 elements; q is uint8 [N, 8, 32]."""
    d, dmin = _half(blocks[:, :4]).split(1, dim=1)
    scale, low = _q4_k_scales(blocks[:, 4:16])
    scale, low = scale.float().mul_(d), low.float().mul_(dmin)
    y.view(-1, 8, 32).copy_(q).mul_(scale.unsqueeze(-1)).sub_(low.unsqueeze(-1))


def _q4_k(blocks: Tensor, y: Tensor) -> None:
    q = _unpack(_words(blocks[:, 16:], 4), NIBBLES, 0x0F)
    _affine_k(blocks, _bytes(q, 8, 32), y)


def _q5_k(blocks: Tensor, y: Tensor) -> None:
    q = _unpack(_words(blocks[:, 48:], 4), NIBBLES, 0x0F)
    fifth = _unpack(_words(blocks[:, 16:48]), BITS, 0x01).view_as(q)
    _affine_k(blocks, _bytes(q.bitwise_or_(fifth.bitwise_left_shift_(4)), 8, 32), y)


def _q6_k(blocks: Tensor, y: Tensor) -> None:
    scale = _signed(blocks[:, 192:208]).float().mul_(_half(blocks[:, 208:]))
    low = _unpack(_words(blocks[:, :128], 2), NIBBLES, 0x0F).view(-1, 2, 4, 8)
    high = _unpack(_words(blocks[:, 128:192], 2), PAIRS, 0x03)
    q = _bytes(low.bitwise_or_(high.bitwise_left_shift_(4)), 16, 16).view(torch.int8).sub_(32)
    y.view(-1, 16, 16).copy_(q).mul_(scale.unsqueeze(-1))


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_values(packed: Tensor, groups: int) -> Tensor:
    """Nibbles of uint8 [N, 16 * groups] through the value table, to float32 [N, groups, 32]."""
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=packed.device)
    nibbles = _bytes(_unpack(_words(packed, groups), NIBBLES, 0x0F), groups, 32)
    return table.index_select(0, nibbles.int().view(-1)).view_as(nibbles)


def _iq4_nl(blocks: Tensor, y: Tensor) -> None:
    torch.mul(_iq4_values(blocks[:, 2:], 1).view_as(y), _half(blocks[:, :2]), out=y)


def _iq4_xs(blocks: Tensor, y: Tensor) -> None:
    four = torch.arange(0, 8, 4, dtype=torch.uint8, device=blocks.device)
    two = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    low = (blocks[:, 4:8, None] >> four).bitwise_and_(0x0F).view(-1, 8)
    high = (blocks[:, 2:4, None] >> two).bitwise_and_(0x03).view(-1, 8)
    scale = _signed(low | (high << 4)).sub_(32).float().mul_(_half(blocks[:, :2]))
    torch.mul(_iq4_values(blocks[:, 8:], 8), scale.unsqueeze(-1), out=y.view(-1, 8, 32))


# ---------------------------------------------------------------- numbers to bits


def _raw(x: Tensor) -> Tensor:
    """Any tensor [N, k] as its bytes, uint8 [N, k * itemsize]."""
    return x.contiguous().view(torch.uint8)


def _half_raw(x: Tensor) -> Tensor:
    return _raw(x.to(torch.float16))


def _pack(fields: Tensor, shifts: range) -> Tensor:
    """The reverse of `_unpack`: uint8 [N, G, len(shifts), W] small numbers to uint8 [N, G * W]."""
    packed = torch.zeros_like(fields[:, :, 0])
    for k, shift in enumerate(shifts):
        packed |= fields[:, :, k] << shift
    return packed.flatten(1)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 or so small that 1/x is of no use."""
    return torch.where(x.abs() < 1e-30, 0.0, 1.0 / x)


def _to_f32(x: Tensor) -> Tensor:
    return _raw(x)


def _to_bf16(x: Tensor) -> Tensor:
    return _raw(x.to(torch.bfloat16))


# The 32-element types round exactly as gguf-py does: same factor, same ties. A file quantised here equals
# one quantised there.


def _peak(x_NE: Tensor) -> Tensor:
    """The first value of largest magnitude, with its sign: [N, 1]."""
    return x_NE.gather(1, x_NE.abs().argmax(dim=1, keepdim=True))


def _to_q4_0(x: Tensor) -> Tensor:
    d = _peak(x) / -8
    q = (x * _inverse(d)).add_(8.5).to(torch.uint8).clamp_(max=15)
    return torch.cat((_half_raw(d), _pack(q.view(-1, 1, 2, 16), NIBBLES)), dim=1)


def _to_q4_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / 15
    q = ((x - low) * _inverse(d)).add_(0.5).to(torch.uint8).clamp_(max=15)
    return torch.cat((_half_raw(d), _half_raw(low), _pack(q.view(-1, 1, 2, 16), NIBBLES)), dim=1)


def _split_five_bits(q_NE: Tensor) -> Tensor:
    """uint8 [N, 32] below 32 to the 4 bytes of fifth bits and 16 of nibbles."""
    fifth = _pack((q_NE >> 4).view(-1, 4, 8, 1), BITS)
    return torch.cat((fifth, _pack((q_NE & 0x0F).view(-1, 1, 2, 16), NIBBLES)), dim=1)


def _to_q5_0(x: Tensor) -> Tensor:
    d = _peak(x) / -16
    q = (x * _inverse(d)).add_(16.5).to(torch.uint8).clamp_(max=31)
    return torch.cat((_half_raw(d), _split_five_bits(q)), dim=1)


def _to_q5_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / 31
    q = ((x - low) * _inverse(d)).add_(0.5).to(torch.uint8).clamp_(max=31)
    return torch.cat((_half_raw(d), _half_raw(low), _split_five_bits(q)), dim=1)


def _to_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(dim=1, keepdim=True) / 127
    scaled = x * _inverse(d)
    q = (scaled.abs() + 0.5).floor().copysign_(scaled)  # halves away from zero
    return torch.cat((_half_raw(d), _raw(q.to(torch.int8))), dim=1)


# The K types minimise the squared error, in three steps:
#
# 1. Every sub-block tries a range of steps around (largest value / largest level). For the levels that come
#    out, the best factors follow from least squares; the candidate that explains most of sum(x^2) wins.
# 2. The sub-blocks' factors are themselves quantised against one float16 factor of the whole block, again
#    with a search, weighted by how much each sub-block's error depends on its factor.
# 3. With the factors as stored, levels are rounded anew; then the block's own factors are solved for those
#    levels, and kept where the error has become smaller.
#
# Elements of a sub-block lie along the first axis, x_SNG = [element, block, sub-block]: sums over a sub-block
# then run over whole vectors, which is several times faster than summing 16 neighbours. Sums are taken in
# pairs, in a fixed order: torch's own order depends on chunk and threads, and with it the last bit and,
# through the search, now and then a level.


def _sub_blocks(x_NE: Tensor, size: int) -> Tensor:
    return x_NE.view(len(x_NE), -1, size).permute(2, 0, 1).contiguous()


def _over_elements(x_SNG: Tensor) -> Tensor:
    """Sum over the elements of each sub-block: [N, G]. Their number is a power of two."""
    while len(x_SNG) > 1:
        half = len(x_SNG) // 2
        x_SNG = x_SNG[:half] + x_SNG[half:]
    return x_SNG[0]


def _over_sub_blocks(x_NG: Tensor) -> Tensor:
    """Sum over the sub-blocks of each block: [N, 1]. Their number is a power of two."""
    while x_NG.shape[1] > 1:
        half = x_NG.shape[1] // 2
        x_NG = x_NG[:, :half] + x_NG[:, half:]
    return x_NG


def _elements(q_SNG: Tensor, *shape: int) -> Tensor:
    """Levels back in the order of the elements, uint8 [N, *shape]."""
    return q_SNG.permute(1, 2, 0).to(torch.uint8).reshape(q_SNG.shape[1], *shape)


def _steps(low: float, high: float, n: int) -> list[float]:
    return [low + (high - low) * i / (n - 1) for i in range(n)]


def _fit_affine(x_SNG: Tensor, top: int, steps: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Best scale and low >= 0 of x = scale * q - low, q in 0..top, and sum(q^2); [N, G] each."""
    size = len(x_SNG)
    low = x_SNG.amin(0).clamp_(max=0)
    above = x_SNG - low
    inverse = _inverse(above.amax(0))
    sum_x = _over_elements(x_SNG)
    best_scale, best_qq = torch.zeros_like(low), torch.zeros_like(low)
    best_shift = (sum_x / size).clamp_(max=0)
    best_gain = best_shift * sum_x
    q, product = torch.empty_like(above), torch.empty_like(above)
    for step in steps:
        torch.mul(above, inverse * (top + step), out=q).round_().clamp_(0, top)
        sum_q = _over_elements(q)
        sum_qq = _over_elements(torch.mul(q, q, out=product))
        sum_xq = _over_elements(torch.mul(q, x_SNG, out=product))
        inverse_det = _inverse(size * sum_qq - sum_q * sum_q)
        shift = (sum_qq * sum_x - sum_q * sum_xq) * inverse_det
        scale = (size * sum_xq - sum_x * sum_q) * inverse_det
        free = (shift < 0) & (inverse_det > 0)
        shift = torch.where(free, shift, 0.0)
        scale = torch.where(free, scale, sum_xq * _inverse(sum_qq))
        gain = scale * sum_xq + shift * sum_x
        better = gain > best_gain
        for best, new in ((best_gain, gain), (best_scale, scale), (best_shift, shift), (best_qq, sum_qq)):
            torch.where(better, new, best, out=best)
    return best_scale, -best_shift, best_qq


def _fit_symmetric(
    x_SNG: Tensor, snap: Callable[[Tensor], Tensor], reach: int, steps: list[float]
) -> tuple[Tensor, Tensor]:
    """Best scale of x = scale * q, where `snap` rounds to a level and `reach` is the most negative level.

    Returns the signed scale and sum(q^2), [N, G] each.
    """
    low, high = x_SNG.aminmax(dim=0)
    inverse = _inverse(torch.where(high > -low, high, low))
    best_gain, best_scale, best_qq = (torch.zeros_like(low) for _ in range(3))
    for step in steps:
        q = snap(x_SNG * (inverse * (reach + step)))
        sum_xq, sum_qq = _over_elements(x_SNG * q), _over_elements(q * q)
        scale = sum_xq * _inverse(sum_qq)
        gain = scale * sum_xq
        better = gain > best_gain
        for best, new in ((best_gain, gain), (best_scale, scale), (best_qq, sum_qq)):
            torch.where(better, new, best, out=best)
    return best_scale, best_qq


def _fit_scales(scale_NG: Tensor, weight_NG: Tensor, low: int, top: int) -> tuple[Tensor, Tensor]:
    """Quantise sub-block factors: levels in low..top [N, G] and the block's factor [N, 1], on float16.

    The largest factor goes near `top`, or near `low` if that reaches further.
    """
    reach = top if low == 0 else low
    peak = _peak(scale_NG)
    best_error = torch.full_like(peak, torch.inf)
    best_d, best_q = torch.zeros_like(peak), torch.zeros_like(scale_NG)
    for step in _steps(-0.06, 0.06, 25):
        q = (scale_NG * (_inverse(peak) * (reach * (1 + step)))).round_().clamp_(low, top)
        d = _over_sub_blocks(weight_NG * q * scale_NG) * _inverse(_over_sub_blocks(weight_NG * q * q))
        d = d.half().float()
        error = _over_sub_blocks(weight_NG * (d * q - scale_NG).square_())
        better = error < best_error
        torch.where(better, error, best_error, out=best_error)
        torch.where(better, d, best_d, out=best_d)
        torch.where(better, q, best_q, out=best_q)
    return best_q, best_d


@dataclass(slots=True)
class _AffineFit:
    """x = d*scale*q - dmin*low: levels q_SNG 0..top, integer scale_NG, low_NG, factors d_N1, dmin_N1."""

    q: Tensor
    scale: Tensor
    low: Tensor
    d: Tensor
    dmin: Tensor


def _affine_k_fit(x_NE: Tensor, size: int, top: int, scale_top: int, steps: list[float]) -> _AffineFit:
    x = _sub_blocks(x_NE, size)
    scale, low, weight = _fit_affine(x, top, steps)
    scale_q, d = _fit_scales(scale, weight, 0, scale_top)
    low_q, dmin = _fit_scales(low, torch.full_like(low, size), 0, scale_top)

    def levels(d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest levels, and the block's squared error [N, 1] with them."""
        factor, shift = d * scale_q, dmin * low_q
        q = ((x + shift) * _inverse(factor)).round_().clamp_(0, top)
        return q, _over_sub_blocks(_over_elements((q * factor - shift).sub_(x).square_()))

    q, error = levels(d, dmin)
    sum_x = _over_elements(x)
    for _ in range(2):
        sum_q, sum_qq, sum_xq = (_over_elements(v) for v in (q, q * q, q * x))
        aa = _over_sub_blocks(scale_q * scale_q * sum_qq)
        ab = _over_sub_blocks(scale_q * low_q * sum_q)
        bb = _over_sub_blocks(low_q * low_q) * size
        ax, bx = _over_sub_blocks(scale_q * sum_xq), _over_sub_blocks(low_q * sum_x)
        inverse = _inverse(aa * bb - ab * ab)
        new_d = torch.where(inverse == 0, ax * _inverse(aa), (ax * bb - ab * bx) * inverse).half().float()
        new_dmin = torch.where(inverse == 0, dmin, (ab * ax - aa * bx) * inverse).half().float()
        new_q, new_error = levels(new_d, new_dmin)
        better = new_error < error
        q, error = torch.where(better, new_q, q), torch.where(better, new_error, error)
        d, dmin = torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)
    return _AffineFit(q, scale_q, low_q, d, dmin)


def _symmetric_k_fit(
    x_NE: Tensor,
    size: int,
    snap: Callable[[Tensor], Tensor],
    reach: int,
    scale_reach: int,
    steps: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """x = d*scale*q: levels q_SNG, integer scale_NG in scale_reach..-scale_reach-1, factor d_N1."""
    x = _sub_blocks(x_NE, size)
    scale, weight = _fit_symmetric(x, snap, reach, steps)
    scale_q, d = _fit_scales(scale, weight, scale_reach, -scale_reach - 1)

    def levels(d: Tensor) -> tuple[Tensor, Tensor]:
        factor = d * scale_q
        q = snap(x * _inverse(factor))
        return q, _over_sub_blocks(_over_elements((q * factor).sub_(x).square_()))

    q, error = levels(d)
    for _ in range(2):
        sum_qq, sum_xq = _over_elements(q * q), _over_elements(q * x)
        aa = _over_sub_blocks(scale_q * scale_q * sum_qq)
        new_d = (_over_sub_blocks(scale_q * sum_xq) * _inverse(aa)).half().float()
        new_q, new_error = levels(new_d)
        better = new_error < error
        q, error = torch.where(better, new_q, q), torch.where(better, new_error, error)
        d = torch.where(better, new_d, d)
    return q, scale_q, d


def _to_q2_k(x: Tensor) -> Tensor:
    fit = _affine_k_fit(x, 16, 3, 15, _steps(-0.5, 1.0, 16))
    scales = (fit.scale + 16 * fit.low).to(torch.uint8)
    q = _pack(_elements(fit.q, 2, 4, 32), PAIRS)
    return torch.cat((scales, q, _half_raw(fit.d), _half_raw(fit.dmin)), dim=1)


def _to_q3_k(x: Tensor) -> Tensor:
    q, scale, d = _symmetric_k_fit(x, 16, lambda v: v.round_().clamp_(-4, 3), -4, -32, _steps(-1.5, 1.5, 16))
    q = _elements(q + 4, 2, 4, 32)
    high = _pack((q >> 2).view(-1, 1, 8, 32), BITS)
    low = _pack(q & 3, PAIRS)
    scale = (scale + 32).to(torch.uint8)
    nibbles = _pack((scale & 0x0F).view(-1, 1, 2, 8), NIBBLES)
    pairs = _pack((scale >> 4).view(-1, 1, 4, 4), PAIRS)
    return torch.cat((high, low, nibbles, pairs, _half_raw(d)), dim=1)


def _affine_k_head(fit: _AffineFit) -> Tensor:
    """The first 16 bytes of Q4_K and Q5_K: d, dmin and eight 6-bit pairs of scale and low."""
    scale, low = fit.scale.to(torch.uint8), fit.low.to(torch.uint8)
    first = (scale[:, :4] | (scale[:, 4:] >> 4 << 6), low[:, :4] | (low[:, 4:] >> 4 << 6))
    rest = (scale[:, 4:] & 0x0F) | (low[:, 4:] & 0x0F) << 4
    return torch.cat((_half_raw(fit.d), _half_raw(fit.dmin), *first, rest), dim=1)


def _to_q4_k(x: Tensor) -> Tensor:
    fit = _affine_k_fit(x, 32, 15, 63, _steps(-2.0, 1.0, 16))
    return torch.cat((_affine_k_head(fit), _pack(_elements(fit.q, 4, 2, 32), NIBBLES)), dim=1)


def _to_q5_k(x: Tensor) -> Tensor:
    fit = _affine_k_fit(x, 32, 31, 63, _steps(-3.0, 1.0, 21))
    q = _elements(fit.q, 4, 2, 32)
    high = _pack((q >> 4).view(-1, 1, 8, 32), BITS)
    return torch.cat((_affine_k_head(fit), high, _pack(q & 0x0F, NIBBLES)), dim=1)


def _to_q6_k(x: Tensor) -> Tensor:
    q, scale, d = _symmetric_k_fit(
        x, 16, lambda v: v.round_().clamp_(-32, 31), -32, -128, _steps(-1.0, 6.0, 29)
    )
    q = _elements(q + 32, 2, 4, 32)
    low = _pack((q & 0x0F).view(-1, 2, 2, 64), NIBBLES)
    high = _pack(q >> 4, PAIRS)
    return torch.cat((low, high, _raw(scale.to(torch.int8)), _half_raw(d)), dim=1)


def _iq4_index(device: torch.device) -> tuple[Tensor, Tensor]:
    """(nearest value, its index) for floor(2 v) + 255, v in -127.5..127.5. Midpoints are multiples of 1/2."""
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)
    middles = (values[1:] + values[:-1]) / 2
    grid = torch.arange(-255, 256, device=device) / 2 + 0.25
    index = torch.bucketize(grid, middles)
    return values[index], index.to(torch.uint8)


def _iq4_cell(v: Tensor) -> Tensor:
    return (v * 2).floor_().clamp_(-255, 255).add_(255).int()


def _iq4_snap(x: Tensor) -> Callable[[Tensor], Tensor]:
    nearest, _ = _iq4_index(x.device)
    return lambda v: nearest.index_select(0, _iq4_cell(v).view(-1)).view_as(v)


def _iq4_nibbles(q_SNG: Tensor) -> Tensor:
    """IQ4 values in sub-blocks of 32 to packed indices, uint8 [N, 16 * G]."""
    _, index = _iq4_index(q_SNG.device)
    q = index.index_select(0, _iq4_cell(q_SNG).view(-1)).view_as(q_SNG)
    return _pack(_elements(q, q_SNG.shape[2], 2, 16), NIBBLES)


def _to_iq4_nl(x: Tensor) -> Tensor:
    x_SNG, snap = _sub_blocks(x, 32), _iq4_snap(x)
    scale, _ = _fit_symmetric(x_SNG, snap, -127, _steps(-14, 14, 29))
    scale = scale.half().float()
    return torch.cat((_half_raw(scale), _iq4_nibbles(snap(x_SNG * _inverse(scale)))), dim=1)


def _to_iq4_xs(x: Tensor) -> Tensor:
    q, scale, d = _symmetric_k_fit(x, 32, _iq4_snap(x), -127, -32, _steps(-14, 14, 29))
    scale = (scale + 32).to(torch.uint8)
    high = _pack((scale >> 4).view(-1, 2, 4, 1), PAIRS)
    low = _pack((scale & 0x0F).view(-1, 4, 2, 1), NIBBLES)
    return torch.cat((_half_raw(d), high, low, _iq4_nibbles(q)), dim=1)


QUANTS: dict[int, Quant] = {
    quant.type_id: quant
    for quant in (
        Quant(GGMLType.F32, _f32, _to_f32),
        Quant(GGMLType.F16, _f16, _half_raw),
        Quant(GGMLType.BF16, _bf16, _to_bf16),
        Quant(GGMLType.Q4_0, _q4_0, _to_q4_0),
        Quant(GGMLType.Q4_1, _q4_1, _to_q4_1),
        Quant(GGMLType.Q5_0, _q5_0, _to_q5_0),
        Quant(GGMLType.Q5_1, _q5_1, _to_q5_1),
        Quant(GGMLType.Q8_0, _q8_0, _to_q8_0),
        Quant(GGMLType.Q2_K, _q2_k, _to_q2_k),
        Quant(GGMLType.Q3_K, _q3_k, _to_q3_k),
        Quant(GGMLType.Q4_K, _q4_k, _to_q4_k),
        Quant(GGMLType.Q5_K, _q5_k, _to_q5_k),
        Quant(GGMLType.Q6_K, _q6_k, _to_q6_k),
        Quant(GGMLType.IQ4_NL, _iq4_nl, _to_iq4_nl),
        Quant(GGMLType.IQ4_XS, _iq4_xs, _to_iq4_xs),
    )
}
