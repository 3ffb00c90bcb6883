"""How often the starter makes what it is asked for, measured with the analytic detectors of `detect.py`.

    python -m training.evaluate --prompts 128 --json docs/starter-evaluation.json

The prompts are fixed by their seed: combinations of attributes and phrasings that training never sees. Clips are made
by the engine's own pipeline from the shipped files. A second run gives each prompt its true first frame.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mutoscope import Engine
from mutoscope.media.frames import contact_sheet, psnr
from mutoscope.media.write import write_image
from training import captions, world
from training.detect import Detection, detect

SEED = 20261120
FIRST_FRAME_DB = 22.0
MARKS = ("<!-- evaluation: written by training/evaluate.py -->", "<!-- end of evaluation -->")


@dataclass(frozen=True)
class Case:
    """One question: the scene that would be the answer, its caption, and the seed of the noise."""

    scene: world.Scene
    prompt: str
    seed: int


def cases(n: int, level: str = "first") -> list[Case]:
    """The first n held-out prompts; always the same."""
    rng = np.random.default_rng(SEED)
    out = []
    for i in range(n):
        scene = world.sample(rng, level=level, held_out=True)
        out.append(Case(scene, captions.caption(scene, rng, "heldout"), 1000 + i))
    return out


def _angle_right(case: Case, seen: Detection) -> bool:
    dx, dy = world.DIRECTIONS[case.scene.objects[0].motion]
    sx, sy = seen.objects[0].direction
    return math.hypot(sx, sy) > 0.1 and (dx * sx + dy * sy) / math.hypot(dx, dy) / math.hypot(
        sx, sy
    ) > math.cos(math.pi / 6)


Check = Callable[[Case, Detection], bool]
CHECKS: dict[str, tuple[Callable[[Case], bool], Check]] = {
    "colour": (lambda c: True, lambda c, d: d.color == c.scene.objects[0].color),
    "background colour": (lambda c: True, lambda c, d: d.background == c.scene.background),
    "background style": (lambda c: True, lambda c, d: d.background_style == c.scene.background_style),
    "motion class": (lambda c: True, lambda c, d: d.motion == c.scene.objects[0].motion),
    "shape": (lambda c: True, lambda c, d: d.shape == c.scene.objects[0].shape),
    "direction within 30 degrees": (lambda c: c.scene.objects[0].motion in world.DIRECTIONS, _angle_right),
}
"""Name: which cases it applies to, and whether the clip passes."""


def answer(engine: Engine, case: Case, *, image: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The engine's clip for a case, uint8 [F, H, W, 3]."""
    from mutoscope.request import Keyframe

    shown = {"keyframes": (Keyframe(image=image, index=0),)} if image is not None else {}
    scene = case.scene
    return engine.generate(
        case.prompt, seed=case.seed, width=scene.width, height=scene.height, frames=scene.frames, **shown
    ).frames


def share(hits: Iterable[bool]) -> dict[str, float]:
    """Share of hits with its standard error."""
    values = np.array(list(hits), float)
    p = float(values.mean()) if len(values) else float("nan")
    return {
        "share": round(p, 4),
        "standard_error": round(math.sqrt(max(p * (1 - p), 0) / max(len(values), 1)), 4),
        "n": len(values),
    }


def evaluate(engine: Engine, n: int, *, sheet: Path | None = None) -> dict[str, dict[str, float]]:
    """All rows of the table."""
    asked = cases(n)
    clips = [answer(engine, case) for case in asked]
    seen = [detect(clip) for clip in clips]
    rows = {
        name: share(check(c, d) for c, d in zip(asked, seen, strict=True) if applies(c))
        for name, (applies, check) in CHECKS.items()
    }
    for motion in world.LEVELS["first"].motions:
        of = [(c, d) for c, d in zip(asked, seen, strict=True) if c.scene.objects[0].motion == motion]
        rows[f"motion: {motion}"] = share(d.motion == motion for _, d in of)
    for shape in world.SHAPES:
        of = [(c, d) for c, d in zip(asked, seen, strict=True) if c.scene.objects[0].shape == shape]
        rows[f"shape: {shape}"] = share(d.shape == shape for _, d in of)
    truths = [world.render(case.scene)[0] for case in asked]
    animated = [answer(engine, case, image=image) for case, image in zip(asked, truths, strict=True)]
    quality = [psnr(clip[0], image) for clip, image in zip(animated, truths, strict=True)]
    rows[f"first frame kept (PSNR >= {FIRST_FRAME_DB:g} dB)"] = share(q >= FIRST_FRAME_DB for q in quality)
    rows["first frame, mean PSNR"] = {
        "db": round(float(np.mean(quality)), 2),
        "min_db": round(float(np.min(quality)), 2),
        "n": n,
    }
    rows["first frame given: motion class"] = share(
        detect(clip).motion == case.scene.objects[0].motion
        for case, clip in zip(asked, animated, strict=True)
    )
    if sheet is not None:
        strips = [np.concatenate([clip[i] for i in (0, 4, 8, 12, 16)], axis=1) for clip in clips[:24]]
        write_image(sheet, contact_sheet(np.stack(strips), 3))
        strips = [
            np.concatenate([truths[k], *(clip[i] for i in (0, 5, 10, 16))], axis=1)
            for k, clip in enumerate(animated[:24])
        ]
        write_image(
            sheet.with_name(f"{sheet.stem}-first-frame{sheet.suffix}"), contact_sheet(np.stack(strips), 3)
        )
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = ["| what is asked | seen | standard error | prompts |", "|---|---|---|---|"]
    for name, row in rows.items():
        if "share" in row:
            lines.append(f"| {name} | {row['share']:.3f} | {row['standard_error']:.3f} | {row['n']} |")
        else:
            lines.append(f"| {name} | {row['db']:.1f} dB (lowest {row['min_db']:.1f}) | | {row['n']} |")
    return "\n".join(lines)


def with_table(page: str, rows: str) -> str:
    """The page with its evaluation table replaced, which stands between two marks."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{rows}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG of some of the clips")
    parser.add_argument("--write", type=Path, nargs="*", default=[], help="pages whose table is replaced")
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    start = time.time()
    rows = evaluate(Engine(a.model), a.prompts, sheet=a.sheet)
    if a.json:
        a.json.write_text(json.dumps({"seed": SEED, "prompts": a.prompts, "rows": rows}, indent=1) + "\n")
    for page in a.write:
        page.write_text(with_table(page.read_text(), table(rows)))
    print(table(rows))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
