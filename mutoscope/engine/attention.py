"""Softmax attention on [B, L, H, D] tensors.

On CPUs in bfloat16 long sequences are worked through in blocks of queries: product, softmax, product, each by the
best kernel there is, on logits that stay in the cache. `scaled_dot_product_attention` leaves most of the machine
unused there (docs/performance.md). Memory grows with the number of tokens, not with its square: one block of logits.

Logits of the blocked path are rounded to bfloat16, sums and maxima are float32. What all keys have in common shifts
all logits of a query alike, so the mean key is subtracted first: trained keys share a large part, and smaller logits
lose less to rounding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mutoscope.engine import kernels
from mutoscope.engine.jit import LANES

MIN_LOGITS = 1 << 16
"""Queries times keys per head from which blocks are worth their overhead."""
BLOCK_LOGITS = 1 << 22
"""Logits of one block, 8 MiB in bfloat16."""
BLOCK_QUERIES = (64, 512)
"""Fewest and most queries of a block: the products need some height, the softmax some cache."""
FEW_LOGITS = 1 << 18
"""However many queries that is, they are one block: they stay in the second-level cache."""


def attend(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v, with scale 1/sqrt(D) unless given.

    `bias` is added to the logits and must broadcast to [B, H, L, S]. Returns [B, L, H, D].
    """
    scale = q_BLHD.shape[-1] ** -0.5 if scale is None else scale
    if _blocks_are_faster(q_BLHD, k_BSHD):
        return attend_in_blocks(q_BLHD, k_BSHD, v_BSHD, bias, scale)
    q, k, v = q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2)
    if q.requires_grad and q.device.type == "cpu":
        # Training: the fused kernel's backward is 3 to 20 times slower than plain products there.
        logits = ((q * scale) @ k.mT).float()
        weights = (logits if bias is None else logits + bias).softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2)
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _blocks_are_faster(q_BLHD: Tensor, k_BSHD: Tensor) -> bool:
    return (
        q_BLHD.dtype == torch.bfloat16
        and q_BLHD.device.type == "cpu"
        and not q_BLHD.requires_grad
        and not torch.compiler.is_compiling()
        and q_BLHD.shape[1] * k_BSHD.shape[1] >= MIN_LOGITS
    )


def is_long(n: int) -> bool:
    """Whether attention among so many tokens is worth blocks."""
    return n * n >= MIN_LOGITS


def attend_in_blocks(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """`attend` for inference: one head and one block of queries at a time, all keys at once."""
    q, k = (t.transpose(1, 2) for t in _scaled(q_BLHD, k_BSHD, scale))
    n_keys = k_BSHD.shape[1]
    n_room = room_for_keys(n_keys)
    k, v = (F.pad(t, (0, 0, 0, n_room - n_keys)).contiguous() for t in (k, v_BSHD.transpose(1, 2)))
    return attend_by_heads(q.contiguous(), k, v, n_keys, bias)


def room_for_keys(n: int) -> int:
    """Of how many keys and values there must be memory, those after `n` zero."""
    return -(-n // LANES) * LANES if kernels.fits() else n


def attend_by_heads(
    q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, n_keys: int, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T + bias) v for contiguous bfloat16 heads; keys and values as `room_for_keys` says.

    Returns [B, L, H, D].
    """
    (n_batch, n_heads, n, head), n_room = q_BHLD.shape, k_BHSD.shape[2]
    q, k, v = q_BHLD, k_BHSD, v_BHSD
    if bias is not None:
        bias = F.pad(bias.float(), (0, n_room - n_keys)).expand(n_batch, n_heads, -1, n_room)
    fewest, most = BLOCK_QUERIES
    step = max(min(BLOCK_LOGITS // n_room // fewest * fewest, most), fewest, FEW_LOGITS // n_room)
    step = min(step, n)
    logits = q.new_empty(step * n_room)
    out = torch.empty(n_batch, n, n_heads, head, dtype=q.dtype, device=q.device)
    for b in range(n_batch):
        for h in range(n_heads):
            keys_DS, values_SD = k[b, h].T, v[b, h]
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                count = rows.stop - start
                logits_LS = logits[: count * n_room].view(count, n_room)
                torch.mm(q[b, h, rows], keys_DS, out=logits_LS)
                of_keys = None  # a bias that is the same for all these queries
                if bias is not None and bias.shape[2] == 1 and kernels.fits():
                    of_keys = bias[b, h, 0]
                elif bias is not None:
                    logits_LS += bias[b, h, rows if bias.shape[2] > 1 else slice(None)]
                if kernels.fits():
                    kernels.softmax_(logits_LS, n_keys, of_keys)
                else:
                    torch.softmax(logits_LS, -1, out=logits_LS)
                torch.mm(logits_LS, values_SD, out=out[b, rows, h])
    return out


def _scaled(q_BLHD: Tensor, k_BSHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k whose product is the scaled logits less a constant per query.

    The power of two within `scale` goes to q, which costs no precision; the rest to k, which is rounded anyway.
    """
    mantissa, exponent = math.frexp(scale)
    keys = k_BSHD.float()
    keys = keys.sub_(keys.mean(dim=1, keepdim=True)).mul_(2 * mantissa).to(k_BSHD.dtype)
    return q_BLHD * 2.0 ** (exponent - 1), keys
