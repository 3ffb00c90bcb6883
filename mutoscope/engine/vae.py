"""The causal 3-D VAE of Wan 2.1: 4 x 8 x 8 compression, streamed in time.

Paper: "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv 2503.20314), section 4.1.
Reference: Wan-Video/Wan2.1 `wan/modules/vae.py`; parameter names are those of its checkpoint.

Axes: B batch, C channels, F frames, H height, W width; latents are [B, Z, 1 + (F-1)/4, H/8, W/8].

The network never looks ahead in time, so a clip is worked through in chunks; each causal convolution keeps its last
two input frames in a `Stream`. Whatever the chunks, the numbers are the same; memory is that of one chunk.

Details that have caused bugs:
- the first frame is a chunk of its own: `down3d` passes it through, `up3d` does not double it;
- the second chunk of `up3d` starts from zeros, as if the first frame had never been (the official 'Rep' rule);
- `up3d` makes 2C channels: the first half is the even frame, the second half the odd one;
- down-sampling pads right and bottom only; RMS norm divides by the L2 norm over C, eps 1e-12, times sqrt(C);
- the encoder's log-variance half is not used: the mean is the latent, normalised per channel.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine import kernels
from mutoscope.errors import WeightError

# Per-channel statistics of the official Wan 2.1 latents (wan/modules/vae.py).
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip

# A linear picture of the official latents for previews: a row of RGB per channel, then the offsets
# (Comfy-Org/ComfyUI latent_formats.py, Wan21).
WAN_RGB = ((-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
           (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
           (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
           (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
           (-0.1835, -0.0868, -0.3360))  # fmt: skip

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8

# diffusers' AutoencoderKLWan.
_DIFFUSERS_ROOT = {"quant_conv.": "conv1.", "post_quant_conv.": "conv2."}
_DIFFUSERS_INNER = {
    ".conv_in.": ".conv1.",
    ".norm_out.": ".head.0.",
    ".conv_out.": ".head.2.",
    ".mid_block.resnets.0.": ".middle.0.",
    ".mid_block.attentions.0.": ".middle.1.",
    ".mid_block.resnets.1.": ".middle.2.",
    ".down_blocks.": ".downsamples.",
}
_DIFFUSERS_RESNET = {
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
}
_UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a file (official or diffusers) to the parameter names of `WanVAE`; unknown ones stay as they are.

    diffusers counts the decoder's layers per level, we count through: its number of residual blocks per level is read
    off the names.
    """
    names = list(names)
    found = [match.groups() for match in map(_UP_BLOCK.match, names) if match]
    per_level = 2 + max((int(j) for _, kind, j in found if kind == "resnets"), default=-2)

    def flat_index(match: re.Match[str]) -> str:
        level, kind, j = match.groups()
        return (
            f"decoder.upsamples.{int(level) * per_level + (int(j) if kind == 'resnets' else per_level - 1)}."
        )

    def translate(name: str) -> str:
        for theirs, ours in _DIFFUSERS_ROOT.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        for theirs, ours in _DIFFUSERS_RESNET.items():
            if "block" in name:
                name = name.replace(theirs, ours)
        for theirs, ours in _DIFFUSERS_INNER.items():
            name = name.replace(theirs, ours)
        return _UP_BLOCK.sub(flat_index, name)

    return {name: translate(name) for name in names}


