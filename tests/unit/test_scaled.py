"""Products in 8 bits as GPUs make them, on the processor; and torch.compile between products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine import scaled
from mutoscope.engine.compiling import compile_blocks
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.linear import Packed, QuantLinear, Shared, Unpacked
from mutoscope.engine.scaled import Scaled
from mutoscope.engine.wan import WanModel, rope_table
from mutoscope.engine.weights import load_wan

NOISE = {torch.int8: 0.012, torch.float8_e4m3fn: 0.037}
"""Measured on Gaussian numbers: 0.0117, 0.0368."""
KINDS = list(NOISE)


@pytest.fixture
def weight() -> Packed:
    values = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-3, 1, 48)[:, None]  # channels of very different size
    return Packed(values.view(torch.uint8).flatten(), GGMLType.F32, (48, 64))


@pytest.fixture
def x() -> Tensor:
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    return x * torch.logspace(-4, 2, 40)[:, None]


def error(got: Tensor, expected: Tensor) -> float:
    """Of each channel and row by its own size, so that small ones count."""
    size = expected.square().mean((0, 1), keepdim=True).sqrt()
    rows = (expected / size).square().mean(2, keepdim=True).sqrt()
    return ((got - expected) / size / rows).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: torch.dtype, weight: Packed, x: Tensor) -> None:
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2))
    layer = QuantLinear(weight, bias, Scaled(kind, torch.bfloat16))
    got = layer(x)
    layer.bias = None
    product = layer(x)
    assert product.dtype == torch.bfloat16
    assert error(product.float(), F.linear(x, weight.values(torch.float32))) < 1.5 * NOISE[kind]
    assert torch.equal(got, (product + bias).bfloat16())
    layer.bias = bias
    assert torch.equal(layer(Shared(x)), got)
    assert torch.equal(layer(x, gelu=True), F.gelu(got, approximate="tanh"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_for_all_rows_would_be_noticed(
    kind: torch.dtype, weight: Packed, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Callable[[Tensor, torch.dtype], Tensor] = scaled.steps_of
    monkeypatch.setattr(scaled, "steps_of", lambda v, d: own(v, d).amax().expand(len(v), 1).contiguous())
    exact = F.linear(x, weight.values(torch.float32))
    assert (
        error(QuantLinear(weight, None, Scaled(kind, torch.bfloat16))(x).float(), exact) > 1.5 * NOISE[kind]
    )


@pytest.mark.parametrize("rows", [1, 16, 17, 80])
def test_any_number_of_rows(rows: int, weight: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's integer product takes 17 or more; large ones are made in parts."""
    monkeypatch.setattr(scaled, "INT32_BYTES", 48 * 4 * 30)
    monkeypatch.setattr(scaled, "CHUNK", 64 * 7)
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(1))
    exact = F.linear(x, weight.values(torch.float32))
    got = QuantLinear(weight, None, Scaled(torch.int8, torch.float32))(x)
    assert ((got - exact).norm() / exact.norm()).item() < 0.03


def test_widths_that_the_library_does_not_take() -> None:
    values = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    odd = Packed(values.view(torch.uint8).flatten(), GGMLType.F32, (24, 40))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    layers = [
        QuantLinear(odd, None, p) for p in (Scaled(torch.int8, torch.bfloat16), Unpacked(torch.bfloat16))
    ]
    assert torch.equal(layers[0](x).float(), layers[1](x).float())


def velocity(model: WanModel) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    c = model.config
    x = torch.randn(2, c.in_dim, 2, 4, 4, generator=rng)
    text = model.text_context(torch.randn(2, 5, c.text_dim, generator=rng), [5, 3])
    side = model.vace_tokens(torch.randn(2, c.vace_in_dim, 2, 4, 4, generator=rng))
    time = model.time_modulation(torch.tensor([500.0]))
    return model(x, time, text, rope_table((2, 2, 2), c.head_dim), side).clone()


@torch.inference_mode()
def test_compiled_blocks_compute_the_same(tiny_model: Path) -> None:
    """Traced by the compiler but not turned into kernels, which takes a minute; and products are not traced."""
    plain, compiled = (load_wan(tiny_model / "dit.gguf", compute_dtype=torch.float32) for _ in range(2))
    expected = velocity(plain)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compile_blocks(compiled, backend=backend)
    for _ in range(2):
        got = velocity(compiled)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-5
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("layer_norm" in name for name in called)
    assert not any("linear" in name for name in called)
    assert len(graphs) < 3 * 16, "blocks of one kind share their graphs"
