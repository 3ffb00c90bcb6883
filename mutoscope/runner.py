"""What a worker drives: something that holds a model and makes frames with it. `WanRunner` is the engine.

Torch is imported when a runner is made, not when this module is. Jobs and databases are unknown here.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, cast

from mutoscope.errors import FileError, RequestError
from mutoscope.events import Event
from mutoscope.manifest import ModelManifest
from mutoscope.request import GenerationRequest
from mutoscope.settings import Settings

if TYPE_CHECKING:
    from mutoscope.engine.models import Models


class Runner(Protocol):
    """One per worker process; called from one thread.

    Between two events of `run` nothing runs, and closing the iterator stops the work.
    """

    def __init__(self, device: str, settings: Settings) -> None: ...

    def load(self, manifest: ModelManifest) -> None:
        """Make this model the one that runs; raises what says why it cannot."""

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        """Make one video with the loaded model; see `engine.pipeline.generate`."""

    def release(self) -> None:
        """Give the model's memory back."""


def find_runner(name: str) -> type[Runner]:
    """The class that "module:Class" names (`settings.engine`)."""
    module, _, attribute = name.partition(":")
    try:
        return cast(type[Runner], getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as e:
        raise RequestError(f"engine = {name!r}: cannot be imported ({e}).") from e


class WanRunner:
    """The engine, with one model at a time."""

    def __init__(self, device: str, settings: Settings) -> None:
        import torch

        from mutoscope.engine.devices import open_device

        if settings.threads and device == "cpu":
            torch.set_num_threads(settings.threads)
        self._threads = torch.get_num_threads()
        self.device = open_device(device, said="device ")
        self._settings = settings
        self._models: Models | None = None

    def load(self, manifest: ModelManifest) -> None:
        from mutoscope.engine.devices import has_own_memory
        from mutoscope.engine.models import Models
        from mutoscope.machine import use_threads

        self.release()
        manifest.check_files()
        use_threads(manifest, self._threads)
        s, own = self._settings, has_own_memory(self.device)
        memory, vram = (None, s.vram or None) if own else (s.memory or None, None)
        models = Models(
            manifest, self.device, s.precision, memory, vram_bytes=vram, compiled=own and s.compile
        )
        _ = models.dit, models.vae, models.text  # opened now, so that a broken file shows here
        self._models = models

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        from mutoscope.engine.pipeline import generate

        if self._models is None:
            raise FileError("no model is loaded.")
        return generate(self._models, request)

    def release(self) -> None:
        from mutoscope.engine.devices import empty_cache

        self._models = None
        gc.collect()
        empty_cache(self.device)