@dataclass(frozen=True)
class VAEConfig:
    """Widths per level, lowest compression first; `temporal` says which of the down-samplings also halve time."""

    base_dim: int
    z_dim: int
    widths: tuple[int, ...]
    n_res_blocks: int
    temporal: tuple[bool, ...]
    mean: tuple[float, ...] = field(default=WAN_MEAN, repr=False)
    std: tuple[float, ...] = field(default=WAN_STD, repr=False)
    rgb: tuple[tuple[float, ...], ...] = field(default=WAN_RGB, repr=False)

    @classmethod
    def from_tensors(cls, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]) -> VAEConfig:
        """Read the architecture off tensor names and shapes.

        Latent statistics and preview colours come from `vae.latent_*` metadata where present.
        """
        try:
            base_dim = shapes["encoder.conv1.weight"][0]
            z_dim = shapes["conv2.weight"][0]
        except KeyError as missing:
            raise WeightError(f"not a Wan 2.1 VAE: tensor {missing} is missing") from None
        widths: list[int] = []
        counts: list[int] = [0]
        temporal: list[bool] = []
        k = 0
        while True:
            prefix = f"encoder.downsamples.{k}."
            if f"{prefix}residual.6.weight" in shapes:
                if counts[-1] == 0:
                    widths.append(shapes[f"{prefix}residual.6.weight"][0])
                counts[-1] += 1
            elif f"{prefix}resample.1.weight" in shapes:
                temporal.append(f"{prefix}time_conv.weight" in shapes)
                counts.append(0)
            else:
                break
            k += 1
        if len(set(counts)) != 1 or len(widths) != len(counts):
            raise WeightError(
                f"not a Wan 2.1 VAE: residual blocks per level are {counts}, expected equal numbers"
            )
        mean = tuple(float(v) for v in metadata.get("vae.latent_mean", WAN_MEAN))
        std = tuple(float(v) for v in metadata.get("vae.latent_std", WAN_STD))
        if len(mean) != z_dim or len(std) != z_dim:
            raise WeightError(f"VAE: {len(mean)} latent means and {len(std)} deviations for {z_dim} channels")
        rgb = WAN_RGB
        if "vae.latent_rgb" in metadata:
            flat = [float(v) for v in metadata["vae.latent_rgb"]]
            rgb = tuple(tuple(flat[i : i + 3]) for i in range(0, len(flat), 3))  # type: ignore[assignment]
        if len(rgb) != z_dim + 1:
            rgb = ((1.0, 1.0, 1.0), *((0.0,) * 3,) * z_dim)  # only previews use it: better gray than none
        return cls(base_dim, z_dim, tuple(widths), counts[0], tuple(temporal), mean, std, rgb)

    @property
    def metadata(self) -> dict[str, Any]:
        """What `from_tensors` cannot see in the shapes."""
        flat = [value for row in self.rgb for value in row]
        return {"vae.latent_mean": list(self.mean), "vae.latent_std": list(self.std), "vae.latent_rgb": flat}


class Stream(dict[nn.Module, Tensor]):
    """What the causal layers remember between two chunks of one clip."""


class RMSNorm(nn.Module):
    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        inverse_norm = x.square().sum(dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-24).rsqrt()
        return x * inverse_norm.to(x.dtype) * (x.shape[1] ** 0.5 * self.gamma).to(x.dtype)


def normed(norm: RMSNorm, x: Tensor, past: Tensor | None = None) -> Tensor:
    """silu(norm(x)), after the frames `past`.

    In bfloat16, channels last, it is one pass that writes where the convolution will read; as operations of the
    library it is seven.
    """
    n_past = 0 if past is None else past.shape[2]
    if not _in_one_pass(x):
        y = F.silu(norm(x))
        return y if past is None else torch.cat((past, y), dim=2)
    b, c, f, h, w = x.shape
    room = torch.empty(b, f + n_past, h, w, c, dtype=x.dtype)
    if past is not None:
        room[:, :n_past] = past.permute(0, 2, 3, 4, 1)
    gamma = (c**0.5 * norm.gamma.float()).flatten()
    kernels.rms_silu(x, gamma, room[:, n_past:])
    return room.permute(0, 4, 1, 2, 3)


def _in_one_pass(x: Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] == 1
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and not torch.is_grad_enabled()
        and kernels.fits(x.shape[1])
    )


