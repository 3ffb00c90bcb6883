"""The Wan 2.1 diffusion transformer with the VACE side branch.

Papers: "Wan" (arXiv 2503.20314), "VACE: All-in-One Video Creation and Editing" (arXiv 2503.07598).
Reference: Wan-Video/Wan2.1 `wan/modules/model.py`, `wan/modules/vace_model.py`; parameter names are those of the
official checkpoint, which the community's GGUF files keep.

Axes: B batch, L tokens (time-major, then rows, then columns), S text keys, H heads, D width, E text width.

The residual stream and all modulation are float32; linear layers run in the compute dtype of their weights.

Fresh memory costs more than arithmetic on it, so where gradients are off (`_may_overwrite`) norms, rotation and the
residual stream work in place. What that brought is in docs/LOG.md.

Details that have caused bugs:
- RMS norm of q and k is over the whole width D, before the split into heads;
- rotary pairs are interleaved (2i, 2i+1); the head's dims are shared out as d - 4*(d//6), 2*(d//6), 2*(d//6) to
  time, rows, columns;
- modulation order is shift, scale, gate for attention, then the same for the feed-forward; the head adds e, not e0;
- the official text is padded to 512 rows and *nothing is masked*: all padding rows share one key, so they are
  computed once and their number enters as a logit bias of log(count), which is exact;
- the output patch is (1, 2, 2, C) with C fastest, while the input patch is (C, 1, 2, 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine import fused
from mutoscope.engine.attention import attend
from mutoscope.engine.linear import Shared, shared
from mutoscope.engine.wan_names import diffusers_name as diffusers_name
from mutoscope.engine.wan_names import our_names as our_names
from mutoscope.errors import WeightError

DEFAULT_HEAD_DIM = 128
DEFAULT_TEXT_LENGTH = 512


@dataclass(frozen=True)
class WanConfig:
    """Everything that shapes the network.

    `text_length` is the number of text rows that the model was trained to attend to, padding included; 0 means that
    it was trained with padding masked. `vace_layers` are the main blocks that receive a hint.
    """

    dim: int
    ffn_dim: int
    n_heads: int
    n_layers: int
    in_dim: int
    out_dim: int
    text_dim: int
    freq_dim: int
    text_length: int = DEFAULT_TEXT_LENGTH
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 0
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @classmethod
    def from_tensors(cls, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> WanConfig:
        """Infer the configuration from tensor shapes; `wan.*` metadata keys tell what shapes cannot."""

        def shape(name: str) -> Sequence[int]:
            if name not in shapes:
                raise WeightError(
                    f"not a Wan model: tensor {name!r} is missing",
                    hint="Expected the official (GGUF) or diffusers tensor names of Wan 2.1.",
                )
            return shapes[name]

        def count(prefix: str) -> int:
            return len({n.split(".")[1] for n in shapes if n.startswith(prefix)})

        dim = shape("head.modulation")[-1]
        n_heads = int(metadata.get("wan.attention.head_count", dim // DEFAULT_HEAD_DIM))
        if n_heads <= 0 or dim % n_heads or (dim // n_heads) % 2:
            raise WeightError(f"width {dim} cannot be split into {n_heads} heads")
        patch_in = math.prod(shape("patch_embedding.weight")) // dim // 4
        n_layers, n_vace = count("blocks."), count("vace_blocks.")
        layers: tuple[int, ...] = ()
        vace_in = 0
        if n_vace:
            stated = metadata.get("wan.vace.layers")
            if stated is not None:
                layers = tuple(int(i) for i in stated)
            else:
                layers = tuple(range(0, n_layers, max(1, n_layers // n_vace)))[:n_vace]
            if len(layers) != n_vace or any(not 0 <= i < n_layers for i in layers):
                raise WeightError(
                    f"{n_vace} VACE blocks cannot be attached to {n_layers} layers (got {layers})"
                )
            vace_in = math.prod(shape("vace_patch_embedding.weight")) // dim // 4
        return cls(
            dim=dim,
            ffn_dim=shape("blocks.0.ffn.0.weight")[0],
            n_heads=n_heads,
            n_layers=n_layers,
            in_dim=patch_in,
            out_dim=shape("head.head.weight")[0] // 4,
            text_dim=shape("text_embedding.0.weight")[1],
            freq_dim=shape("time_embedding.0.weight")[1],
            text_length=int(metadata.get("wan.text_length", DEFAULT_TEXT_LENGTH)),
            vace_layers=layers,
            vace_in_dim=vace_in,
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """The keys that `from_tensors` needs beside the shapes."""
        out: dict[str, Any] = {"wan.attention.head_count": self.n_heads, "wan.text_length": self.text_length}
        if self.vace_layers:
            out["wan.vace.layers"] = list(self.vace_layers)
        return out


@dataclass(frozen=True)
class TextContext:
    """Keys and values of the prompt for every cross-attention, [B, S, H, D/H] each, computed once per clip."""

    keys: list[Tensor]
    values: list[Tensor]
    bias_B11S: Tensor | None

    def slice(self, start: int, stop: int) -> TextContext:
        bias = None if self.bias_B11S is None else self.bias_B11S[start:stop]
        return TextContext([k[start:stop] for k in self.keys], [v[start:stop] for v in self.values], bias)


@dataclass(frozen=True)
class TimeModulation:
    """e [B, D] for the head and e0 [B, 6, D] for the blocks, float32."""

    e: Tensor
    e0: Tensor

    def at(self, i: int) -> TimeModulation:
        """That of the i-th noise level alone."""
        return TimeModulation(self.e[i : i + 1], self.e0[i : i + 1])


def _may_overwrite() -> bool:
    """Whether nobody will look at intermediate results: no gradients, no compiler (which does it better itself)."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """float32; may overwrite x."""
        if not _may_overwrite():
            return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)
        y = x.to(torch.float32)
        mean_square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return y.mul_(mean_square.add_(self.eps).rsqrt_()).mul_(self.weight)


def rope_table(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0, device: Any = None
) -> Tensor:
    """Angles of 3-D rotary embedding as (cos, sin): float32 [2, L, head_dim / 2] for a grid of (F, H, W) tokens."""
    d_h = d_w = 2 * (head_dim // 6)
    parts = []
    for axis, (n, d) in enumerate(zip(grid, (head_dim - d_h - d_w, d_h, d_w), strict=True)):
        freq = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.arange(n, dtype=torch.float64)[:, None] * freq
        shape = [1, 1, 1, -1]
        shape[axis] = n
        parts.append(angle.view(shape).expand(*grid, -1))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)
    return torch.stack((angles.cos(), angles.sin())).float().to(device)


def apply_rope(x_BLHD: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved pairs of float32 [B, L, H, D] by the table of `rope_table`; may overwrite x.

    A pair is a complex number, its rotation one product: the same bits as the long form in a tenth of its time,
    which was 2 % of a forward.
    """
    pairs = x_BLHD.unflatten(-1, (-1, 2))
    if _may_overwrite():
        turn = torch.complex(rope[0], rope[1])[None, :, None, :]
        return torch.view_as_real(torch.view_as_complex(pairs).mul_(turn)).flatten(-2)
    cos, sin = rope[0, None, :, None, :], rope[1, None, :, None, :]
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, *layers: nn.Module
) -> Tensor | Shared:
    """layer_norm(x) * (1 + scale) + shift, for [B or 1, 1, D] modulation; for `layers`, in the form they want."""
    width = (x.shape[-1],)
    if layers and fused.can(x, *layers):
        return fused.normed(x, (1 + scale).squeeze(1), shift.squeeze(1).contiguous(), eps)
    if scale.shape[0] == 1:  # one noise level for all samples: the norm's own weight and bias
        return F.layer_norm(x, width, (1 + scale).flatten(), shift.flatten(), eps)
    return F.layer_norm(x, width, eps=eps) * (1 + scale) + shift


