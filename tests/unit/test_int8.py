"""Integer products and the choice of precisions, against float32."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from mutoscope.engine import int8
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.int8 import Int8, Rows
from mutoscope.engine.linear import Packed, QuantLinear, Shared, Unpacked
from mutoscope.engine.precision import MIN_INT8_NUMEL, PRECISIONS, checked, chooser
from mutoscope.engine.quants import quantize
from mutoscope.engine.wan import GELU_LOW
from mutoscope.errors import RequestError

pytestmark = pytest.mark.skipif(not int8.int8_is_fast(), reason="no fast 8-bit instructions here")

NOISE = 0.0125
"""Relative L2 error of a product of Gaussian numbers, measured: 0.0117 with 1,536 inputs, 0.0110 with 512."""
CPU = torch.device("cpu")


def packed(weight: Tensor, type_id: GGMLType = GGMLType.Q8_0) -> Packed:
    return Packed(quantize(type_id, weight).view(-1), type_id, tuple(weight.shape))


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def case() -> tuple[Tensor, Packed, Tensor]:
    """Tokens of very different size, a Q8_0 weight, a bias."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 512, generator=rng) * torch.logspace(-2, 2, 300)[:, None]
    weight = torch.randn(640, 512, generator=rng) / 512**0.5
    return x, packed(weight), torch.randn(640, generator=rng)


@pytest.mark.parametrize("type_id", [GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.F16])
def test_every_token_is_as_exact_as_the_next(case, type_id):
    x, weight, bias = case
    weight = packed(weight.values(torch.float32), type_id)
    layer = QuantLinear(weight, bias, Int8())
    expected = x @ weight.values(torch.float32).T + bias
    got = layer(x)
    assert got.shape == expected.shape
    offsets = expected - bias
    assert ((got - expected).norm(dim=-1) / offsets.norm(dim=-1)).max() < 3 * NOISE


def test_one_scale_for_all_tokens_would_not_do(case):
    """The mutant: small tokens vanish."""
    x, weight, _ = case
    rows = int8.quantize_rows(x[0])
    worst = rows.step_M1.max()
    coarse = Rows(((x[0] / worst).round() + 128).to(torch.uint8), worst.expand(300, 1), 128, 0.0)
    got = int8.product(coarse, int8.prepare(weight), None)
    expected = x[0] @ weight.values(torch.float32).T
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() > 10 * NOISE


def test_gelu_is_gelu(case):
    x, weight, bias = case
    x = x / x.abs().amax(-1, keepdim=True) * 5
    expected = torch.nn.functional.gelu(x @ weight.values(torch.float32).T + bias, approximate="tanh")
    assert error(QuantLinear(weight, bias, Int8())(x, gelu=True).float(), expected) < 3 * NOISE
    y = torch.linspace(-12, 12, 10_001)
    torch.testing.assert_close(
        int8.gelu_(y.clone()), torch.nn.functional.gelu(y, approximate="tanh"), rtol=1e-5, atol=1e-6
    )


def test_a_known_lower_bound_doubles_the_resolution(case):
    x, weight, bias = case
    x = torch.nn.functional.gelu(x / x.abs().amax(-1, keepdim=True) * 8, approximate="tanh")
    expected = x @ weight.values(torch.float32).T + bias
    layer = QuantLinear(weight, bias, Int8())
    plain, bounded = (error(layer(Shared(x, low)), expected) for low in (None, GELU_LOW))
    assert bounded < 3 * NOISE
    levels = [int8.quantize_rows(x[0], low).step_M1 for low in (None, GELU_LOW)]
    assert (levels[1] / levels[0]).max() < 0.55
    assert error(layer(Shared(x, low=0.0)), expected) > plain  # the mutant: a bound that does not hold


