"""What is shown while a video is made: a bar on a terminal, lines in a log, JSON for scripts, or nothing."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from mutoscope.cli.common import console, say, say_json, time_text
from mutoscope.events import Event, Frames, Result, Stage, Step

STAGES = {
    "load": "Loading the model",
    "text": "Reading the prompt",
    "conditioning": "Preparing the inputs",
    "denoise": "Denoising",
    "decode": "Decoding",
}
LINE_EVERY_S = 10.0


class Display(AbstractContextManager["Display"]):
    """Shows nothing; what is common to all."""

    def show(self, event: Event) -> None: ...

    def note(self, text: str) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(*, json: bool, quiet: bool) -> Display:
    if json:
        return JsonLines()
    if quiet:
        return Display()
    return Bar() if console(err=True).is_terminal else Lines()


class Bar(Display):
    """One line that changes in place: stage, bar, how many of how many, time left."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[rest]}", markup=False),
            console=console(err=True),
            transient=True,
            expand=True,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None

    def show(self, event: Event) -> None:
        if isinstance(event, Stage):
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(STAGES[event.name], total=None, count="", rest="")
        elif self.task is None:
            return
        elif isinstance(event, Step):
            rest = f"{time_text(event.eta_seconds)} left"
            count = f"step {event.i}/{event.n}"
            self.progress.update(self.task, total=event.n, completed=event.i, count=count, rest=rest)
        elif isinstance(event, Frames):
            count = f"frame {event.done}/{event.of}"
            self.progress.update(self.task, total=event.of, completed=event.done, count=count)

    def note(self, text: str) -> None:
        self.progress.console.print(text, markup=False)


class Lines(Display):
    """For logs: a line for each stage, and for the steps one every ten seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def show(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Stage):
            self.note(STAGES[event.name])
        elif isinstance(event, Step) and (
            event.i == 1 or event.i == event.n or now - self.last >= LINE_EVERY_S
        ):
            self.note(f"  step {event.i}/{event.n}, {time_text(event.eta_seconds)} left")
        else:
            return
        self.last = now

    def note(self, text: str) -> None:
        say(text, err=True)


class JsonLines(Display):
    """One JSON object a line, as things happen."""

    def show(self, event: Event) -> None:
        if isinstance(event, Stage):
            say_json({"event": "stage", "name": event.name, "seconds": round(event.seconds, 3)})
        elif isinstance(event, Step):
            say_json(
                {
                    "event": "step",
                    "i": event.i,
                    "n": event.n,
                    "seconds": round(event.seconds, 3),
                    "eta_seconds": round(event.eta_seconds, 1),
                }
            )
        elif isinstance(event, Frames):
            say_json({"event": "frames", "done": event.done, "of": event.of})
        elif isinstance(event, Result):
            pass  # the command knows more about it

    def note(self, text: str) -> None:
        say_json({"event": "note", "text": text})
