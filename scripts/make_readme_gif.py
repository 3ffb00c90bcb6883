"""Make docs/images/demo.gif: eight clips of the starter, as it makes them, twice enlarged.

python scripts/make_readme_gif.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mutoscope import Engine
from mutoscope.media.write import VideoWriter

PROMPTS = (
    "a large red ball falls and bounces on a gray background",
    "a yellow star moves to the right on a navy background",
    "a green ring grows on a black background",
    "a large white cross spins on a teal background",
    "a pink square moves up on a brown background",
    "a blue triangle moves to the left on a gray gradient background",
    "an orange circle shrinks on a dark green background",
    "a purple box falls and bounces on a teal gradient background",
)
SEED = 7
SCALE = 2
OUT = Path(__file__).parent.parent / "docs" / "images" / "demo.gif"


def main() -> None:
    engine = Engine("pocket")
    clips = [engine.generate(prompt, seed=SEED) for prompt in PROMPTS]
    rows = [np.concatenate([c.frames for c in clips[i : i + 4]], axis=2) for i in (0, 4)]
    sheet = np.concatenate(rows, axis=1).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    with VideoWriter(OUT, width=sheet.shape[2], height=sheet.shape[1], fps=clips[0].fps) as writer:
        for frame in (*sheet, *sheet[-1:].repeat(4, axis=0)):
            writer.write(frame)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
