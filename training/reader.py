"""A small network that reads shape and colour off single frames: what the VAE's decoder is trained to look right to.

    python -m training.reader --minutes 3

Squared error hardly knows a star of 15 pixels from a ball. This network does, and so do the latents: what it makes of a
decoded frame, layer by layer, is compared with what it makes of the true one (a perceptual loss: Johnson et al., arXiv
1603.08155). It exists only in training; the evaluation's detectors (`detect.py`) are not used to train anything.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import captions, data, optim, world

WIDTHS = (3, 24, 32, 48, 64)
STRIDES = (1, 2, 1, 2)
HARDER = {
    "shape": {"star": 1.7, "cross": 1.7},
    "size": {"small": 2.0},
    "style": {"outline": 2.2},
    "motion": {"orbits": 2.0, "bounces": 1.5, "falls": 1.5, "spins": 1.5},
}
"""How much oftener than others the clips are drawn whose object is hard to see; factors of one clip multiply."""


class Reader(nn.Module):
    """Four convolutions; the largest answer to each of the last one's questions says shape and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in zip(WIDTHS, WIDTHS[1:], STRIDES, strict=False)
        )
        self.shape = nn.Linear(WIDTHS[-1], len(world.SHAPES))
        self.color = nn.Linear(WIDTHS[-1], len(world.COLORS))

    def layers(self, frames: Tensor) -> list[Tensor]:
        """What each convolution makes of frames [N, 3, H, W] in [-1, 1]."""
        made, x = [], frames
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
            made.append(x)
        return made

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the shape and the colour, [N, classes] each."""
        most = self.layers(frames)[-1].amax((2, 3))
        return self.shape(most), self.color(most)

    def difference(self, made: Tensor, true: Tensor, mask: Tensor) -> Tensor:
        """How differently two clips [B, 3, F, H, W] read, objects (mask [B, 1, F, H, W]) weighted up."""
        made, true, mask = (x.transpose(1, 2).flatten(0, 1) for x in (made, true, mask))
        with torch.no_grad():
            wanted = self.layers(true)
        total = torch.zeros(())
        for got, expected in zip(self.layers(made)[1:], wanted[1:], strict=True):
            weight = 1 + 3 * F.interpolate(mask.float(), size=got.shape[2:])
            total = total + (weight * (got.float() - expected.float()).abs()).mean() / (
                expected.float().std() + 1e-3
            )
        return total


def load(path: Path) -> Reader:
    """A trained one, which does not change any more."""
    reader = Reader().requires_grad_(False)
    reader.load_state_dict(torch.load(path, weights_only=True))
    return reader


def train(a: argparse.Namespace) -> float:
    """Trains on frames of single objects and saves to `a.out`; the last running share of shapes read right."""
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    shards = data.shards(a.data, "clips", most=12)
    single = [np.flatnonzero(s.classes[:, captions.column("relation")] == captions.NO_CLASS) for s in shards]
    share = [captions.shares(s.classes[rows], HARDER) for s, rows in zip(shards, single, strict=True)]
    reader = Reader()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=a.lr)
    rates = optim.Rates([optimiser])
    start = last = time.time()
    step, right = 0, 0.0
    while (progress := max((time.time() - start) / (60 * a.minutes), step / a.steps)) < 1:
        rates.at(progress, decay=0.5)
        k = int(rng.integers(len(shards)))
        rows = rng.choice(single[k], a.batch, p=share[k])
        moments = rng.integers(shards[k].frames.shape[1], size=a.batch)
        frames = np.stack([shards[k].frames[i, f] for i, f in zip(rows, moments, strict=True)])
        classes = torch.from_numpy(shards[k].classes[rows])
        x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shape, color = reader(x + torch.randn_like(x) * 0.02)
        wanted = classes[:, captions.column("shape")]
        loss = F.cross_entropy(shape.float(), wanted)
        loss = loss + 0.3 * F.cross_entropy(color.float(), classes[:, captions.column("color")])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step, right = step + 1, right + 0.03 * (float((shape.argmax(1) == wanted).float().mean()) - right)
        if time.time() - last > 30:
            last = time.time()
            print(f"reader {(last - start) / 60:.1f} min step {step} shape {right:.3f}", flush=True)
    torch.save(reader.state_dict(), a.out)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/reader.pt"))
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--steps", type=int, default=10**9, help="at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    train(a)


if __name__ == "__main__":
    main()
