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
    q, k, v = q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2)
    if q.requires_grad and q.device.type == "cpu":
        # Training: the fused kernel's backward is 3 to 20 times slower than plain products there.
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = ((q * scale) @ k.mT).float()
        weights = (logits if bias is None else logits + bias).softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2)
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