def add_gated(x: Tensor, y: Tensor, gate: Tensor | float) -> Tensor:
    """x + y * gate on the float32 stream x, which may be overwritten."""
    if not _may_overwrite():
        return x + y.float() * gate
    return x.add_(y, alpha=gate) if isinstance(gate, float) else x.addcmul_(y, gate)


def add_layer(x: Tensor, layer: nn.Module, y: Tensor | Shared, gate: Tensor | float) -> Tensor:
    """`add_gated` of layer(y)."""
    return fused.add_product(x, layer, y, gate) if fused.can(x, layer) else add_gated(x, layer(y), gate)


GELU_LOW = -0.1701
"""GELU gives nothing below: its least is -0.17004, with the tanh approximation."""


def gelu_of(layer: nn.Module, x: Tensor | Shared) -> Tensor | Shared:
    """gelu(layer(x)), the tanh approximation, as one operation where the layer can."""
    if isinstance(x, Shared) and fused.is_integer(layer):
        return fused.gelu(layer, x, GELU_LOW)
    if getattr(layer, "fuses_gelu", False):
        return layer(x, gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def _computed(layer: nn.Module, x: Tensor | Shared) -> Tensor:
    """layer(x) in the dtype that attention should have."""
    y = layer(x)
    return y.to(getattr(layer, "compute_dtype", y.dtype))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor | Shared, rope: Tensor) -> Tensor:
        """Before the last layer, `o`."""
        heads = (self.n_heads, -1)
        if isinstance(x, Shared):
            return fused.self_attention(self, x, rope)
        x_all = shared(x, self.q, self.k, self.v)
        q, k = self.norm_q(self.q(x_all)), self.norm_k(self.k(x_all))
        v = _computed(self.v, x_all).unflatten(-1, heads)
        q = apply_rope(q.unflatten(-1, heads), rope).to(v.dtype)
        k = apply_rope(k.unflatten(-1, heads), rope).to(v.dtype)
        return attend(q, k, v).flatten(-2)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def keys_values(self, text_BSD: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.n_heads, -1)
        v = _computed(self.v, text_BSD).unflatten(-1, heads)
        return self.norm_k(self.k(text_BSD)).unflatten(-1, heads).to(v.dtype), v

    def forward(self, x: Tensor | Shared, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Before the last layer, `o`."""
        if isinstance(x, Shared):
            return fused.cross_attention(self, x, k, v, bias)
        q = self.norm_q(self.q(x)).unflatten(-1, (self.n_heads, -1)).to(v.dtype)
        return attend(q, k, v, bias).flatten(-2)


class Block(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.modulation = nn.Parameter(torch.normal(0.0, dim**-0.5, (1, 6, dim)))
        self.self_attn = SelfAttention(dim, config.n_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, config.n_heads, eps)
        self.ffn = nn.ModuleDict({"0": nn.Linear(dim, config.ffn_dim), "2": nn.Linear(config.ffn_dim, dim)})
        self.eps = eps

    def forward(
        self, x: Tensor, e0: Tensor, rope: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor:
        """One block on the float32 residual stream x [B, L, D], which may be overwritten."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            (self.modulation.float() + e0).unsqueeze(2).unbind(1)
        )
        attn, cross, up, down = self.self_attn, self.cross_attn, self.ffn["0"], self.ffn["2"]
        y = modulated_norm(x, scale_a, shift_a, self.eps, attn.q, attn.k, attn.v)
        x = add_layer(x, attn.o, attn(y, rope), gate_a)
        y = fused.normed_by(self.norm3, x) if fused.can(x, cross.q) else self.norm3(x)
        x = add_layer(x, cross.o, cross(y, k, v, bias), 1.0)
        for part in self._ffn_parts(x):
            y = gelu_of(up, modulated_norm(part, scale_f, shift_f, self.eps, up))
            y = y if isinstance(y, Shared) else shared(y, down, low=GELU_LOW)
            y = add_layer(part, down, y, gate_f)
        return x if _may_overwrite() else y  # which then is the only part

    def _ffn_parts(self, x: Tensor) -> Sequence[Tensor]:
        """The stream in equal runs of tokens, where that is faster: the wide layer's results then stay in the cache."""
        rows = getattr(self.ffn["0"], "rows_at_once", 0)
        if not rows or not _may_overwrite():
            return (x,)
        n, most = x.shape[1], max(1, rows // x.shape[0])
        return x.split(-(-n // -(-n // most)), dim=1)


class VaceBlock(Block):
    def __init__(self, config: WanConfig, index: int) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if index == 0 else None
        self.after_proj = nn.Linear(config.dim, config.dim)


class PatchEmbedding(nn.Module):
    """A convolution with kernel = stride = (1, 2, 2), done as one matrix product in float32."""

    def __init__(self, c_in: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.normal(0.0, (4 * c_in) ** -0.5, (dim, c_in, 1, 2, 2)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        patches = x_BCFHW.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        return F.linear(patches.flatten(4).flatten(1, 3).float(), self.weight.flatten(1), self.bias)


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, 4 * config.out_dim)
        self.modulation = nn.Parameter(torch.normal(0.0, config.dim**-0.5, (1, 2, config.dim)))
        self.eps = config.eps

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + e[:, None]).unsqueeze(2).unbind(1)
        return self.head(modulated_norm(x, scale, shift, self.eps)).float()


class WanModel(nn.Module):
    """Predicts the flow velocity (noise - clean) of latents [B, C, F, H, W] at a noise level."""

    FLOAT32 = (
        "patch_embedding",
        "vace_patch_embedding",
        "time_embedding",
        "time_projection",
        "text_embedding",
        "head",
    )
    """Parts that always run in float32: their cost is nothing and their error goes everywhere."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim)
        self.text_embedding = nn.ModuleDict({"0": nn.Linear(config.text_dim, dim), "2": nn.Linear(dim, dim)})
        self.time_embedding = nn.ModuleDict({"0": nn.Linear(config.freq_dim, dim), "2": nn.Linear(dim, dim)})
        self.time_projection = nn.ModuleDict({"1": nn.Linear(dim, 6 * dim)})
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.head = Head(config)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.vace_in_dim, dim)
            self.vace_blocks = nn.ModuleList([VaceBlock(config, m) for m in range(len(config.vace_layers))])

    def time_modulation(self, t_B: Tensor) -> TimeModulation:
        """Noise levels 0..1000, [B], to the modulation of all blocks; made once per schedule."""
        half = self.config.freq_dim // 2
        freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = t_B.cpu().double()[:, None] * freq  # some devices have no float64
        emb = torch.cat((angle.cos(), angle.sin()), dim=1).float().to(t_B.device)
        e = self.time_embedding["2"](F.silu(self.time_embedding["0"](emb))).float()
        return TimeModulation(e, self.time_projection["1"](F.silu(e)).float().unflatten(1, (6, -1)))

    def text_context(
        self, rows_BSE: Tensor, lengths: Sequence[int] | Tensor, *, vace: bool = True
    ) -> TextContext:
        """Encoder rows [B, S, E] of which the first lengths[b] are real, to keys and values for every block.

        Rows after the length are ignored. With `text_length` set, the official padding is added as one key per
        sample whose logit carries log(number of padding rows).
        """
        n, padded = rows_BSE.shape[1], self.config.text_length > 0
        rows, bias = rows_BSE, None
        if padded or isinstance(lengths, Tensor) or min(lengths) < n:
            counts = torch.as_tensor(lengths, device=rows.device)
            bias = torch.zeros(rows.shape[0], n, device=rows.device)
            bias = bias.masked_fill(torch.arange(n, device=rows.device) >= counts[:, None], -math.inf)
            if padded:
                rows = torch.cat((rows, rows.new_zeros(rows.shape[0], 1, rows.shape[2])), dim=1)
                pad_rows = (self.config.text_length - counts).clamp(min=0)
                bias = torch.cat((bias, pad_rows.float().log()[:, None]), dim=1)
            bias = bias[:, None, None, :]
        text = self.text_embedding["2"](F.gelu(self.text_embedding["0"](rows), approximate="tanh"))
        blocks = [*self.blocks, *(self.vace_blocks if vace and self.config.vace_layers else ())]
        pairs = [block.cross_attn.keys_values(text) for block in blocks]
        return TextContext([k for k, _ in pairs], [v for _, v in pairs], bias)

    def vace_tokens(self, context_BCFHW: Tensor) -> Tensor:
        """The VACE context [B, 96, F, H, W] as tokens [B, L, D]; the same in every step."""
        return self.vace_patch_embedding(context_BCFHW)

    def forward(
        self,
        x_BCFHW: Tensor,
        time: TimeModulation,
        text: TextContext,
        rope: Tensor,
        vace_BLD: Tensor | None = None,
        vace_strength: float = 1.0,
        around: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None,
    ) -> Tensor:
        """Velocity, float32, of the shape of x. `vace_BLD` comes from `vace_tokens`; None skips the side branch.

        around: stands in the place of the blocks: gets the tokens [B, L, D], and the blocks as a function of them.
        """
        b, _, f, h, w = x_BCFHW.shape
        x = self.patch_embedding(x_BCFHW)

        def blocks(x: Tensor) -> Tensor:
            return self._through_blocks(x, time.e0, text, rope, vace_BLD, vace_strength)

        x = blocks(x) if around is None else around(x, blocks)
        out = self.head(x, time.e)
        out = out.view(b, f, h // 2, w // 2, 2, 2, self.config.out_dim)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, self.config.out_dim, f, h, w)

    def _through_blocks(
        self,
        x: Tensor,
        e0: Tensor,
        text: TextContext,
        rope: Tensor,
        vace_BLD: Tensor | None,
        vace_strength: float,
    ) -> Tensor:
        """The tokens [B, L, D], which may be overwritten, through all blocks."""
        n = self.config.n_layers
        hints = {i: m for m, i in enumerate(self.config.vace_layers)} if vace_BLD is not None else {}
        if vace_BLD is not None:
            c = self.vace_blocks[0].before_proj(vace_BLD).float() + x  # never the memory of vace_BLD or x
        for i, block in enumerate(self.blocks):
            x = block(x, e0, rope, text.keys[i], text.values[i], text.bias_B11S)
            if i in hints:
                m = hints[i]
                side = self.vace_blocks[m]
                c = side(c, e0, rope, text.keys[n + m], text.values[n + m], text.bias_B11S)
                x = add_gated(x, side.after_proj(c), float(vace_strength))
        return x
