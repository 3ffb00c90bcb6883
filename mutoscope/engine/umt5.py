"""The UMT5 text encoder.

Papers: T5 (arXiv 1910.10683), UniMax/UMT5 (arXiv 2304.09151). Reference: Wan-Video/Wan2.1 `wan/modules/t5.py`.
Parameter names are those of llama.cpp's `t5encoder` GGUF files.

Axes: B batch, L tokens, D width, H heads, K head width.

Details that have caused bugs:
- no 1/sqrt(K) on the logits, no biases, no embedding scale;
- every layer has its own relative position table;
- float16 overflows in the feed-forward: use bfloat16 or float32;
- padding is masked as a key and positions are relative, so encoding only the real tokens gives the same rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine.attention import attend
from mutoscope.errors import WeightError

_ROOT = {
    "shared.": "token_embd.",  # transformers
    "encoder.embed_tokens.": "token_embd.",
    "encoder.final_layer_norm.": "enc.output_norm.",
    "token_embedding.": "token_embd.",  # Wan's .pth
    "norm.": "enc.output_norm.",
}
_LAYER = re.compile(r"(?:encoder\.block|blocks)\.(\d+)\.(.+)\.weight")
_PARTS = {
    "layer.0.layer_norm": "attn_norm",  # transformers
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "norm1": "attn_norm",  # Wan's .pth
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_o",
    "pos_embedding.embedding": "attn_rel_b",
    "norm2": "ffn_norm",
    "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
}


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a file (llama.cpp, transformers or Wan's .pth) to those of `UMT5Encoder`; unknown ones stay as they are.

    transformers may store the embedding twice under two names; the second is left out.
    """
    names = list(names)

    def translate(name: str) -> str:
        for theirs, ours in _ROOT.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        match = _LAYER.fullmatch(name)
        if match and match[2] in _PARTS:
            return f"enc.blk.{match[1]}.{_PARTS[match[2]]}.weight"
        return name

    tied = {"encoder.embed_tokens.weight"} if "shared.weight" in names else set()
    return {name: translate(name) for name in names if name not in tied}


@dataclass(frozen=True)
class UMT5Config:
    vocab_size: int
    dim: int
    ffn_dim: int
    n_layers: int
    n_heads: int
    head_dim: int
    n_buckets: int
    max_distance: int = 128
    eps: float = 1e-6

    @classmethod
    def from_tensors(cls, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> UMT5Config:
        """Read everything off the shapes of GGUF-named tensors; the relative table [buckets, heads] gives the heads."""
        for name in ("token_embd.weight", "enc.blk.0.attn_q.weight", "enc.blk.0.attn_rel_b.weight"):
            if name not in shapes:
                raise WeightError(f"not a UMT5 encoder: tensor {name!r} is missing")
        vocab, dim = shapes["token_embd.weight"]
        n_buckets, n_heads = shapes["enc.blk.0.attn_rel_b.weight"]
        inner = shapes["enc.blk.0.attn_q.weight"][0]
        if inner % n_heads:
            raise WeightError(f"UMT5: attention width {inner} is not divisible by {n_heads} heads")
        return cls(
            vocab_size=vocab,
            dim=dim,
            ffn_dim=shapes["enc.blk.0.ffn_gate.weight"][0],
            n_layers=len({n.split(".")[2] for n in shapes if n.startswith("enc.blk.")}),
            n_heads=n_heads,
            head_dim=inner // n_heads,
            n_buckets=n_buckets,
            eps=float(metadata.get("t5encoder.attention.layer_norm_rms_epsilon", 1e-6)),
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """The `t5encoder.*` keys that llama.cpp writes."""
        return {
            "general.architecture": "t5encoder",
            "t5encoder.context_length": 512,
            "t5encoder.embedding_length": self.dim,
            "t5encoder.feed_forward_length": self.ffn_dim,
            "t5encoder.block_count": self.n_layers,
            "t5encoder.attention.head_count": self.n_heads,
            "t5encoder.attention.key_length": self.head_dim,
            "t5encoder.attention.value_length": self.head_dim,
            "t5encoder.attention.relative_buckets_count": self.n_buckets,
            "t5encoder.attention.layer_norm_rms_epsilon": self.eps,
        }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)


def relative_buckets(n: int, n_buckets: int, max_distance: int) -> Tensor:
    """Bucket of (key - query) for all pairs, int64 [L, L]: exact near zero, logarithmic up to `max_distance`."""
    position = torch.arange(n)
    relative = position[None, :] - position[:, None]
    half = n_buckets // 2
    exact = half // 2
    distance = relative.abs()
    log_ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log_ratio * (half - exact)).long()).clamp(max=half - 1)
    return half * (relative > 0).long() + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    def __init__(self, n_buckets: int, n_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_buckets, n_heads))

    def forward(self, buckets_LL: Tensor) -> Tensor:
        return self.weight.float()[buckets_LL].permute(2, 0, 1)[None]


