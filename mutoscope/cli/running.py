"""Taking a generator's events to a file, and stopping between two of them."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from mutoscope.cli import parse
from mutoscope.cli.progress import Display
from mutoscope.errors import Cancelled
from mutoscope.events import Event, Frames, Result, Step
from mutoscope.manifest import ModelManifest

if TYPE_CHECKING:
    from mutoscope.engine.models import Models


def open_models(
    manifest: ModelManifest,
    device: str | None,
    precision: str = "auto",
    memory: str | None = None,
    vram: str | None = None,
    compiled: bool = False,
) -> Models:
    """Opens nothing yet; but importing the engine takes a second."""
    gc.disable()  # nothing of what is imported is garbage: looking through it takes a tenth of a second
    import torch

    from mutoscope.engine.devices import open_device
    from mutoscope.engine.models import Models
    from mutoscope.engine.text_cache import default_text_cache
    from mutoscope.machine import use_threads
    from mutoscope.planning import size_bytes

    gc.freeze()
    gc.enable()

    chosen = open_device(device)
    use_threads(manifest, torch.get_num_threads())
    promised, on_device = (None if text is None else size_bytes(text) for text in (memory, vram))
    return Models(
        manifest, chosen, precision, promised, default_text_cache(), vram_bytes=on_device, compiled=compiled
    )


@dataclass(frozen=True)
class Target:
    """The file to write."""

    path: Path
    width: int
    height: int
    fps: float
    info: dict[str, Any]


def drive(events: Iterator[Event], target: Target, display: Display) -> Result:
    """Take events until the result, writing frames; stop between two of them if asked."""
    from mutoscope.engine.pipeline import write

    done = "before the first step"
    with ExitStack() as stack:
        stack.enter_context(display)
        interrupt = stack.enter_context(
            Interrupt(lambda: display.note("Stopping after this step. Ctrl-C again stops at once."))
        )
        stack.enter_context(closing(events))  # type: ignore[type-var]
        written = write(events, target.path, fps=target.fps, width=target.width, height=target.height,
                        info=target.info)  # fmt: skip
        stack.enter_context(closing(written))  # type: ignore[type-var]
        for event in written:
            display.show(event)
            if isinstance(event, Result):
                return event
            if isinstance(event, Step):
                done = f"after step {event.i} of {event.n}"
            elif isinstance(event, Frames):
                done = f"after frame {event.done} of {event.of}"
            if interrupt.requested:
                raise Cancelled(f"Stopped {done}.")
    raise AssertionError("the engine ended without a result")


class Interrupt:
    """Ctrl-C asks to stop at the next step; a second one stops at once."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.requested = False
        self._tell = tell

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._tell()


def bytes_of(path: Path) -> int:
    """Size of a file, of the pictures of a folder, or of those that a pattern names."""
    files = path.iterdir() if path.is_dir() else parse.existing(path)
    return sum(file.stat().st_size for file in files)
