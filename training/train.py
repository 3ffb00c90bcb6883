"""The whole recipe of the starter as one command, sharing out the given time.

    python -m training.train runs --minutes 200                     on a CPU, from nothing
    python -m training.train runs --minutes 200 --skip data vae     continue the transformer from runs/dit.pt

Every part continues from what is in the folder, with a fresh optimiser, so the command can be stopped at any time and
run again. More compute is more minutes, a larger --batch, or more data (`--clips`, `--images`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from training import data, pca

PLAN: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("vae", ("training.train_vae", "decoder"), 0.11),
    ("vae", ("training.train_vae", "encoder"), 0.09),
    ("dit", ("training.train_dit", "images", "--compile"), 0.25),
    ("dit", ("training.train_dit", "clips", "--compile", "--pictures", "--batch", "64"), 0.33),
    ("dit", ("training.train_dit", "vace", "--compile", "--batch", "64"), 0.22),
)
"""Name for --skip, the module and its arguments, and its share of the time."""


def run(module: str, *arguments: str) -> None:
    print("+", "python -m", module, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the transformer is trained, e.g. cuda")
    parser.add_argument("--clips", type=int, default=12 * data.SHARD)
    parser.add_argument("--images", type=int, default=48 * data.SHARD)
    parser.add_argument("--skip", nargs="*", default=[], choices=("data", "vae", "dit", "export"))
    parser.add_argument("--out", type=Path, default=Path("mutoscope/pocket"))
    a = parser.parse_args()
    a.runs.mkdir(parents=True, exist_ok=True)
    clips = a.runs / "data"
    if "data" not in a.skip:
        run(
            "training.data",
            str(clips),
            "--clips",
            str(a.clips),
            "--images",
            str(a.images),
            "--workers",
            str(a.threads),
        )
    if not (a.runs / "code.pt").exists():
        frames = [shard.frames[:400] for shard in data.shards(clips, "clips", most=2)]
        pca.fit(np.concatenate(frames)).save(a.runs / "code.pt")
    for name, (module, *arguments), share in PLAN:
        if name in a.skip:
            continue
        out = a.runs / f"{name}.pt"
        common = [
            "--data",
            str(clips),
            "--out",
            str(out),
            "--minutes",
            f"{share * a.minutes:.1f}",
            "--threads",
            str(a.threads),
        ]
        run(module, *arguments, *common, *(["--device", a.device] if name == "dit" else []))
    if "export" not in a.skip:
        run("training.export", str(a.runs), str(a.out), "--data", str(clips))
        run(
            "training.evaluate",
            "--json",
            "docs/starter-evaluation.json",
            "--write",
            "README.md",
            "docs/starter.md",
        )


if __name__ == "__main__":
    main()