class Layer(nn.Module):
    def __init__(self, c: UMT5Config) -> None:
        super().__init__()
        inner = c.n_heads * c.head_dim
        self.attn_norm, self.ffn_norm = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.attn_q, self.attn_k, self.attn_v = (nn.Linear(c.dim, inner, bias=False) for _ in range(3))
        self.attn_o = nn.Linear(inner, c.dim, bias=False)
        self.attn_rel_b = RelativeBias(c.n_buckets, c.n_heads)
        self.ffn_gate, self.ffn_up = (nn.Linear(c.dim, c.ffn_dim, bias=False) for _ in range(2))
        self.ffn_down = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.n_heads = c.n_heads

    def forward(self, xs: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """Texts x [B, L, D], each with what is added to its logits, broadcast to [B, H, L, L].

        A packed weight is unpacked once for all of them if it is asked for several times in a row.
        """

        def each(layer: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
            return [layer(x) for x in inputs]

        normed = each(self.attn_norm, xs)
        q, k, v = (
            [t.unflatten(-1, (self.n_heads, -1)) for t in each(projection, normed)]
            for projection in (self.attn_q, self.attn_k, self.attn_v)
        )
        attended = [
            attend(*qkv, bias, scale=1.0).flatten(-2) for *qkv, bias in zip(q, k, v, biases, strict=True)
        ]
        xs = [x + y.float() for x, y in zip(xs, each(self.attn_o, attended), strict=True)]
        normed = each(self.ffn_norm, xs)
        gates, ups = each(self.ffn_gate, normed), each(self.ffn_up, normed)
        inner = [F.gelu(gate, approximate="tanh") * up for gate, up in zip(gates, ups, strict=True)]
        return [x + y.float() for x, y in zip(xs, each(self.ffn_down, inner), strict=True)]


class Stack(nn.Module):
    def __init__(self, c: UMT5Config) -> None:
        super().__init__()
        self.blk = nn.ModuleList([Layer(c) for _ in range(c.n_layers)])
        self.output_norm = RMSNorm(c.dim, c.eps)


class UMT5Encoder(nn.Module):
    """Token ids to one float32 row per token."""

    FLOAT32: tuple[str, ...] = ()

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.vocab_size, config.dim)
        self.enc = Stack(config)

    def forward(self, ids_BL: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """ids [B, L] to rows [B, L, D]; with `lengths`, later tokens are not attended to (their rows mean nothing)."""
        n, device = ids_BL.shape[1], ids_BL.device
        key_bias = None
        if lengths is not None and min(lengths) < n:
            real = torch.arange(n, device=device)[None] < torch.as_tensor(lengths, device=device)[:, None]
            key_bias = torch.where(real, 0.0, -math.inf)[:, None, None, :]
        return self._rows([ids_BL], key_bias)[0]

    def together(self, texts: Sequence[Tensor], between: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Texts of ids [1, L] to the very rows that `forward` gives for each, reading every weight once.

        between: called before every layer; what it raises ends the work.
        """
        return self._rows(texts, None, between)

    def _rows(
        self, texts: Sequence[Tensor], key_bias: Tensor | None, between: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        c = self.config
        xs = [self.token_embd(ids).float() for ids in texts]
        buckets = [relative_buckets(x.shape[1], c.n_buckets, c.max_distance).to(x.device) for x in xs]
        for layer in self.enc.blk:
            between()
            biases = [layer.attn_rel_b(b) for b in buckets]
            xs = layer(xs, biases if key_bias is None else [bias + key_bias for bias in biases])
        return [self.enc.output_norm(x) for x in xs]