class CausalConv3d(nn.Module):
    """Convolution over [B, C, F, H, W] that sees the current and the `kernel[0] - 1` frames before it."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, *kernel))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, stream: Stream, norm: RMSNorm | None = None) -> Tensor:
        """Of x, or with `norm` of silu(norm(x))."""
        kt, kh, kw = self.weight.shape[2:]
        weight = self.weight
        past = stream.get(self) if kt > 1 else None
        if past is None and kt > 1:
            if x.shape[2] == 1:  # a first frame: before it are zeros, so the last tap does it all
                weight = weight[:, :, -1:]
            else:
                past = x.new_zeros(*x.shape[:2], kt - 1, *x.shape[3:])
        if norm is not None:
            x = normed(norm, x, past)
        elif past is not None:
            x = torch.cat((past, x), dim=2)
        if kt > 1:
            last = x[:, :, 1 - kt :]
            if self in stream:
                stream[self].copy_(last)
            else:
                stream[self] = F.pad(last, (0, 0, 0, 0, kt - 1 - last.shape[2], 0))  # copies in any case
        return F.conv3d(x, weight, self.bias, padding=(0, kh // 2, kw // 2))


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, kt: int = 3) -> None:
        super().__init__()
        self.residual = nn.ModuleDict({
            "0": RMSNorm(c_in, 3), "2": CausalConv3d(c_in, c_out, (kt, 3, 3)),
            "3": RMSNorm(c_out, 3), "6": CausalConv3d(c_out, c_out, (kt, 3, 3)),
        })  # fmt: skip
        self.shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        r = self.residual
        h = r["6"](r["2"](x, stream, r["0"]), stream, r["3"])
        x = x if self.shortcut is None else self.shortcut(x, stream)
        return h + x if torch.is_grad_enabled() else h.add_(x)


class AttentionBlock(nn.Module):
    """Single-head attention among the positions of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        b, c, f, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * f, c, h, w)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        out = self.proj(out.squeeze(1).transpose(1, 2).reshape(b * f, c, h, w))
        return x + out.view(b, f, c, h, w).transpose(1, 2)


class Downsample(nn.Module):
    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        b, c, f, h, w = x.shape
        frames = F.pad(x.transpose(1, 2).reshape(b * f, c, h, w), (0, 1, 0, 1))
        frames = self.resample["1"](frames)
        x = frames.view(b, f, c, *frames.shape[2:]).transpose(1, 2)
        if self.time_conv is None:
            return x
        last = stream.get(self)
        stream[self] = x[:, :, -1:].clone()
        if last is None:
            return x
        return F.conv3d(
            torch.cat((last, x), dim=2), self.time_conv.weight, self.time_conv.bias, stride=(2, 1, 1)
        )


