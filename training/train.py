"""The whole recipe of the starter as one command, sharing out the given time.

    python -m training.train runs --minutes 200                     on a CPU, from nothing
    python -m training.train runs --minutes 200 --skip data vae     continue the transformer from runs/dit.pt

    python -m training.restore mutoscope/pocket runs                go on from the shipped weights: all tasks at once
    python -m training.train runs --skip images clips --lr 0.01     and a smaller rate: pictures alone cost the motions

Every part continues from what is in the folder, with a fresh optimiser, so the command can be stopped at any time and
run again. More compute is more minutes, a larger --batch, or more data (`--clips`, `--images`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training import data, pca, world
from training.questions import OTHER_FORMS


@dataclass(frozen=True)
class Part:
    """One call of a trainer: its group for --skip, its module and arguments, its share of the time."""

    name: str
    module: str
    arguments: tuple[str, ...]
    share: float
    other_forms: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """What --skip knows it by: its group, and its stage if there are several."""
        return self.name, *self.arguments[:1]


PLAN = (
    Part("reader", "training.reader", (), 0.015, other_forms=False),
    Part("vae", "training.train_vae", ("decoder",), 0.20),
    Part("vae", "training.train_vae", ("encoder",), 0.06),
    Part("dit", "training.train_text", ("captions", "--compile"), 0.03, other_forms=False),
    Part("dit", "training.train_dit", ("images", "--compile", "--decay", "0.2"), 0.12, other_forms=False),
    Part("dit", "training.train_dit", ("clips", "--compile", "--pictures", "--decay", "0.15"), 0.22),
    Part("dit", "training.train_dit", ("vace", "--compile", "--pictures", "--decay", "0.45", "--ema", "0.995"), 0.355),
)  # fmt: skip


SKIPPABLE = (
    "data",
    *dict.fromkeys(name for part in PLAN for name in part.names),
    "export",
    "evaluate",
)


def run(module: str, *arguments: str) -> None:
    print("+", "python -m", module, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def render(a: argparse.Namespace) -> list[Path]:
    """Clips and pictures of 64 x 64, and a smaller folder of clips for each other size and length; those folders."""
    root, common = a.runs / "data", ["--level", a.level, "--workers", str(a.threads)]
    folders = [root / f"{width}x{height}x{frames}" for width, height, frames in OTHER_FORMS]
    if "data" not in a.skip:
        run("training.data", str(root), *common, "--clips", str(a.clips), "--images", str(a.images))
        for i, (folder, (width, height, frames)) in enumerate(zip(folders, OTHER_FORMS, strict=True)):
            form = ["--size", str(width), str(height), "--frames", str(frames), "--seed", str(501 + i)]
            run("training.data", str(folder), *common, "--clips", str(a.others), "--images", "0", *form)
    return [folder for folder in folders if folder.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the transformer is trained, e.g. cuda")
    parser.add_argument("--level", default="full", choices=tuple(world.LEVELS))
    parser.add_argument("--clips", type=int, default=10 * data.SHARD)
    parser.add_argument("--images", type=int, default=24 * data.SHARD)
    parser.add_argument("--others", type=int, default=data.SHARD, help="clips of each other size and length")
    parser.add_argument("--batch", type=int, default=64, help="clips in a batch")
    parser.add_argument("--lr", type=float, default=0.02, help="rate of the transformer's matrices")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=SKIPPABLE, help="groups of parts, or single ones"
    )
    parser.add_argument("--out", type=Path, default=Path("mutoscope/pocket"))
    a = parser.parse_args()
    a.runs.mkdir(parents=True, exist_ok=True)
    others = render(a)
    root = a.runs / "data"
    if not (a.runs / "code.pt").exists():
        frames = [shard.frames[:400] for shard in data.shards(root, "clips", most=2)]
        pca.fit(np.concatenate(frames)).save(a.runs / "code.pt")
    for part in PLAN:
        if any(name in a.skip for name in part.names):
            continue
        options = {
            "--data": root, "--out": a.runs / f"{part.name}.pt", "--minutes": f"{part.share * a.minutes:.2f}",
            "--threads": a.threads,
        }  # fmt: skip
        if part.module == "training.train_dit":
            options |= {
                "--lr": a.lr,
                "--device": a.device,
                "--batch": a.batch * (2 if "images" in part.arguments else 1),
            }
        also = ("--also", *map(str, others)) if part.other_forms and others else ()
        run(part.module, *part.arguments, *(str(word) for pair in options.items() for word in pair), *also)
    if "export" not in a.skip:
        run("training.export", str(a.runs), str(a.out), "--data", str(root))
    if "evaluate" not in a.skip:
        report = ("--json", "docs/starter-evaluation.json", "--write", "README.md", "docs/starter.md")
        run("training.evaluate", *report, "--model", str(a.out))


if __name__ == "__main__":
    main()
