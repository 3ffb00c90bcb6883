"""A runner that pretends: frames without a model, and every way to fail that a worker has to survive.

The prompt is its script: words separated by spaces, each `word` or `word=number`.

    steps=5        denoising steps (otherwise those of the request)
    step=0.05      seconds per step (0 unless said)
    crash          the process kills itself (SIGKILL) in the middle        segv, exit: the other ways to die
    loop           an endless loop within a step; deaf: a step that takes no notice of anything for a minute
    oom, torch-oom, nan, request, media, bug       exceptions of all kinds
    once           ... but only on the first attempt in this data folder (a file remembers)

A model whose name begins with "bad" cannot be loaded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mutoscope.errors import FileError, MediaError, OutputError, RequestError
from mutoscope.events import Event, Frames, Preview, Result, Stage, Step
from mutoscope.manifest import ModelManifest
from mutoscope.request import GenerationRequest
from mutoscope.settings import Settings


class FakeRunner:
    """See the module's text."""

    def __init__(self, device: str, settings: Settings) -> None:
        self.device, self.data_dir = device, Path(settings.data_dir)
        self.loads: list[str] = []
        self.released = 0

    def load(self, manifest: ModelManifest) -> None:
        if manifest.name.startswith("bad"):
            raise FileError(f"{manifest.name}: is damaged.")
        self.loads.append(manifest.name)

    def release(self) -> None:
        self.released += 1

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        script = dict(word.partition("=")[::2] for word in request.prompt.split())
        steps = int(script.get("steps", "") or request.steps or 4)
        seconds = float(script.get("step", "") or 0)
        height, width, n = request.height or 16, request.width or 16, request.frames or 1
        yield Stage(name="text", seconds=0.0)
        yield Stage(name="denoise", seconds=0.0)
        for i in range(1, steps + 1):
            if seconds:
                time.sleep(seconds)  # this is the work
            if i == steps // 2 + 1:
                self._misbehave(script)
            yield Step(i=i, n=steps, seconds=seconds, eta_seconds=seconds * (steps - i))
            if i % 5 == 0 and i < steps:
                yield Preview(frames=np.full((3, 8, 8, 3), 10 * i % 256, np.uint8))
        yield Stage(name="decode", seconds=0.0)
        rng = np.random.default_rng(request.seed)
        colour = rng.integers(0, 256, 3).astype(np.uint8)
        frame = np.broadcast_to(colour, (height, width, 3))
        for done in range(1, n + 1):
            yield Frames(frames=np.stack([frame]), done=done, of=n)
        yield Result(seconds=seconds * steps)

    def _misbehave(self, script: dict[str, str]) -> None:
        if "once" in script:
            try:
                (self.data_dir / "misbehaved").touch(exist_ok=False)
            except FileExistsError:
                return
        if "crash" in script:
            os.kill(os.getpid(), signal.SIGKILL)
        if "segv" in script:
            ctypes.string_at(0)
        if "exit" in script:
            os._exit(3)
        while "loop" in script:
            pass
        if "deaf" in script:
            threading.Event().wait(60)
        if "oom" in script:
            raise MemoryError
        if "torch-oom" in script:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 GB")
        if "nan" in script:
            raise OutputError("The latents are not numbers any more.")
        if "request" in script:
            raise RequestError("Every pixel of every frame is given: nothing would be generated.")
        if "media" in script:
            raise MediaError("/somewhere/secret/input-0.png: cannot be decoded.")
        if "bug" in script:
            raise KeyError("nobody foresaw this")
