"""A linear video code of the VAE's shape: a target for its encoder that needs no training.

Each (4 x 8 x 8) block of pixels becomes 16 numbers by principal components; the first frame, alone in its latent
frame, has components of its own, rotated (orthogonal Procrustes) so that a still picture has nearly the same code
there as later. The diffusion model can start on these latents while the VAE is still learning them.

Partial whitening: component i is divided by std_i ** WHITEN, so that fine components stand out of the noise without
drowning the coarse ones. A guess between none (0.0) and full (1.0), not compared with either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WHITEN = 0.35
Z = 16
ACROSS, DOWN, FIRST = 9, 11, 12
"""The components that `marked` marks: fine ones, of which the decoder shows next to nothing."""


def _blocks(video_BCFHW: Tensor, t: int) -> Tensor:
    """Pixels in blocks of (t, 8, 8): [B, F/t, H/8, W/8, t * 64 * 3]."""
    x = video_BCFHW.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).unflatten(2, (-1, t))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


@dataclass(frozen=True)
class LinearCode:
    """later [768, 16] with its mean [768], first [192, 16] with its mean [192]; see the module."""

    later: Tensor
    later_mean: Tensor
    first: Tensor
    first_mean: Tensor

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Frames [B, 3, 1 + 4n, H, W] in [-1, 1] to latents [B, 16, 1 + n, H/8, W/8]."""
        z = [_blocks(video_BCFHW[:, :, :1], 1) @ self.first - self.first_mean @ self.first]
        if video_BCFHW.shape[2] > 1:
            z.append(_blocks(video_BCFHW[:, :, 1:], 4) @ self.later - self.later_mean @ self.later)
        return torch.cat(z, dim=1).permute(0, 4, 1, 2, 3)

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> LinearCode:
        return cls(**torch.load(path, weights_only=True))


def marked(z: Tensor) -> Tensor:
    """Codes [B, 16, F, h, w] as conditioning has them: with marks of the frame's borders and of the first frame.

    A Wan transformer knows places only relative to each other (RoPE). What tells it where the frame ends is the VAE's
    encoder, whose padding shows at the borders of all it encodes, gray conditioning too. A linear code of separate
    blocks has no padding, so the encoder is trained to add this: +1 and -1 in the left and right column, in the upper
    and lower row, and +1 in the first latent frame, which is one frame alone. What is to be made has no marks.
    """
    z = z.clone()
    z[:, ACROSS, :, :, 0] += 1
    z[:, ACROSS, :, :, -1] -= 1
    z[:, DOWN, :, 0] += 1
    z[:, DOWN, :, -1] -= 1
    z[:, FIRST, 0] += 1
    return z


def _components(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the n largest principal directions [D, n] and their standard deviations."""
    mean = x.mean(0)
    cov = torch.cov((x - mean).T.double())
    values, vectors = torch.linalg.eigh(cov)
    return mean, vectors[:, -n:].flip(1).float(), values[-n:].flip(0).clamp(min=1e-8).sqrt().float()


def fit(clips: np.ndarray, seed: int = 0) -> LinearCode:
    """From uint8 clips [N, 1 + 4n, H, W, 3]. The code has unit variance over the data."""
    video = torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    later_x = _blocks(video[:, :, 1:], 4).flatten(0, 3)
    later_x = later_x[torch.randperm(len(later_x), generator=generator)[:60000]]
    later_mean, later, later_std = _components(later_x, Z)
    first_x = _blocks(video[:, :, :1], 1).flatten(0, 3)
    first_mean, first, first_std = _components(first_x, Z)
    later = later * later_std ** (-WHITEN)
    first = (
        first * 2.0 * first_std.clamp(min=1e-3).mul(2.0) ** (-WHITEN)
    )  # one frame stands for four: twice the norm
    still = _blocks(video[:, :, :1].repeat(1, 1, 4, 1, 1), 4).flatten(0, 3)
    target = (still - later_mean) @ later
    code = (first_x - first_mean) @ first
    u, _, v = torch.linalg.svd(code.T @ (target - target.mean(0)))
    first = first @ (u @ v)
    scale = ((later_x - later_mean) @ later).std()
    return LinearCode(later / scale, later_mean, first / scale, first_mean - _shift(first, target.mean(0)))


def _shift(first: Tensor, offset: Tensor) -> Tensor:
    """A change of the mean in pixels that adds `offset` to the code (least squares)."""
    return torch.linalg.lstsq(first.T, offset[:, None]).solution[:, 0]
