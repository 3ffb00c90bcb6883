"""Train the starter's text encoder and diffusion transformer: single pictures first, then clips, then VACE tasks.

    python -m training.train_dit images --minutes 25      one latent frame, text only
    python -m training.train_dit clips  --minutes 30      whole clips, text only
    python -m training.train_dit vace   --minutes 30      clips with VACE conditioning mixed in

    torchrun --nproc-per-node 2 -m training.train_dit vace --compile     gradients averaged over two processes

Continues from `runs/dit.pt` with a fresh optimiser; the file is rewritten every half minute. On a CPU two processes of
one thread each are faster than one of two threads; each has its own clips, and batches of `--batch` of them.

Latents are those of the linear code (`pca.py`), which the VAE's encoder is trained to reproduce.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine.tokenizer import Tokenizer
from mutoscope.engine.umt5 import UMT5Config, UMT5Encoder
from mutoscope.engine.wan import WanConfig, WanModel, rope_table
from training import captions, data, optim, pca, tasks, world
from training.make_tokenizer import train_tokenizer

TEXT = {"dim": 128, "ffn_dim": 256, "n_layers": 2, "n_heads": 2, "head_dim": 64, "n_buckets": 32}
DIT = WanConfig(
    dim=256, ffn_dim=1024, n_heads=4, n_layers=6, in_dim=pca.Z, out_dim=pca.Z, text_dim=128, freq_dim=256,
    text_length=0, vace_layers=(0, 3), vace_in_dim=96,
)  # fmt: skip
VOCABULARY_SIZE = 512
SHIFT, SHIFT_SHOWN = 2.0, 4.0
"""Training times are logit-normal, shifted towards noise: text decides early, when little of the picture is there.
Frames that are shown say nearly all of it, which is learned when the noise says nothing."""
CAPTIONS_BESIDE = 1
"""Captions per clip of a batch that the text encoder alone is trained on: it is small, and needs more than the rest."""
PAIRS_BY_TEXT = 0.4
"""Of the clips of two objects, how many are made from text before tasks are drawn: what is shown says what is where."""
OFTENER: dict[str, dict[str, float]] = {
    "motion": {"orbits": 2.5, "spins": 2.0, "falls": 1.5, "bounces": 1.5},
    "camera": dict.fromkeys((c for c in world.CAMERAS if c != "static"), 1.8),
    "shape": {"star": 1.8, "cross": 2.0},
    "style": {"outline": 1.6},
    "size": {"small": 1.4},
}
"""How much oftener than others the clips are drawn that are learned last; factors of one clip multiply."""


class Starter(nn.Module):
    """Text encoder and transformer, with the auxiliary heads that exist only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.text = UMT5Encoder(UMT5Config(vocab_size=VOCABULARY_SIZE, **TEXT))
        self.dit = WanModel(DIT)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(TEXT["dim"], n) for name, n in captions.ATTRIBUTE_SIZES.items()}
        )
        self._initialise()

    def _initialise(self) -> None:
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
        nn.init.normal_(self.text.token_embd.weight, std=1.0)
        for layer in self.text.enc.blk:
            nn.init.normal_(layer.attn_q.weight, std=(TEXT["dim"] * TEXT["head_dim"]) ** -0.5)
            nn.init.normal_(layer.attn_rel_b.weight, std=0.1)
            ahead, back = (
                layer.attn_rel_b.weight.data.T
            )  # what is before a word, and what is behind, to begin with
            ahead[: TEXT["n_buckets"] // 2] -= 3
            back[TEXT["n_buckets"] // 2 :] -= 3
        for block in (*self.dit.blocks, *self.dit.vace_blocks):
            nn.init.zeros_(block.modulation)
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn["2"]):
                nn.init.normal_(last.weight, std=0.2 * last.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.dit.head.head.weight)
        nn.init.zeros_(self.dit.head.modulation)
        nn.init.normal_(self.dit.time_projection["1"].weight, std=0.02)

    def naming(self, rows: Tensor, lengths: Tensor, classes: Tensor) -> Tensor:
        """How badly the attributes are read off the mean of a text's rows: cross entropy of each, [attributes].

        rows [B, L, D] of the text encoder, lengths [B], classes [B, attributes] or NO_CLASS where there is none.
        """
        real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
        pooled = (rows * real[..., None]).sum(1) / lengths[:, None]
        logits = [head(pooled).float() for head in self.heads.values()]
        sums = [F.cross_entropy(o, classes[:, i], reduction="sum") for i, o in enumerate(logits)]
        return torch.stack(sums) / (classes != captions.NO_CLASS).sum(0).clamp(min=1)

    def start_vace(self) -> None:
        """The side branch begins as a copy of the main blocks that says nothing."""
        for m, i in enumerate(DIT.vace_layers):
            self.dit.vace_blocks[m].load_state_dict(self.dit.blocks[i].state_dict(), strict=False)
            nn.init.zeros_(self.dit.vace_blocks[m].after_proj.weight)
            nn.init.zeros_(self.dit.vace_blocks[m].after_proj.bias)
        nn.init.zeros_(self.dit.vace_blocks[0].before_proj.weight)


class Examples:
    """All clips (or pictures) as latents in memory, with token ids and attribute classes."""

    def __init__(self, root: Path, kind: str, code: pca.LinearCode, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.code = code
        self._nothing: dict[tuple[int, ...], Tensor] = {}
        self.shards = data.shards(root, kind)
        if dist.is_initialized():  # each process has its own share of the clips
            self.shards = self.shards[dist.get_rank() :: dist.get_world_size()] or self.shards
        latents, ids, classes, masks = [], [], [], []
        self.has_task_inputs = all(shard.unnamed is not None for shard in self.shards)
        for shard in self.shards:
            for start in range(0, len(shard.frames), 256):
                latents.append(code.encode(_video(shard.frames[start : start + 256])).half())
            more = shard.unnamed or [[] for _ in shard.captions]
            ids += [
                [tokenizer.encode(text) for text in (*texts, *extra)]
                for texts, extra in zip(shard.captions, more, strict=True)
            ]
            classes.append(shard.classes)
            masks.append(_token_mask(torch.from_numpy(shard.masks)))
        self.latents, self.masks = torch.cat(latents), torch.cat(masks)
        self.classes = torch.from_numpy(np.concatenate(classes))
        relation = captions.column("relation")
        self.of_pairs = (self.classes[:, relation] != captions.NO_CLASS).numpy()
        self.share_up_to = np.cumsum(captions.shares(self.classes.numpy(), OFTENER))
        self.lengths = torch.tensor([[len(i) for i in row] for row in ids])
        self.ids = torch.zeros(*self.lengths.shape, int(self.lengths.max()), dtype=torch.long)
        for n, row in enumerate(ids):
            for c, one in enumerate(row):
                self.ids[n, c, : len(one)] = torch.tensor(one)

    def next(
        self, n: int, dropout: float = 0.1, unnamed: float = 0.0, more_captions: int = 0
    ) -> dict[str, Tensor]:
        """A batch; `unnamed` is the share of captions that leave the object to a reference.

        Behind the n captions of the clips come `more_captions` for the text encoder alone.
        """
        pick = torch.from_numpy(self._drawn(n + more_captions))
        which = torch.from_numpy(self.rng.integers(data.CAPTIONS_PER_CLIP, size=len(pick)))
        if unnamed:
            which[torch.from_numpy(self.rng.random(len(pick)) < unnamed)] = data.CAPTIONS_PER_CLIP
        ids, lengths = self.ids[pick, which].clone(), self.lengths[pick, which].clone()
        dropped = torch.from_numpy(self.rng.random(len(pick)) < dropout)
        ids[dropped, 0] = 1  # the empty prompt is one end token
        lengths[dropped] = 1
        clips = pick[:n]
        return {
            "x": self.latents[clips].float(), "ids": ids, "lengths": lengths,
            "classes": self.classes[pick], "mask": self.masks[clips], "dropped": dropped, "index": clips,
        }  # fmt: skip

    def _drawn(self, n: int) -> np.ndarray:
        """Numbers of n clips, drawn by their shares."""
        place = self.rng.random(n) * self.share_up_to[-1]
        return np.searchsorted(self.share_up_to, place, side="right")

    def vace_context(self, batch: dict[str, Tensor]) -> Tensor:
        """A random VACE task for each clip: what is kept, what is to be made, and the mask, [B, 96, F', H/8, W/8].

        The batch is told which clips anything is "shown" of, [B].
        """
        shown = []
        for i in batch["index"].tolist():
            shard, row = self.shards[i // data.SHARD], i % data.SHARD
            boxes = None if shard.boxes is None else shard.boxes[row]
            if self.of_pairs[i] and self.rng.random() < PAIRS_BY_TEXT:
                shown.append(tasks.task("text", self.rng, shard.frames[row], boxes))
            else:
                shown.append(tasks.random_task(self.rng, shard.frames[row], boxes))
        n, shape = len(shown), shown[0].frames.shape
        mask = torch.from_numpy(np.stack([s.mask for s in shown]))[:, None]
        kept = self.nothing(shape[:3]).repeat(n, 1, 1, 1, 1)
        made = kept.clone()
        # Most clips show nothing of one of the two, whose code is always the same.
        keeps = [i for i, s in enumerate(shown) if not s.mask.all()]
        makes = [i for i, s in enumerate(shown) if s.guides]
        batch["shown"] = torch.zeros(n, dtype=torch.bool)
        batch["shown"][[*keeps, *makes]] = True
        if keeps:
            kept[keeps] = self._condition(
                _video(np.stack([shown[i].frames for i in keeps])) * (1 - mask[keeps])
            )
        if makes:
            made[makes] = self._condition(_video(np.stack([shown[i].frames for i in makes])) * mask[makes])
        cells = mask[:, 0].unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
        cells = F.interpolate(cells, size=kept.shape[2:], mode="nearest-exact")
        return torch.cat((kept, made, cells), dim=1)

    def nothing(self, shape: tuple[int, ...]) -> Tensor:
        """The code of a gray clip [F, H, W], [1, 16, F', H/8, W/8]."""
        if shape not in self._nothing:
            self._nothing[shape] = self._condition(torch.zeros(1, 3, *shape))
        return self._nothing[shape]

    def _condition(self, video: Tensor) -> Tensor:
        return pca.marked(self.code.encode(video))

    def add_reference(self, batch: dict[str, Tensor]) -> Tensor:
        """Text to video with a reference: its latent goes in front of the clip and of the (empty) context, returned."""
        pictures = []
        for i in batch["index"].tolist():
            portraits = self.shards[i // data.SHARD].portraits
            assert portraits is not None
            pictures.append(portraits[i % data.SHARD])
        reference = self.code.encode(_video(np.stack(pictures)[:, None]))
        x = batch["x"]
        nothing = self.nothing((1 + 4 * (x.shape[2] - 1), *(8 * s for s in x.shape[3:])))
        b, _, f, h, w = x.shape
        empty = torch.cat((nothing, nothing, torch.ones(1, 64, f, h, w)), dim=1).expand(b, -1, -1, -1, -1)
        front = F.pad(pca.marked(reference), (0, 0, 0, 0, 0, 0, 0, empty.shape[1] - reference.shape[1]))
        batch["x"] = torch.cat((reference, x), dim=2)
        batch["mask"] = torch.cat((torch.zeros_like(batch["mask"][:, :1]), batch["mask"]), dim=1)
        return torch.cat((front, empty), dim=2)


def _video(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _token_mask(cells: Tensor) -> Tensor:
    """Share of object per latent cell: uint8 [N, F, h, w] frames to float16 [N, 1 + (F-1)/4, h, w]."""
    cells = cells.half() / 255
    first, later = cells[:, :1], cells[:, 1:]
    if not later.shape[1]:
        return first
    return torch.cat((first, later.unflatten(1, (-1, 4)).amax(2)), dim=1)


def loss_of(
    model: Starter, batch: dict[str, Tensor], context: Tensor | None, rope: Tensor, aux: float
) -> tuple[Tensor, dict[str, float]]:
    """Flow matching; cells of objects count more where they are known: by low noise, or by what is shown."""
    x0, n = batch["x"], len(batch["x"])
    shown = batch.get("shown", torch.zeros(n, dtype=torch.bool, device=x0.device))
    t = torch.sigmoid(torch.randn(n, device=x0.device))
    shift = torch.where(shown, SHIFT_SHOWN, SHIFT)
    t = shift * t / (1 + (shift - 1) * t)
    noise = torch.randn_like(x0)
    t5 = t.view(-1, 1, 1, 1, 1)
    rows = model.text(batch["ids"], batch["lengths"])
    text = model.dit.text_context(rows[:n], batch["lengths"][:n], vace=context is not None)
    tokens = None if context is None else model.dit.vace_tokens(context)
    v = model.dit((1 - t5) * x0 + t5 * noise, model.dit.time_modulation(1000 * t), text, rope, tokens)
    error = (v - (noise - x0)).square().mean(1)
    weight = 1 + 3 * batch["mask"].float().clamp(max=1) * (shown | (t < 0.7)).float().view(-1, 1, 1, 1)
    flow = (error * weight).mean()
    report = {"flow": float(error.detach().mean())}
    if aux:
        keep = ~batch["dropped"]
        losses = model.naming(rows[keep], batch["lengths"][keep], batch["classes"][keep])
        flow = flow + aux * losses.mean()
        named = dict(zip(model.heads, losses.tolist(), strict=True))
        report |= {"aux": float(losses.detach().mean()), "near": named["near shape"]}
    return flow, report


def tokenizer_metadata(runs: Path, root: Path) -> dict:
    """The tokenizer, trained once on the captions and kept."""
    path = runs / "tokenizer.pt"
    if not path.exists():
        lines = [
            text for shard in data.shards(root, "images")[:8] for texts in shard.captions for text in texts
        ]
        torch.save(train_tokenizer(lines, VOCABULARY_SIZE, words=captions.vocabulary()), path)
    return torch.load(path, weights_only=False)


def optimisers_of(model: Starter, lr: float) -> tuple[optim.Muon, torch.optim.AdamW]:
    """Muon for matrices, AdamW for the rest.

    UMT5 does not divide its logits by the root of the head's width, so its queries are small and move as much less.
    At the rate of the others they grew until every token attended to a single one, whatever the order of the words.
    """
    muon, adam = optim.split(
        [model],
        adam_names=("token_embd", "rel_b", "modulation", "patch_embedding", "head", "time_embedding.0"),
    )
    queries = {id(layer.attn_q.weight) for layer in model.text.enc.blk}
    groups = [
        {"params": [p for p in muon if id(p) not in queries]},
        {"params": [p for p in muon if id(p) in queries], "lr": lr * TEXT["head_dim"] ** -0.5},
    ]
    return optim.Muon(groups, lr=lr), torch.optim.AdamW(
        adam, lr=lr * 0.15, betas=(0.9, 0.98), weight_decay=0, fused=True
    )


def average_gradients(model: nn.Module) -> None:
    """The same mean gradients in every process; one message, in half precision as the products are."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]).bfloat16()
    dist.all_reduce(flat)
    parts = flat.float().div_(dist.get_world_size()).split([g.numel() for g in gradients])
    for g, part in zip(gradients, parts, strict=True):
        g.copy_(part.view_as(g))


def same_everywhere(value: float) -> float:
    """The first process's number."""
    if not dist.is_initialized():
        return value
    number = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(number, src=0)
    return float(number)


def train(stage: str, a: argparse.Namespace) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    seed = a.seed + int(time.time()) + 1000 * rank
    torch.manual_seed(seed)
    runs = a.out.parent
    tokenizer = Tokenizer.from_metadata(tokenizer_metadata(runs, a.data))
    code = pca.LinearCode.load(runs / "code.pt")
    examples = Examples(a.data, "images" if stage == "images" else "clips", code, tokenizer, seed)
    pictures = Examples(a.data, "images", code, tokenizer, seed + 1) if a.pictures else None
    others = [Examples(root, "clips", code, tokenizer, seed + 2) for root in a.also]
    device = torch.device(a.device)
    model = Starter()
    if a.out.exists():
        saved = torch.load(a.out, weights_only=True)
        optim.load(model, saved["weights"], new="heads.")
        if stage == "vace" and not saved["vace"]:
            model.start_vace()
    if dist.is_initialized():
        for weight in model.state_dict().values():
            dist.broadcast(weight, src=0)
    model.to(device)
    optimisers = optimisers_of(model, a.lr)
    adam = [p for group in optimisers[1].param_groups for p in group["params"]]
    rates = optim.Rates(optimisers)
    ema = optim.EMA(model, a.ema)
    ropes: dict[tuple[int, ...], Tensor] = {}
    torch._dynamo.config.recompile_limit = 64  # a few shapes, each compiled once
    if a.compile:
        for layer in (*model.dit.blocks, *model.dit.vace_blocks, *model.text.enc.blk):
            layer.compile(dynamic=False)
    start = last = time.time()
    step, seen, running = 0, 0, {}
    while (progress := same_everywhere((time.time() - start) / (60 * a.minutes))) < 1:
        rates.at(progress, decay=a.decay)
        source, n, refer = examples, a.batch, False
        if pictures is not None and step % 6 in ((3,) if stage == "vace" else (3, 5)):
            source, n = pictures, 4 * a.batch
        elif others and step % 6 == 2:
            source = others[(step // 6) % len(others)]
            n = max(1, a.batch * examples.latents[0].numel() // source.latents[0].numel())  # as much work
        elif stage == "vace" and step % 6 == 4:
            refer = examples.has_task_inputs
        batch = source.next(n, unnamed=0.85 if refer else 0.0, more_captions=CAPTIONS_BESIDE * a.batch)
        context = None
        if stage == "vace" and source is not pictures:
            context = source.add_reference(batch) if refer else source.vace_context(batch)
        batch = {name: value.to(device) for name, value in batch.items()}
        context = None if context is None else context.to(device)
        grid = (batch["x"].shape[2], batch["x"].shape[3] // 2, batch["x"].shape[4] // 2)
        if grid not in ropes:
            ropes[grid] = rope_table(grid, DIT.head_dim, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, report = loss_of(model, batch, context, ropes[grid], 0.15)
        for o in optimisers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        if dist.is_initialized():
            average_gradients(model)
        nn.utils.clip_grad_norm_(adam, 1.0)
        for o in optimisers:
            o.step()
        ema.update(model)
        step, seen = step + 1, seen + len(batch["x"]) * a.processes
        if source is examples:
            running = {k: 0.97 * running.get(k, v) + 0.03 * v for k, v in report.items()}
        if rank == 0 and time.time() - last > (30 if step > 50 else 5):
            last = time.time()
            _save(ema, stage, a.out)
            text = " ".join(f"{k} {v:.4f}" for k, v in running.items())
            print(f"{stage} {(last - start) / 60:.1f} min step {step} seen {seen} {text}", flush=True)
    if rank == 0:
        _save(ema, stage, a.out)


def _save(ema: optim.EMA, stage: str, out: Path) -> None:
    torch.save({"weights": ema.weights, "vace": stage == "vace"}, out.with_suffix(".part"))
    out.with_suffix(".part").rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("images", "clips", "vace"))
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/dit.pt"))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument(
        "--decay", type=float, default=0.4, help="share of the run over which the rate decays"
    )
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="every third batch is of pictures (with VACE tasks every sixth)",
    )
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], help="data of other sizes, every sixth batch in turn"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile, worth it for long runs")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.processes = int(os.environ.get("WORLD_SIZE", 1))
    if a.processes > 1:
        dist.init_process_group("gloo")
    train(a.stage, a)
    if a.processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
