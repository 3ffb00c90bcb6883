"""The blocked kernel against attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mutoscope.engine import attention
from mutoscope.engine.attention import attend, attend_in_blocks

NOISE = 0.0055
"""Relative L2 error with bfloat16 inputs of unit variance, the largest measured; of the library's kernel: 0.0023."""


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    logits = q @ k.mT * scale
    return ((logits if bias is None else logits + bias.double()).softmax(-1) @ v).transpose(1, 2)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def inputs(n: int, n_keys: int, d: int, common: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`common`: how much all keys have in common."""
    rng = torch.Generator().manual_seed(n)
    shapes = ((2, n, 3, d), (2, n_keys, 3, d), (2, n_keys, 3, d))
    q, k, v = (torch.randn(shape, generator=rng) for shape in shapes)
    return q.bfloat16(), (k + common * torch.randn(d, generator=rng)).bfloat16(), v.bfloat16()


@pytest.mark.parametrize(("n", "n_keys", "d"), [(600, 600, 128), (601, 333, 64), (70, 1000, 96)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_blocks_are_attention(n, n_keys, d, with_bias):
    q, k, v = inputs(n, n_keys, d)
    bias = None
    if with_bias:
        bias = torch.randn(2, 1, 1, n_keys, generator=torch.Generator().manual_seed(1))
        bias[1, ..., n_keys // 2 :] = -torch.inf
    for scale in (d**-0.5, 0.3):
        got = attend_in_blocks(q, k, v, bias, scale)
        assert got.dtype == torch.bfloat16
        noise = NOISE * max(1.0, scale * d**0.5)  # rounding of logits grows with them
        assert error(got, exact(q, k, v, bias, scale)) < 3 * noise
    assert error(attend_in_blocks(q, k, v, bias, 0.5 * d**-0.5), exact(q, k, v, bias, d**-0.5)) > 10 * NOISE


def test_a_full_bias_goes_by_query():
    q, k, v = inputs(100, 700, 64)
    bias = torch.randn(2, 3, 100, 700, generator=torch.Generator().manual_seed(1))
    assert error(attend_in_blocks(q, k, v, bias, 0.125), exact(q, k, v, bias, 0.125)) < 3 * NOISE


def test_what_keys_have_in_common_costs_no_precision():
    """Logits of hundreds that differ by a few: as they are, bfloat16 would keep nothing of the difference."""
    q, k, v = inputs(256, 512, 64, common=100.0)
    expected = exact(q, k, v, None, 0.125)
    assert error(attend_in_blocks(q, k, v, None, 0.125), expected) < 3 * NOISE
    logits = q.transpose(1, 2) @ (k.transpose(1, 2) * 0.125).mT
    assert error((logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2), expected) > 10 * NOISE


def test_memory_is_one_block_of_logits(monkeypatch):
    """The largest tensor made has as many numbers as a block, however long the clip."""
    sizes = []
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, n: sizes.append(n) or empty(self, n))
    for n in (2048, 4096):
        q = torch.randn(1, n, 1, 32).bfloat16()
        attend(q, q, q)
    assert max(sizes) <= attention.BLOCK_LOGITS
    assert len(sizes) == 2


def test_who_uses_blocks():
    def blocks(q: Tensor, n_keys: int) -> bool:
        return attention._blocks_are_faster(q, torch.empty(1, n_keys, 1, 64))

    assert blocks(torch.empty(1, 1440, 1, 64).bfloat16(), 1440)
    assert not blocks(torch.empty(1, 1440, 1, 64), 1440)
    assert not blocks(torch.empty(1, 64, 1, 64).bfloat16(), 64)
    assert not blocks(torch.empty(1, 1440, 1, 64, dtype=torch.bfloat16, device="meta"), 1440)
    assert not blocks(torch.empty(1, 1440, 1, 64).bfloat16().requires_grad_(), 1440)
