"""What a transformer block does between its products, by `kernels.py` where they can be used.

Every function here computes what `wan.py` computes with the library's operations, with as many roundings or fewer.
`can` says whether it may be called: for inference in 8-bit integers or bfloat16 on many tokens, where kernels can run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine import kernels
from mutoscope.engine.attention import attend_by_heads, is_long, room_for_keys
from mutoscope.engine.int8 import Int8, Rows
from mutoscope.engine.linear import Shared

SAMPLED_KEYS = 64
"""Keys whose mean is taken off all keys."""


def can(x_BLD: Tensor, *layers: nn.Module) -> bool:
    """Whether what surrounds these layers may be computed here; `x`: the stream, or part of it."""
    return (
        x_BLD.dtype == torch.float32
        and x_BLD.device.type == "cpu"
        and x_BLD[0].is_contiguous()
        and is_long(x_BLD.shape[1])
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(_is_suited(layer) for layer in layers)
        and kernels.fits(x_BLD.shape[2])
    )


def _is_suited(layer: Any) -> bool:
    """Whether it gives its products away, and nobody watches what it gets."""
    return (
        getattr(layer, "compute_dtype", None) == torch.bfloat16
        and hasattr(layer, "products")
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and kernels.fits(layer.in_features, layer.out_features)
    )


def normed(x_BLD: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Shared:
    """layer_norm(x) * weight + bias, [B or 1, D], in the form that layers ask for. x must not change before."""

    def plain() -> Tensor:
        return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps) * weight[:, None] + bias[:, None]

    return Shared(
        plain,
        shape=x_BLD.shape,
        ways={
            "int8": lambda: Rows(*kernels.normed_int8(x_BLD, weight, bias, eps), 128, 0.0),
            str(torch.bfloat16): lambda: kernels.normed_bfloat16(x_BLD, weight, bias, eps),
        },
    )


def normed_by(norm: nn.LayerNorm, x_BLD: Tensor) -> Shared:
    """`normed` by a layer norm with weight and bias."""
    return normed(x_BLD, norm.weight.float()[None], norm.bias.float()[None], norm.eps)


def gelu(layer: Any, x: Tensor | Shared, low: float) -> Shared:
    """GELU of a layer whose products are integers; nothing of it is below `low`."""
    n_rows, width = x.shape[:-1].numel(), layer.out_features

    def eight_bits() -> Rows:
        q_MN, step_M1 = torch.empty(n_rows, width, dtype=torch.uint8), torch.empty(n_rows, 1)
        for part, p in layer.products(x):
            kernels.gelu_int8(p, low, q_MN[part], step_M1[part])
        return Rows(q_MN, step_M1, 128 - kernels.LEVELS, low)

    shape = torch.Size((*x.shape[:-1], width))
    return Shared(lambda: layer(x, gelu=True), low, shape=shape, ways={"int8": eight_bits})


def is_integer(layer: Any) -> bool:
    """Whether its products come without steps and bias."""
    return isinstance(getattr(layer, "precision", None), Int8)


def add_product(x_BLD: Tensor, layer: Any, y: Tensor | Shared, gate: Tensor | float) -> Tensor:
    """x + layer(y) * gate, in place."""
    for part, p in layer.products(y):
        kernels.add_gated(x_BLD, p, gate, part.start)
    return x_BLD


def self_attention(attn: Any, x: Shared, rope: Tensor) -> Tensor:
    """Attention of a `SelfAttention` before its last layer, bfloat16 [B, L, D]."""
    (b, n, width), h = x.shape, attn.n_heads
    head = width // h
    size = (b, h, room_for_keys(n), head)
    q, k, v = (
        torch.empty(b, h, n, head, dtype=torch.bfloat16),
        *(torch.empty(size, dtype=torch.bfloat16) for _ in "kv"),
    )
    _heads(attn.q, x, q, head, n, attn.norm_q, rope, head**-0.5)
    _keys(attn, x, k, head, n, rope)
    _heads(attn.v, x, v, head, n)
    k[:, :, n:], v[:, :, n:] = 0, 0
    return attend_by_heads(q, k, v, n).flatten(2)


def _heads(layer: Any, x: Tensor | Shared, out: Tensor, head: int, n: int, norm: Any = None,
           rope: Tensor | None = None, scale: float = 1.0) -> None:  # fmt: skip
    more = {} if norm is None else {"weight": norm.weight.float(), "eps": norm.eps}
    for part, p in layer.products(x):
        kernels.heads(
            p, out,
            first=part.start, length=n, head=head, scale=scale, rope=rope, **more,
        )  # fmt: skip


def _keys(attn: Any, x: Shared, out: Tensor, head: int, n: int, rope: Tensor) -> None:
    """Keys less the mean of some of them: what all keys have in common shifts all logits of a query alike, and
    smaller logits lose less to rounding."""
    more = {
        "length": n,
        "head": head,
        "weight": attn.norm_k.weight.float(),
        "eps": attn.norm_k.eps,
        "rope": rope,
    }
    common = None
    for part, p in attn.k.products(x):
        if common is None:
            every = max(1, len(p.y_MN) // SAMPLED_KEYS)
            some = torch.empty(-(-len(p.y_MN) // every), p.y_MN.shape[1])
            kernels.heads(p, some, first=part.start, every=every, **more)
            common = some.mean(0)
        kernels.heads(p, out, first=part.start, common_N=common, **more)


def cross_attention(attn: Any, x: Shared, k_BSHD: Tensor, v_BSHD: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of a `CrossAttention` before its last layer, bfloat16 [B, L, D]."""
    b, n, width = x.shape
    head = width // attn.n_heads
    q = torch.empty(b, attn.n_heads, n, head, dtype=torch.bfloat16)
    _heads(attn.q, x, q, head, n, attn.norm_q, None, head**-0.5)
    n_keys = k_BSHD.shape[1]
    fill = (0, 0, 0, room_for_keys(n_keys) - n_keys)
    k, v = (
        F.pad(t.transpose(1, 2), fill).contiguous() for t in (k_BSHD - k_BSHD.mean(1, keepdim=True), v_BSHD)
    )
    return attend_by_heads(q, k, v, n_keys, bias).flatten(2)
