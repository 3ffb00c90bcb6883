"""`stable-diffusion.cpp` with the same transformer file, by its command line program (`sd-cli`, formerly `sd`).

What it needs, seen with the version in stable-diffusion-cpp-python 0.4.7 (August 2026): a transformer of 30 or 40
blocks (it aborts on any other number) and a whole VAE. Without a text encoder it says so, and attends to 256 rows of
zeros: the work of a step is the same. One step without guidance is one forward; it is stopped after the steps, before
its decoding.

Its log gives the average over the steps so far, "1/2 - 44.71s/it", and "3.10it/s" where a step takes less than a
second.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

BLOCKS = (30, 40)
STEPS = 2
"""The first is the warm-up."""

_PROGRESS = re.compile(r"(\d+)/(\d+) - (\d+\.?\d*)(s/it|it/s)")


@dataclass(frozen=True)
class StableDiffusionCpp:
    """The program and the case it is to run."""

    program: Path
    transformer: Path
    vae: Path
    size: tuple[int, int, int]
    threads: int

    @property
    def command(self) -> list[str]:
        width, height, frames = map(str, self.size)
        options = {
            "-M": "vid_gen",
            "--diffusion-model": str(self.transformer),
            "--vae": str(self.vae),
            "-p": "a red ball",
            "-W": width,
            "-H": height,
            "--video-frames": frames,
            "--cfg-scale": "1",
            "--sampling-method": "euler",
            "--steps": str(STEPS),
            "--seed": "1",
            "-t": str(self.threads),
            "-o": os.devnull,
        }
        return [str(self.program), *(part for option in options.items() for part in option), "--diffusion-fa"]

    def step(self) -> float:
        """Seconds of the last of `STEPS` steps, by its own log. Raises SystemExit if it ends before."""
        process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # its progress ends in a carriage return, which counts as the end of a line
            errors="replace",
            preexec_fn=_on_all_processors,
        )
        assert process.stdout is not None
        log = ""
        try:
            for line in process.stdout:
                log += line
                if len(steps := step_seconds(log)) == STEPS:
                    return steps[-1]
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        end = "\n".join(log.splitlines()[-8:])
        raise SystemExit(f"{self.program} ended with {process.returncode} before {STEPS} steps:\n{end}")


def step_seconds(log: str) -> list[float]:
    """Seconds of every step of a log."""
    totals = [0.0]
    for step, _, number, unit in _PROGRESS.findall(log):
        average = float(number) if unit == "s/it" else 1 / float(number)
        assert int(step) == len(totals), f"step {step} after {len(totals) - 1}"
        totals.append(int(step) * average)
    return [later - earlier for earlier, later in pairwise(totals)]


def _on_all_processors() -> None:
    """Bound threads (OMP_PROC_BIND) bind this one to one processor, and a child would inherit that."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
