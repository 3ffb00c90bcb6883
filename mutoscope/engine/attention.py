"""Softmax attention on [B, L, H, D] tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v, with scale 1/sqrt(D) unless given.

    `bias` is added to the logits and must broadcast to [B, H, L, S]. Returns [B, L, H, D].
    """
    out = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        attn_mask=None if bias is None else bias.to(q_BLHD.dtype),
        scale=scale,
    )
    return out.transpose(1, 2)
