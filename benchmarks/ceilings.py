"""What this machine's library reaches on nothing but the products of a network: the floor of its time.

    linear layers and attention     dense products of their shapes, weights ready, divided by nothing else
    convolutions                    the network's own, one by one, in the best layout for them

A floor assumes that all else (norms, softmax, unpacking of weights, copies) is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig, WanVAE
from mutoscope.engine.wan import WanConfig

# ---------------------------------------------------------------- machine


def matmul(dtype: torch.dtype, shape: tuple[int, int, int]) -> Callable[[], object]:
    """A dense product [M, K] x [K, N] in float32, bfloat16 or 8-bit integers (uint8 x int8 to bfloat16)."""
    m, k, n = shape
    if dtype == torch.int8:
        x = torch.randint(0, 255, (m, k), dtype=torch.uint8)
        weight = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (n, k), dtype=torch.int8), None)
        steps, zeros = torch.rand(n), torch.zeros(n, dtype=torch.int64)
        return lambda: torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, weight, steps, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    return lambda: torch.mm(a, b.T, out=out)


def copy(n_bytes: int = 1 << 28) -> Callable[[], object]:
    """Memory to memory; its traffic is twice `n_bytes`."""
    a = torch.ones(n_bytes, dtype=torch.uint8)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


# ---------------------------------------------------------------- transformer


def linear_flops(config: WanConfig, n_tokens: int) -> float:
    """Of the blocks of one forward; 2 for a multiplication and an addition. The prompt's share is once per clip."""
    per_token = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    return 2.0 * n_tokens * per_token * config.n_layers


def attention_flops(config: WanConfig, n_tokens: int, n_keys: int) -> float:
    """Self-attention and attention to `n_keys` text rows."""
    return 4.0 * n_tokens * (n_tokens + n_keys) * config.dim * config.n_layers


def products_of_blocks(config: WanConfig, n_tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """The linear layers of one block without the block, as often as there are blocks: what lasts as long as a forward
    meets the same good and bad moments of a machine."""
    sizes = [(config.dim, config.dim)] * 6 + [(config.ffn_dim, config.dim), (config.dim, config.ffn_dim)]
    weights = [torch.randn(n, k).to(dtype) for n, k in sizes]
    inputs = {k: torch.randn(n_tokens, k).to(dtype) for k in (config.dim, config.ffn_dim)}

    def run() -> None:
        for weight in weights * config.n_layers:
            F.linear(inputs[weight.shape[1]], weight)

    return run


def integer_products_of_blocks(config: WanConfig, n_tokens: int) -> Callable[[], None]:
    """The same in 8-bit integers."""
    sizes = [(config.dim, config.dim)] * 6 + [(config.ffn_dim, config.dim), (config.dim, config.ffn_dim)]
    products = [matmul(torch.int8, (n_tokens, k, n)) for n, k in sizes]

    def run() -> None:
        for product in products * config.n_layers:
            product()

    return run


# ---------------------------------------------------------------- VAE

Convolution = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Shapes of input and weight, stride, padding."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding = args[:5]
            self.seen[tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding)] += 1
        return func(*args, **(kwargs or {}))


def decoder_convolutions(config: VAEConfig, width: int, height: int, frames: int) -> Counter[Convolution]:
    """Every convolution of our decoder with the number of times it runs, found without computing anything."""
    # In inference mode a recorder would see conv2d and conv3d and not what they become.
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), _Recorder() as recorder:
        latent_frames = 1 + (frames - 1) // TEMPORAL_STRIDE
        z = torch.empty(1, config.z_dim, latent_frames, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        for _ in WanVAE(config).decode_stream(z):
            pass
    return recorder.seen


def convolution_flops(convolution: Convolution) -> float:
    x, weight, stride, padding = convolution
    out = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x[2:], weight[2:], stride, padding, strict=True)]
    return 2.0 * x[0] * torch.Size(out).numel() * torch.Size(weight).numel()


def runner(convolution: Convolution, dtype: torch.dtype) -> Callable[[], Tensor]:
    """That convolution alone, channels last."""
    x_shape, weight_shape, stride, padding = convolution
    is_3d = len(x_shape) == 5
    layout = torch.channels_last_3d if is_3d else torch.channels_last
    x = torch.randn(x_shape).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(weight_shape).to(dtype).contiguous(memory_format=layout)
    convolve = F.conv3d if is_3d else F.conv2d
    return lambda: convolve(x, weight, stride=stride, padding=padding)
