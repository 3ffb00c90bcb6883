"""Train the starter's text encoder alone, on captions: what each says of its scene, and which object a word is of.

    python -m training.train_text captions --minutes 5

Continues from `runs/dit.pt`, or begins it. A few minutes on one core; the transformer then learns from rows that say
where an object is and what belongs to it, instead of from a bag of words, which the captions of single objects never
need more than.

Losses: the attributes, read off the mean of the rows by linear heads (`Starter.naming`); of a pair, for the words of
colour and shape where the objects are first named, whether they are of the left or upper object; and, from an older
encoder, a pull towards its rows, so that a trained transformer goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine.tokenizer import Tokenizer
from mutoscope.engine.umt5 import UMT5Encoder
from training import captions, data, optim, world
from training.train_dit import TEXT, Starter, optimisers_of, tokenizer_metadata

NEAR, FAR = 0, 1
SINGLES = 0.35  # share of the captions of one object that are read: those of two teach more
PULL = 0.3


class Sides:
    """Which tokens of a pair's caption are of the left or upper object, and which of the other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.colors = [tokenizer.encode(color)[0] for color in world.COLORS]
        self.dark = tokenizer.encode("dark")[0]
        self.columns = captions.column("near color"), captions.column("far color")

    def of(self, ids: list[int], classes: list[int]) -> list[int]:
        """NEAR or FAR for the first token of each object's colour and the noun behind it, NO_CLASS for the others."""
        sides = [captions.NO_CLASS] * len(ids)
        for side, column in zip((NEAR, FAR), self.columns, strict=True):
            if classes[column] == captions.NO_CLASS:
                continue
            color = self.colors[classes[column]]
            for i, token in enumerate(ids[:-1]):
                if token == color and (not i or ids[i - 1] != self.dark):  # not of a dark green background
                    sides[i] = sides[i + 1] = side
                    break
        return sides


class Captions:
    """All captions of the clips as padded tokens, with classes and sides."""

    def __init__(self, root: Path, tokenizer: Tokenizer) -> None:
        sides, ids, classes, of_words = Sides(tokenizer), [], [], []
        relation = captions.column("relation")
        for shard in data.shards(root, "clips"):
            for texts, row in zip(shard.captions, shard.classes.tolist(), strict=True):
                if row[relation] == captions.NO_CLASS and torch.rand(()) > SINGLES:
                    continue
                for text in texts:
                    tokens = tokenizer.encode(text)
                    ids.append(tokens)
                    classes.append(row)
                    of_words.append(sides.of(tokens, row))
        self.lengths = torch.tensor([len(row) for row in ids])
        longest = int(self.lengths.max())
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        self.sides = torch.tensor([row + [captions.NO_CLASS] * (longest - len(row)) for row in of_words])
        self.classes = torch.tensor(classes)

    def next(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and sides [n, L], lengths [n], classes [n, attributes]."""
        pick = torch.randint(len(self.ids), (n,))
        lengths = self.lengths[pick]
        longest = int(lengths.max())
        return self.ids[pick, :longest], self.sides[pick, :longest], lengths, self.classes[pick]


def distance(rows: Tensor, old: Tensor, lengths: Tensor) -> Tensor:
    """Squared distance of rows [B, L, D] over the squares of the old ones."""
    real = (torch.arange(rows.shape[1]) < lengths[:, None])[..., None]
    return ((rows - old).square() * real).sum() / (old.square() * real).sum()


def train(model: Starter, told: Captions, a: argparse.Namespace, old: UMT5Encoder | None = None) -> float:
    """Train the text encoder and the heads for `a.minutes` or `a.steps`; the last running loss of the sides.

    old: the encoder whose rows are to be stayed near to.
    """
    sider = nn.Linear(TEXT["dim"], 2)
    optimisers = (*optimisers_of(model, a.lr), torch.optim.AdamW(sider.parameters(), lr=a.lr * 0.15))
    rates = optim.Rates(optimisers)
    start = last = time.time()
    step, running = 0, {}
    while (progress := max((time.time() - start) / (60 * a.minutes), step / a.steps)) < 1:
        rates.at(progress)
        ids, sides, lengths, classes = told.next(a.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = model.text(ids, lengths).float()
            named = model.naming(rows, lengths, classes)
            sided = F.cross_entropy(sider(rows).float().flatten(0, 1), sides.flatten())
            loss = named.mean() + sided
            if old is not None:
                with torch.no_grad():
                    before = old(ids, lengths).float()
                loss = loss + PULL * distance(rows, before, lengths)
        for o in optimisers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        for o in optimisers:
            o.step()
        report = {**dict(zip(model.heads, named.tolist(), strict=True)), "side": float(sided.detach())}
        step, running = step + 1, {k: 0.95 * running.get(k, v) + 0.05 * v for k, v in report.items()}
        if time.time() - last > 15:
            last = time.time()
            text = " ".join(
                f"{k} {running[k]:.3f}" for k in ("shape", "motion", "near shape", "far color", "side")
            )
            print(f"text {(last - start) / 60:.1f} min step {step} {text}", flush=True)
    return running["side"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("captions",))
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/dit.pt"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--steps", type=int, default=10**9, help="at most")
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile, worth it for more than a minute"
    )
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed + int(time.time()))
    told = Captions(a.data, Tokenizer.from_metadata(tokenizer_metadata(a.out.parent, a.data)))
    model, old, vace = Starter(), None, False
    if a.out.exists():
        saved = torch.load(a.out, weights_only=True)
        optim.load(model, saved["weights"], new="heads.")
        old, vace = copy.deepcopy(model.text).eval(), saved["vace"]
    if a.compile:
        for layer in model.text.enc.blk:
            layer.compile(dynamic=True)
    train(model, told, a, old)
    torch.save({"weights": model.state_dict(), "vace": vace}, a.out)


if __name__ == "__main__":
    main()
