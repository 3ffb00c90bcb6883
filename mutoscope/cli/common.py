"""What all commands share: settings of a run, where text goes, how numbers read, how failures are told.

Results go to stdout, everything else (progress, notes, errors) to stderr; with --json stdout holds JSON only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mutoscope.errors import Cancelled, MutoscopeError, ResourceError
from mutoscope.request import PrecisionName

BUG = 1
"""Exit code of what nobody foresaw."""


@dataclass
class Settings:
    """How this run talks. Options set it as they are parsed, so that it also holds for failures."""

    debug: bool = False
    json: bool = False


def _set(ctx: typer.Context, name: str, value: bool) -> bool:
    if value and isinstance(ctx.obj, Settings):
        setattr(ctx.obj, name, True)
    return value


def _set_debug(ctx: typer.Context, value: bool) -> bool:
    return _set(ctx, "debug", value)


def _set_json(ctx: typer.Context, value: bool) -> bool:
    return _set(ctx, "json", value)


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of a failure.", callback=_set_debug, is_eager=True)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for scripts.", callback=_set_json, is_eager=True)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result's path.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).", show_default=False),
]

Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Stay below this, like 12GiB, or refuse before any work (default: use what is free).",
        show_default=False,
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Stay below this of a GPU's memory, like 8GiB; blocks that do not fit travel (default: use what is free).",
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="On GPUs, let torch.compile fuse what is between products; the first step is slow."
    ),
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        help="How layers compute: exact is float32, auto the fastest that stays close to it; q4 packs to 4 bits first; "
        "fp8 is for GPUs."
    ),
]


# -- output --------------------------------------------------------------------------------------------------


class ClosedPipe(Exception):
    """Nobody reads on, as in `mutoscope models | head -1`. Not an OSError: typer would end the program itself."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise ClosedPipe


def console(*, err: bool = False) -> Console:
    """Made when needed, so that it sees the streams of the moment. Lines wrap on terminals only."""
    stream = sys.stderr if err else sys.stdout
    return _Console(stderr=err, highlight=False, emoji=False, soft_wrap=not stream.isatty())


def say(text: str | Text, *, err: bool = False, style: str = "") -> None:
    """One paragraph, as it is: brackets are no markup, and nothing is cut in a pipe."""
    out = console(err=err)
    out.print(text, style=style, markup=False, soft_wrap=not out.is_terminal)


def say_json(value: Any) -> None:
    """One line of JSON on stdout, at once."""
    try:
        print(json.dumps(value, ensure_ascii=False, default=_jsonable), flush=True)
    except BrokenPipeError:
        raise ClosedPipe from None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in JSON output")


def size_text(n: float) -> str:
    """Bytes for people: 34 kB, 4.1 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            value = n / factor
            return f"{value:.0f} {unit}" if value >= 100 or factor == 1e3 else f"{value:.1f} {unit}"
    return f"{n:.0f} bytes"


def time_text(seconds: float) -> str:
    """A duration for people: 8.1 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


# -- failures ------------------------------------------------------------------------------------------------


def tell_failure(error: BaseException, settings: Settings) -> int:
    """Say what went wrong and what to do, in the way of this run; the exit code."""
    ours = error if isinstance(error, MutoscopeError) else _as_ours(error)
    debug = settings.debug or bool(os.environ.get("MUTOSCOPE_DEBUG"))
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    code = ours.exit_code if ours else BUG
    if ours:
        message, hint = ours.message, ours.hint
    else:
        message = f"an unexpected {type(error).__name__}: {error}"
        hint = "" if debug else "This is a bug; --debug shows where."
    hint = " ".join(filter(None, (hint, *getattr(error, "__notes__", ()))))
    if settings.json:
        say_json({"event": "error", "message": message, "hint": hint, "exit_code": code})
    head = Text() if isinstance(ours, Cancelled) else Text("Error: ", style="bold red")
    say(head.append(_sentence(message), style="not bold"), err=True)
    if hint:
        say(hint, err=True, style="dim" if console(err=True).is_terminal else "")
    return code


def _as_ours(error: BaseException) -> MutoscopeError | None:
    """Failures of the machine that libraries report in their own words."""
    text = str(error)
    no_memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(words in text for words in no_memory):
        return ResourceError(
            "memory ran out.", hint="Ask for a smaller size or fewer frames, or close other programs."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return MutoscopeError(f"{error.filename}: {error.strerror}.")
    return None


def _sentence(text: str) -> str:
    """With a capital, unless it begins with the name of a file or of a setting."""
    first, second = (*text.split(maxsplit=2), "", "")[:2]
    return text[:1].upper() + text[1:] if first.isalpha() and second != "=" else text
