"""Products straight from blocks of Q8_0 against those of the unpacked weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine import few_rows, jit
from mutoscope.engine.few_rows import FEW
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.linear import Packed, QuantLinear, Unpacked
from mutoscope.engine.quants import dequantize, quantize

pytestmark = pytest.mark.skipif(not jit.available(), reason="no compiled kernels here")

Q8_0, Q4_0 = GGMLType.Q8_0, GGMLType.Q4_0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(n: int, k: int, type_id: GGMLType = Q8_0) -> Packed:
    return Packed(quantize(type_id, random(n, k, seed=1) / k**0.5).view(-1), type_id, (n, k))


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 32), (6, 24, 96), (13, 40, 2080), (FEW, 64, 256)])
def test_the_numbers_are_those_of_the_unpacked_weight(m: int, n: int, k: int, threads: int) -> None:
    weight, x = packed(n, k), random(m, k).bfloat16()
    unpacked = dequantize(Q8_0, weight.data, torch.bfloat16).view(n, k)
    got = few_rows.product(x, weight.data, n)
    assert got.shape == (m, n)
    assert got.dtype == torch.float32
    assert error(got, x.double() @ unpacked.double().T) < 1e-6  # of float32 sums: measured 1e-7 to 2e-7


def test_a_row_depends_on_no_other() -> None:
    weight, x = packed(16, 128), random(17, 128).bfloat16()
    together = few_rows.product(x, weight.data, 16)
    for i in range(len(x)):
        assert torch.equal(few_rows.product(x[i : i + 1], weight.data, 16)[0], together[i])


@pytest.mark.parametrize("gelu", [False, True])
def test_layers_use_it_for_few_rows(monkeypatch: pytest.MonkeyPatch, gelu: bool) -> None:
    calls: list[int] = []
    whole = few_rows.product

    def product(x: Tensor, blocks: Tensor, n_out: int) -> Tensor:
        calls.append(len(x))
        return whole(x, blocks, n_out)

    monkeypatch.setattr(few_rows, "product", product)
    bias = random(16, seed=2)

    def layer(type_id: GGMLType, dtype: torch.dtype) -> QuantLinear:
        return QuantLinear(packed(16, 128, type_id), bias, Unpacked(dtype))

    with torch.inference_mode():
        few, many = random(2, 5, 128), random(2, FEW // 2 + 1, 128)
        got = layer(Q8_0, torch.bfloat16)(few, gelu=gelu)
        assert calls == [10]
        exact = layer(Q8_0, torch.float32)(few)
        exact = F.gelu(exact, approximate="tanh") if gelu else exact
        assert got.shape == exact.shape == (2, 5, 16)
        assert 1e-4 < error(got, exact.double()) < 2**-8  # bfloat16 weights and activations
        layer(Q8_0, torch.bfloat16)(many)
        layer(Q4_0, torch.bfloat16)(few)
        assert calls == [10], "too many rows, another type, float32"
