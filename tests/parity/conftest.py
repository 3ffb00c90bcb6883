"""Helpers for comparing a tiny seeded model of ours with the reference implementation of the same weights.

Every comparison goes through a weight file: the reference's state dict is saved under the reference's names,
our loader reads it. So the translation of names and layouts is tested together with the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Relative L2 error in float32, three times the largest measured: DiT 2.4e-6, with VACE 3.4e-6 (the reference
computes time angles in float32), VAE encode 4.9e-7, decode 9.7e-7, UMT5 3.6e-7."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """randomise(module, seed): weights that keep activations near 1 and leave no term silent."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=rng)
                if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                    parameter.copy_(1 + 0.3 * noise)
                elif parameter.ndim >= 2 and name.endswith("weight"):
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
                else:
                    parameter.copy_(0.3 * noise)
        return module.eval().requires_grad_(False)

    return fill


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(tensors, metadata) as safetensors; returns the path."""

    def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        path = tmp_path / f"weights-{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, dict(metadata or {}))
        return path

    return write


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """relative_error(got, expected): L2 norm of the difference over that of the expected."""

    def measure(got: Tensor, expected: Tensor) -> float:
        assert got.shape == expected.shape, f"got {list(got.shape)}, expected {list(expected.shape)}"
        return ((got.double() - expected.double()).norm() / expected.double().norm()).item()

    return measure


@pytest.fixture
def assert_close(relative_error: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor], None]:
    def check(got: Tensor, expected: Tensor) -> None:
        assert relative_error(got, expected) < TOLERANCE

    return check


@pytest.fixture
def assert_broken(relative_error: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor], None]:
    """For mutants: the comparison must not only fail but fail by a wide margin. Measured: 0.02 and more."""

    def check(got: Tensor, expected: Tensor) -> None:
        assert relative_error(got, expected) > 100 * TOLERANCE

    return check
