"""Doing less on the starter: how much time each switch saves, and what it does to the result.

    python -m benchmarks.faster --prompts 24          # five minutes on one core

For simple held-out prompts of training/questions.py, with each switch: passes through the blocks for each clip (a
guided step is two), seconds of the processor for denoising on one thread, the relative L2 distance of the latents to
those of the full run, and how often colour, motion and shape are as asked. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import machine, relative_error
from mutoscope import Engine
from mutoscope.engine import latents
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import generate
from mutoscope.engine.wan import Block
from mutoscope.events import Frames, Stage
from mutoscope.manifest import ModelFile
from mutoscope.request import GenerationRequest
from scripts.measure_magnitudes import measure
from training.questions import ROWS, Question, Seen, questions

CALIBRATION = 6
"""Prompts for MagCache's ratios; of another kind than those that are judged."""
JUDGED = ("colour", "motion class", "shape")
SWITCHES: dict[str, dict[str, Any]] = {
    "full": {},
    "fewer steps: 12": {"steps": 12},
    "cache easy=0.05": {"cache": "easy=0.05"},
    "cache easy=0.1": {"cache": "easy=0.1"},
    "cache easy=0.2": {"cache": "easy=0.2"},
    "cache mag=0.12": {"cache": "mag=0.12"},
    "guidance interval 0,0.5": {"guidance_interval": (0.0, 0.5)},
    "guidance interval 0.2,0.8": {"guidance_interval": (0.2, 0.8)},
    "guidance interval 0.5,1": {"guidance_interval": (0.5, 1.0)},
    "guidance 1": {"guidance": 1.0},
    "zero-star=0": {"guidance_kind": "zero-star=0"},
    "zero-star=1": {"guidance_kind": "zero-star=1"},
    "easy=0.1 and interval 0,0.5": {"cache": "easy=0.1", "guidance_interval": (0.0, 0.5)},
}


class Passes:
    """Counts samples that go through the blocks."""

    def __init__(self, models: Models) -> None:
        self.n = 0
        models.dit.blocks[0].register_forward_pre_hook(self._count)

    def _count(self, module: Block, args: tuple[Tensor, ...]) -> None:
        self.n += len(args[0])


def run(models: Models, asked: Question, options: dict[str, Any], folder: Path) -> tuple[Tensor, Any, float]:
    """Latents, frames, and seconds of the processor for denoising."""
    scene = asked.scene
    request = GenerationRequest(
        prompt=asked.prompt,
        seed=asked.seed,
        width=scene.width,
        height=scene.height,
        frames=scene.frames,
        **options,
    )
    frames, start, took = [], 0.0, 0.0
    for event in generate(models, request, keep_latents=folder / "x"):
        if isinstance(event, Stage) and event.name == "denoise":
            start = time.process_time()
        elif isinstance(event, Stage) and event.name == "decode":
            took = time.process_time() - start
        elif isinstance(event, Frames):
            frames.append(event.frames)
    return latents.load(folder / "x")[0], np.concatenate(frames), took


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faster", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=int, default=24, help="of 45, default %(default)s")
    parser.add_argument("--model", default="pocket")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = Engine(args.model).models
    passes = Passes(models)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "m.json").write_text(
            json.dumps(measure(models, [q.prompt for q in questions("text", CALIBRATION)]))
        )
        models.manifest = replace(
            models.manifest,
            files=replace(models.manifest.files, magnitudes=ModelFile(path=folder / "m.json")),
        )
        found: dict[str, list[tuple[float, float, float, list[bool]]]] = {name: [] for name in SWITCHES}
        for asked in questions(
            "plain", args.prompts
        ):  # all switches for a prompt, one after the other: the machine changes meanwhile
            full: Tensor | None = None
            for name, options in SWITCHES.items():
                passes.n = 0
                got, frames, took = run(models, asked, options, folder)
                full = got if full is None else full
                seen = Seen.of(asked, frames)
                right = [ROWS[f"simple prompts: {row}"].judge(asked, seen) for row in JUDGED]
                found[name].append((passes.n, took, relative_error(got, full), right))
    print("| switch | passes | time | distance | " + " | ".join(JUDGED) + " |")
    print("|---|---|---|---|" + "---|" * len(JUDGED))
    seconds = {name: [row[1] for row in of] for name, of in found.items()}
    for name, of in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["full"], strict=True))
        shares = [sum(row[3][k] for row in of) / len(of) for k in range(len(JUDGED))]
        rows[name] = {
            "passes": statistics.mean(row[0] for row in of),
            "time": ratio,
            "distance": statistics.mean(row[2] for row in of),
            **dict(zip(JUDGED, shares, strict=True)),
        }
        cells = [f"{rows[name]['passes']:.1f}", f"{ratio:.2f}", f"{rows[name]['distance']:.3f}"]
        print(f"| {name} | " + " | ".join(cells + [f"{share:.3f}" for share in shares]) + " |")
    print(json.dumps({"benchmark": "faster", **machine(), "prompts": args.prompts, "rows": rows}))


if __name__ == "__main__":
    main()
