"""What can go wrong while a job is made, as the code that its customer is billed by and a message for people."""

from __future__ import annotations

import re
from typing import Any

from mutoscope.errors import FileError, MediaError, MutoscopeError, OutputError, RequestError, ResourceError
from mutoscope.jobs import fetch
from mutoscope.jobs.model import Failure


class Unusable(Exception):
    """The model cannot be loaded; the cause says why."""


class Untaken(Unusable):
    """The model cannot take the request's LoRAs, or what it asks for; the cause says why."""


class Unwritten(Exception):
    """The cause came up while output was written, not while it was made."""


class writing:
    """What fails in this block failed while writing."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (MutoscopeError, OSError)):
            raise Unwritten from error


def failure_of(error: BaseException, model: str) -> tuple[Failure, str]:
    """The code of a failure, and its message for people: never a path of this machine for what nobody foresaw."""
    if isinstance(error, Untaken):
        return Failure.MODEL_UNAVAILABLE, f"Model {model} cannot take this any more: {error.__cause__}"
    if isinstance(error, Unusable):
        return Failure.MODEL_UNAVAILABLE, f"Model {model} cannot be loaded: {error.__cause__}"
    if isinstance(error, Unwritten):
        cause = error.__cause__
        if isinstance(cause, (ResourceError, OSError)):
            return Failure.STORAGE, "The result could not be stored: the disk is full or not writable."
        return Failure.BAD_OUTPUT, f"The result could not be encoded: {_base_names(str(cause))}"
    if isinstance(error, fetch.InputError):
        return error.failure, str(error)
    if is_out_of_memory(error) or isinstance(error, ResourceError):
        said = str(error) if isinstance(error, ResourceError) else "Memory ran out."
        return Failure.OUT_OF_MEMORY, f"{said} Ask for a smaller size or fewer frames."
    if isinstance(error, OutputError):
        return Failure.BAD_OUTPUT, str(error)
    if isinstance(error, MediaError):
        return Failure.INPUT_INVALID, f"An input cannot be used: {_base_names(str(error))}"
    if isinstance(error, RequestError):
        return Failure.REQUEST_INVALID, str(error)
    if isinstance(error, FileError):
        return Failure.MODEL_UNAVAILABLE, str(error)
    return Failure.INTERNAL, f"An unexpected {type(error).__name__}; the server's log says more."


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's for devices, and the allocator's on CPU, which has no class of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def _base_names(text: str) -> str:
    """Paths shortened to names: where the server keeps things is nobody's business."""
    return re.sub(r"(?<![^\s'\"(])/[^\s'\"]*?([^\s'\"/]+)(?=$|[\s'\"])", r"\1", text)
