"""Train the starter's VAE towards the linear code of `pca.py`, then as one.

    python -m training.train_vae decoder --minutes 20     decoder from the code's latents
    python -m training.train_vae encoder --minutes 10     encoder to the code's latents
    python -m training.train_vae joint --minutes 60       both, the latents kept near the code
    python -m training.train_vae finish --minutes 30      decoder only, from the encoder's and from the code's latents

Continues from `runs/vae.pt` if it is there; the file is rewritten every minute. Where there is a `runs/reader.pt`
(`reader.py`), decoded frames have to look right to it too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutoscope.engine.vae import VAEConfig, WanVAE
from training import captions, data, optim, pca, reader

CONFIG = VAEConfig(16, pca.Z, (16, 32, 64, 64), 1, (False, True, True), (0.0,) * pca.Z, (1.0,) * pca.Z)
KERNEL_TIMES = (1, 1, 3, 3)
"""No temporal taps at the two large resolutions: half the time, no visible loss on this world."""
READER = 0.1
"""Weight of how differently the reader reads."""
FROM_CODE = 0.75
"""`finish`: how often the latents are the code's, without the encoder's marks and errors, as generated ones are."""


def build() -> WanVAE:
    vae = WanVAE(CONFIG, KERNEL_TIMES)
    for p in vae.parameters():
        if p.dim() > 1 and p[0].numel() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return vae


def loss_of(out: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared and absolute error, objects and edges weighted up. [B, 3, F, H, W] each, mask [B, 1, F, H, W]."""
    weight = 1 + 3 * mask
    error = out - target
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) * 0.5
    return (weight * error.square()).mean() * 4 + (weight * error.abs()).mean() * 0.5 + edges


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


class Batches:
    """Random windows of clips, [B, 3, F, H, W] in [-1, 1], with the object masks.

    `also` are folders with clips of other sizes: every third batch, half as large, is of one of them.
    """

    def __init__(self, root: Path, n_frames: int, seed: int, also: Sequence[Path] = ()) -> None:
        self.shards = data.shards(root, "clips", most=8)
        self.others = [data.shards(other, "clips", most=1) for other in also]
        self.share = {
            id(shard): captions.shares(shard.classes, reader.HARDER)
            for group in (self.shards, *self.others)
            for shard in group
        }
        self.n_frames = n_frames
        self.rng = np.random.default_rng(seed)
        self.drawn = 0

    def next(self, n: int) -> tuple[Tensor, Tensor]:
        clips, masks, shards = [], [], self.shards
        if self.others and self.drawn % 3 == 2:
            n, shards = max(1, n // 2), self.others[self.drawn // 3 % len(self.others)]
        self.drawn += 1
        for _ in range(n):
            shard = shards[self.rng.integers(len(shards))]
            i = self.rng.choice(len(shard.frames), p=self.share[id(shard)])
            start = self.rng.integers(shard.frames.shape[1] - self.n_frames + 1)
            clips.append(shard.frames[i, start : start + self.n_frames])
            masks.append(shard.masks[i, start : start + self.n_frames])
        video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        mask = torch.from_numpy(np.stack(masks)).float().gt(0)[:, None]
        return video, mask.repeat_interleave(8, 3).repeat_interleave(8, 4)

    def gray_out(self, video: Tensor) -> Tensor:
        """Some clips partly gray, as VACE conditioning makes them: some frames, a part of the picture, or all."""
        video = video.clone()
        for clip in video:
            kind = self.rng.random()
            if kind < 0.2:
                clip[:, 1:] = 0
            elif kind < 0.3:
                clip[:, :-1] = 0
            elif kind < 0.4:
                clip[:, 1:-1] = 0
            elif kind < 0.45:
                clip[:, torch.from_numpy(self.rng.random(clip.shape[1]) < 0.5)] = 0
            elif kind < 0.55:
                x0, y0 = self.rng.integers(0, clip.shape[-1] // 2, 2)
                clip[:, :, y0 : y0 + clip.shape[-2] // 2, x0 : x0 + clip.shape[-1] // 2] = 0
            elif kind < 0.6:
                clip[:] = 0
        return video


def train(mode: str, a: argparse.Namespace) -> None:
    out, lr, n_frames = a.out, a.lr, a.frames
    torch.manual_seed(a.seed)
    code = pca.LinearCode.load(out.parent / "code.pt")
    vae = build()
    if out.exists():
        vae.load_state_dict(torch.load(out, weights_only=True))
    parts = {"decoder": [vae.conv2, vae.decoder], "encoder": [vae.encoder, vae.conv1]}
    parts["joint"] = parts["decoder"] + parts["encoder"]
    parts["finish"] = parts["decoder"]
    muon, adam = optim.split(parts[mode], adam_names=("gamma", "head.2"))
    optimisers = [
        optim.Muon(muon, lr=lr),
        torch.optim.AdamW(adam, lr=lr * 0.15, betas=(0.9, 0.95), weight_decay=0),
    ]
    rates = optim.Rates(optimisers)
    ema = optim.EMA(vae, 0.995)
    reads = out.parent / "reader.pt"
    looks = reader.load(reads) if reads.exists() and mode != "encoder" else None
    batches = Batches(a.data, n_frames, a.seed + int(time.time()), a.also)
    start = last = time.time()
    step, running = 0, {}
    while (progress := (time.time() - start) / (60 * a.minutes)) < 1:
        rates.at(progress)
        video, mask = batches.next(a.batch)
        shown = video if mode in ("decoder", "finish") else batches.gray_out(video)
        target = code.encode(shown)
        loss = torch.zeros(())
        from_code = mode == "decoder" or (mode == "finish" and batches.rng.random() < FROM_CODE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.set_grad_enabled(mode != "finish"):
                pixels = shown.contiguous(memory_format=torch.channels_last_3d)
                z = target if from_code else vae.encode(pixels, n_frames)
            if mode in ("encoder", "joint"):
                code_loss = (z - pca.marked(target)).square().mean()
                running["code"] = float(code_loss.detach())
                loss = loss + code_loss * (10.0 if mode == "encoder" else 0.5)
            if mode != "encoder":
                z = z + torch.randn_like(z) * 0.03
                picture = torch.cat(list(_raw(vae, z.contiguous(memory_format=torch.channels_last_3d))), 2)
                loss = loss + loss_of(picture, shown, mask)
                if looks is not None:
                    loss = loss + READER * looks.difference(picture, shown, mask)
                running["psnr"] = 0.95 * running.get("psnr", 15.0) + 0.05 * psnr(picture.detach(), shown)
        for o in optimisers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        for o in optimisers:
            o.step()
        ema.update(vae)
        step += 1
        if time.time() - last > 30:
            last = time.time()
            torch.save(ema.weights, out.with_suffix(".part"))
            out.with_suffix(".part").rename(out)
            text = " ".join(f"{k} {v:.4f}" for k, v in running.items())
            print(
                f"{mode} {(last - start) / 60:.1f} min step {step} loss {loss.item():.4f} {text}", flush=True
            )
    torch.save(ema.weights, out)


def _raw(vae: WanVAE, z: Tensor):
    """Decoded chunks before clamping, so that out-of-range values still get a gradient."""
    from mutoscope.engine.vae import Stream

    stream = Stream()
    for part in (z[:, :, :1], z[:, :, 1:]):
        if part.shape[2]:
            yield vae.decoder(vae.conv2(part, stream), stream).float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("decoder", "encoder", "joint", "finish"))
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/vae.pt"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="data of other sizes")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    train(a.mode, a)


if __name__ == "__main__":
    main()