def convolved_twice_as_large(x_NCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a 3x3 convolution makes of x when every pixel is 2x2, [N, O, 2H, 2W], channels last.

    Its nine taps lie on 2x2 pixels of x, other ones for each of the four pixels that one becomes. So it is four 2x2
    convolutions of x, as one with 4 O channels: 16 multiplications instead of 36, and no doubled x in memory.
    """
    n, _, h, w = x_NCHW.shape
    o = conv.out_channels
    sums = torch.tensor(_SUMS)
    taps = torch.einsum("ayk,bxl,oikl->aboiyx", sums, sums, conv.weight.float()).flatten(0, 2)
    taps = taps.to(x_NCHW.dtype).contiguous(memory_format=torch.channels_last)
    four = F.conv2d(x_NCHW, taps, conv.bias.repeat(4), padding=1).permute(0, 2, 3, 1)  # type: ignore[union-attr]
    out = four.new_empty(n, h, 2, w, 2, o)
    for a, b in itertools.product((0, 1), repeat=2):
        first = (2 * a + b) * o
        out[:, :, a, :, b] = four[:, a : a + h, b : b + w, first : first + o]
    return out.view(n, 2 * h, 2 * w, o).permute(0, 3, 1, 2)


_SUMS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
"""Which of three taps fall on either of two neighbours, for the first and for the second half of a pixel."""


class Upsample(nn.Module):
    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        b, c = x.shape[:2]
        if self.time_conv is not None:
            if self not in stream:  # the first frame stays one frame and is not remembered
                stream[self] = x.new_empty(0)
            else:
                x = self.time_conv(x, stream)
                x = self._interleaved(x, c)
        f = x.shape[2]
        frames = x.transpose(1, 2).reshape(b * f, c, *x.shape[3:])
        if _in_one_pass(x):
            frames = convolved_twice_as_large(frames, self.resample["1"])
        else:
            frames = self.resample["1"](F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
        return frames.view(b, f, c // 2, *frames.shape[2:]).transpose(1, 2)

    @staticmethod
    def _interleaved(x: Tensor, c: int) -> Tensor:
        """[B, 2C, F, H, W] to [B, C, 2F, H, W], without leaving the layout that it comes in."""
        if not x.is_contiguous(memory_format=torch.channels_last_3d):
            return x.unflatten(1, (2, c)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        frames = x.permute(0, 2, 3, 4, 1).unflatten(-1, (2, c)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        return frames.permute(0, 4, 1, 2, 3)


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(dim, dim), AttentionBlock(dim), ResBlock(dim, dim)])


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, kernel_times: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, config.base_dim, (kernel_times[0], 3, 3))
        layers: list[nn.Module] = []
        width = config.base_dim
        for level, out in enumerate(config.widths):
            for _ in range(config.n_res_blocks):
                layers.append(ResBlock(width, out, kernel_times[level]))
                width = out
            if level < len(config.temporal):
                layers.append(Downsample(width, config.temporal[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(width)
        self.head = nn.ModuleDict(
            {"0": RMSNorm(width, 3), "2": CausalConv3d(width, 2 * config.z_dim, (3, 3, 3))}
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, stream)
        return self.head["2"](x, stream, self.head["0"])


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, kernel_times: Sequence[int]) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv1 = CausalConv3d(config.z_dim, width, (3, 3, 3))
        self.middle = _middle(width)
        layers: list[nn.Module] = []
        for level in reversed(range(len(config.widths))):
            out = config.widths[level]
            for _ in range(config.n_res_blocks + 1):
                layers.append(ResBlock(width, out, kernel_times[level]))
                width = out
            if level > 0:
                layers.append(Upsample(width, config.temporal[level - 1]))
                width //= 2
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict(
            {"0": RMSNorm(width, 3), "2": CausalConv3d(width, 3, (kernel_times[0], 3, 3))}
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, stream)
        return self.head["2"](x, stream, self.head["0"])


class WanVAE(nn.Module):
    """Clips in [-1, 1] to normalised latents and back.

    `kernel_times` gives the temporal kernel of each level (3 in the official files); a level trained without
    temporal taps has 1, which the loader also recognises in a file whose earlier taps are all zero.
    """

    def __init__(self, config: VAEConfig, kernel_times: Sequence[int] | None = None) -> None:
        super().__init__()
        kernel_times = tuple(kernel_times or (3,) * len(config.widths))
        self.config = config
        self.encoder = Encoder(config, kernel_times)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config, kernel_times)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return like.new_tensor(self.config.mean).view(shape), like.new_tensor(self.config.std).view(shape)

    def encode_stream(self, chunks_BCFHW: Iterator[Tensor]) -> Iterator[Tensor]:
        """Chunks of 1, then multiples of 4 frames in [-1, 1] to float32 latents [B, Z, 1 | n/4, H/8, W/8]."""
        stream = Stream()
        for chunk in chunks_BCFHW:
            moments = self.conv1(self.encoder(chunk.to(self.dtype), stream), stream)
            mu = moments[:, : self.config.z_dim].float()
            mean, std = self._statistics(mu)
            yield (mu - mean) / std

    def encode(self, video_BCFHW: Tensor, chunk: int = TEMPORAL_STRIDE) -> Tensor:
        """A clip of 1 + 4n frames, [B, 3, F, H, W] in [-1, 1], to float32 latents [B, Z, 1 + n, H/8, W/8]."""
        n_frames = video_BCFHW.shape[2]
        starts = [0, *range(1, n_frames, chunk), n_frames] if n_frames > 1 else [0, 1]
        pieces = (video_BCFHW[:, :, a:b] for a, b in itertools.pairwise(starts))
        return torch.cat(list(self.encode_stream(pieces)), dim=2)

    def decode_stream(self, latents_BZFHW: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Latents to float32 frames in [-1, 1]: [B, 3, 1, H, W] first, then [B, 3, 4 * chunk, H, W] at a time."""
        mean, std = self._statistics(latents_BZFHW.float())
        z = (latents_BZFHW.float() * std + mean).to(self.dtype)
        stream = Stream()
        n = z.shape[2]
        starts = [0, *range(1, n, chunk), n] if n > 1 else [0, 1]
        for a, b in itertools.pairwise(starts):
            frames = self.decoder(self.conv2(z[:, :, a:b], stream), stream)
            yield frames.float().clamp(-1, 1)

    def decode(self, latents_BZFHW: Tensor, chunk: int = 1) -> Tensor:
        """The whole clip at once, [B, 3, 1 + 4n, H, W]; for clips of unknown length prefer `decode_stream`."""
        return torch.cat(list(self.decode_stream(latents_BZFHW, chunk)), dim=2)
