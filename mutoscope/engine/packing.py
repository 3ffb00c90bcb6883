"""Numbers to packed bytes, one function for each tensor type. `quants` has their table and the way back.

    to_q4_k(x_NE float32) -> blocks_NB uint8

Shapes: N blocks, one type's block has E elements in B bytes. x_SNG is [element, block, sub-block], see the
K types. The functions check nothing: `quants.quantize` refuses partial blocks and numbers out of range.

Q4_0 to Q8_0 equal gguf-py's bit for bit; the K and IQ types search for the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Where in a byte its bit fields begin, and what the sixteen levels of IQ4 stand for.
NIBBLES, PAIRS, BITS = range(0, 8, 4), range(0, 8, 2), range(8)
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _raw(x: Tensor) -> Tensor:
    """Any tensor [N, k] as its bytes, uint8 [N, k * itemsize]."""
    return x.contiguous().view(torch.uint8)


def _half_raw(x: Tensor) -> Tensor:
    return _raw(x.to(torch.float16))


def _pack(fields: Tensor, shifts: range) -> Tensor:
    """Bit fields into bytes: uint8 [N, G, len(shifts), W] small numbers to uint8 [N, G * W]."""
    packed = torch.zeros_like(fields[:, :, 0])
    for k, shift in enumerate(shifts):
        packed |= fields[:, :, k] << shift
    return packed.flatten(1)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 or so small that 1/x is of no use."""
    return torch.where(x.abs() < 1e-30, 0.0, 1.0 / x)


def to_f32(x: Tensor) -> Tensor:
    return _raw(x)


def to_f16(x: Tensor) -> Tensor:
    return _half_raw(x)


def to_bf16(x: Tensor) -> Tensor:
    return _raw(x.to(torch.bfloat16))


# The 32-element types round exactly as gguf-py does: same factor, same ties. A file quantised here equals
# one quantised there.


def _peak(x_NE: Tensor) -> Tensor:
    """The first value of largest magnitude, with its sign: [N, 1]."""
    return x_NE.gather(1, x_NE.abs().argmax(dim=1, keepdim=True))


def to_q4_0(x: Tensor) -> Tensor:
    d = _peak(x) / -8
    q = (x * _inverse(d)).add_(8.5).to(torch.uint8).clamp_(max=15)
    return torch.cat((_half_raw(d), _pack(q.view(-1, 1, 2, 16), NIBBLES)), dim=1)


def to_q4_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / 15
    q = ((x - low) * _inverse(d)).add_(0.5).to(torch.uint8).clamp_(max=15)
    return torch.cat((_half_raw(d), _half_raw(low), _pack(q.view(-1, 1, 2, 16), NIBBLES)), dim=1)


def _split_five_bits(q_NE: Tensor) -> Tensor:
    """uint8 [N, 32] below 32 to the 4 bytes of fifth bits and 16 of nibbles."""
    fifth = _pack((q_NE >> 4).view(-1, 4, 8, 1), BITS)
    return torch.cat((fifth, _pack((q_NE & 0x0F).view(-1, 1, 2, 16), NIBBLES)), dim=1)


def to_q5_0(x: Tensor) -> Tensor:
    d = _peak(x) / -16
    q = (x * _inverse(d)).add_(16.5).to(torch.uint8).clamp_(max=31)
    return torch.cat((_half_raw(d), _split_five_bits(q)), dim=1)


def to_q5_1(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / 31
    q = ((x - low) * _inverse(d)).add_(0.5).to(torch.uint8).clamp_(max=31)
    return torch.cat((_half_raw(d), _half_raw(low), _split_five_bits(q)), dim=1)


def to_q8_0(x: Tensor) -> Tensor:
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


def to_q2_k(x: Tensor) -> Tensor:
    fit = _affine_k_fit(x, 16, 3, 15, _steps(-0.5, 1.0, 16))
    scales = (fit.scale + 16 * fit.low).to(torch.uint8)
    q = _pack(_elements(fit.q, 2, 4, 32), PAIRS)
    return torch.cat((scales, q, _half_raw(fit.d), _half_raw(fit.dmin)), dim=1)


def to_q3_k(x: Tensor) -> Tensor:
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


def to_q4_k(x: Tensor) -> Tensor:
    fit = _affine_k_fit(x, 32, 15, 63, _steps(-2.0, 1.0, 16))
    return torch.cat((_affine_k_head(fit), _pack(_elements(fit.q, 4, 2, 32), NIBBLES)), dim=1)


def to_q5_k(x: Tensor) -> Tensor:
    fit = _affine_k_fit(x, 32, 31, 63, _steps(-3.0, 1.0, 21))
    q = _elements(fit.q, 4, 2, 32)
    high = _pack((q >> 4).view(-1, 1, 8, 32), BITS)
    return torch.cat((_affine_k_head(fit), high, _pack(q & 0x0F, NIBBLES)), dim=1)


def to_q6_k(x: Tensor) -> Tensor:
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


def to_iq4_nl(x: Tensor) -> Tensor:
    x_SNG, snap = _sub_blocks(x, 32), _iq4_snap(x)
    scale, _ = _fit_symmetric(x_SNG, snap, -127, _steps(-14, 14, 29))
    scale = scale.half().float()
    return torch.cat((_half_raw(scale), _iq4_nibbles(snap(x_SNG * _inverse(scale)))), dim=1)


def to_iq4_xs(x: Tensor) -> Tensor:
    q, scale, d = _symmetric_k_fit(x, 32, _iq4_snap(x), -127, -32, _steps(-14, 14, 29))
    scale = (scale + 32).to(torch.uint8)
    high = _pack((scale >> 4).view(-1, 2, 4, 1), PAIRS)
    low = _pack((scale & 0x0F).view(-1, 4, 2, 1), NIBBLES)
    return torch.cat((_half_raw(d), high, low, _iq4_nibbles(q)), dim=1)
