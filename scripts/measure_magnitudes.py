"""Measure what MagCache has to know of a model: by which ratio the blocks' change shrinks from step to step.

    python scripts/measure_magnitudes.py MODEL "a fox runs" "a ship at sea" --out magnitudes.json

One full run for each prompt, averaged. Put the file beside the model.toml and name it under [files]:

    magnitudes = "magnitudes.json"

Then `--cache mag` works with this model, for any number of steps; `threshold` and `most` (steps left out in a row) may
be added to the file. Prompts should be of the kind that will be asked for; a handful is enough.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mutoscope import Engine
from mutoscope.engine.cache import MagnitudeRecorder, mean_magnitudes
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import generate
from mutoscope.events import Stage
from mutoscope.request import GenerationRequest


def measure(models: Models, prompts: Sequence[str], steps: int | None = None) -> dict[str, list[float]]:
    """The contents of the file. Nothing is decoded."""
    records = []
    for seed, prompt in enumerate(prompts):
        record = MagnitudeRecorder()
        for event in generate(
            models, GenerationRequest(prompt=prompt, seed=seed, steps=steps), step_cache=record
        ):
            if isinstance(event, Stage) and event.name == "decode":
                break
        records.append(record)
    return mean_magnitudes(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="an installed model, or the path of a model.toml")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--out", type=Path, default=Path("magnitudes.json"))
    args = parser.parse_args()
    found = measure(Engine(args.model).models, args.prompts, args.steps)
    args.out.write_text(json.dumps(found) + "\n")
    print(f"{args.out}: {len(found['cond'])} steps")


if __name__ == "__main__":
    main()