def test_pieces_change_nothing(case, monkeypatch):
    x, weight, bias = case
    whole = QuantLinear(weight, bias, Int8())(x)
    monkeypatch.setattr(int8, "PIECE_BYTES", 4 * 640 * 64)
    monkeypatch.setattr(int8, "CHUNK_ROWS_BYTES", 4 * 512 * 7)
    assert len(list(int8.pieces(600, 640))) == 10
    assert torch.equal(QuantLinear(weight, bias, Int8())(x), whole)


def test_shared_activations_are_quantised_once(case, monkeypatch):
    x, weight, _ = case
    calls = []
    plain = int8.quantize_rows
    monkeypatch.setattr(int8, "quantize_rows", lambda *given: calls.append(1) or plain(*given))
    precision = Int8()
    layers = [QuantLinear(weight, None, precision) for _ in range(2)]
    both = Shared(x)
    assert torch.equal(layers[0](both), layers[1](both))
    assert len(calls) == 1
    assert torch.equal(layers[0](x), layers[0](both))


def test_what_is_kept_changes_nothing(case):
    """All weights kept, none, or some; and the thread that converts ahead."""
    x, weight, bias = case
    weights = [packed(weight.values(torch.float32) * (n + 1)) for n in range(12)]
    results = []
    for room in (sys.maxsize, 0, 11 * weight.numel):
        precision = Int8()
        layers = [QuantLinear(w, bias, precision) for w in weights]
        used = precision.settle(room)
        assert used == 12 * weight.numel
        for _ in range(2):
            results.append([layer(x) for layer in layers])
        assert precision.kept_bytes <= room
        assert len(precision._coming) <= precision.AHEAD
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_is_converted_twice_in_a_forward(case, monkeypatch):
    """Without room, and though two layers take turns. Whatever the order, little is held."""
    x, weight, bias = case
    weights = [packed(weight.values(torch.float32) * (n + 1)) for n in range(24)]
    seen = []
    plain = int8.prepare
    monkeypatch.setattr(int8, "prepare", lambda w: seen.append(w.data.data_ptr()) or plain(w))
    precision = Int8()
    layers = [QuantLinear(w, bias, precision) for w in weights]
    precision.settle(0)

    def forward(order: list[int]) -> list[int]:
        for n in order:
            layers[n](x[:, :2])
            assert len(precision._coming) <= precision.AHEAD
            assert len(precision._recent) <= precision.RECENT
        precision._thread.submit(int).result()  # what was sent for is done
        return [seen.count(w.data.data_ptr()) for w in weights]

    natural = [*range(12), 10, 11, 10, 11, *range(12, 24)]
    assert forward(natural) == [1] * 24
    again = forward(natural)  # the first of the next forward have been sent for, at the end of this one
    assert max(again) <= 3
    assert sum(again) <= 2 * 24 + precision.AHEAD
    forward([*range(12), *range(16, 24), *range(12, 16)])


def test_precisions_of_layers():
    large = packed(torch.zeros(1024, MIN_INT8_NUMEL // 1024))
    small = packed(torch.zeros(32, 32))
    auto = chooser("auto", CPU)
    assert isinstance(auto("blocks.0.ffn.0", large), Int8)
    assert auto("blocks.0.ffn.0", large) is auto("vace_blocks.3.self_attn.q", large)
    assert isinstance(auto("blocks.0.ffn.0", small), Unpacked)
    assert isinstance(auto("blocks.0.cross_attn.k", large), Unpacked)
    assert auto("time_projection.1", large).dtype == torch.float32
    assert isinstance(chooser("int8", CPU)("blocks.0.ffn.0", small), Int8)
    assert chooser("exact", CPU)("blocks.0.ffn.0", large).dtype == torch.float32
    assert chooser("bf16", CPU)("blocks.0.ffn.0", large).dtype == torch.bfloat16
    assert isinstance(chooser("auto", torch.device("meta"))("blocks.0.ffn.0", large), Unpacked)
    with pytest.raises(RequestError, match="VNNI"):
        chooser("int8", torch.device("meta"))
    with pytest.raises(RequestError, match=", ".join(PRECISIONS)):
        checked("int4")
