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
    "a large white cross spins on a striped teal background",
    "a large pink square on a checkered brown background, the camera pans left",
    "a blue triangle with a shadow moves to the left on a gray gradient background",
    "an orange ball bounces between the walls on a dark green background with a horizon",
    "a large purple box on a checkered teal background, the camera zooms in",
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
