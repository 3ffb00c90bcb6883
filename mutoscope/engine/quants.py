"""Quantised tensor types: the table `QUANTS`, and packed bytes to numbers. `packing` goes the other way.

Layouts: ggml `src/ggml-common.h` and gguf-py `gguf/quants.py`, ggml commit d99724f. Values are bit-exact
with gguf-py: the same float32 products and differences in the same order.

Shapes: N blocks, one type's block has E elements in B bytes. A row of the table has two functions:

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

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mutoscope.engine import kernels, packing
from mutoscope.engine.gguf import BLOCKS, GGMLType, type_name
from mutoscope.engine.packing import BITS, IQ4_VALUES, NIBBLES, PAIRS
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
    if quant.type_id == GGMLType.Q8_0 and out.dtype == torch.bfloat16 and _by_kernel(packed):
        kernels.q8_0_to_bfloat16(packed, out)
        return out
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


def _by_kernel(packed: Tensor) -> bool:
    return packed.device.type == "cpu" and packed.is_contiguous() and packed.numel() > 0 and kernels.fits()


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


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """For `quantize`: as many threads as torch has, each running torch with one.

    The search for good factors is made of many short operations. Split over threads one by one they mostly wait for
    each other: on two busy cores that took ten times longer than whole chunks per thread.
    """
    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(n_threads)


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
        described = array.__array_interface__
        self.__array_interface__ = {**described, "data": (described["data"][0], False)}


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


QUANTS: dict[int, Quant] = {
    quant.type_id: quant
    for quant in (
        Quant(GGMLType.F32, _f32, packing.to_f32),
        Quant(GGMLType.F16, _f16, packing.to_f16),
        Quant(GGMLType.BF16, _bf16, packing.to_bf16),
        Quant(GGMLType.Q4_0, _q4_0, packing.to_q4_0),
        Quant(GGMLType.Q4_1, _q4_1, packing.to_q4_1),
        Quant(GGMLType.Q5_0, _q5_0, packing.to_q5_0),
        Quant(GGMLType.Q5_1, _q5_1, packing.to_q5_1),
        Quant(GGMLType.Q8_0, _q8_0, packing.to_q8_0),
        Quant(GGMLType.Q2_K, _q2_k, packing.to_q2_k),
        Quant(GGMLType.Q3_K, _q3_k, packing.to_q3_k),
        Quant(GGMLType.Q4_K, _q4_k, packing.to_q4_k),
        Quant(GGMLType.Q5_K, _q5_k, packing.to_q5_k),
        Quant(GGMLType.Q6_K, _q6_k, packing.to_q6_k),
        Quant(GGMLType.IQ4_NL, _iq4_nl, packing.to_iq4_nl),
        Quant(GGMLType.IQ4_XS, _iq4_xs, packing.to_iq4_xs),
    )
}
