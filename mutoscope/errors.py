"""Everything Mutoscope raises on purpose.

    MutoscopeError                 exit code   meant for
    ├── RequestError                    2      a request that cannot be run as asked
    ├── FileError                       3      a file that is missing or not what it should be
    │   ├── GGUFError                   3      a damaged or unsupported GGUF file
    │   ├── WeightError                 3      tensors that do not make up the model
    │   └── MediaError                  3      a picture or clip that cannot be read or written
    ├── ResourceError                   4      too little memory, disk or time
    ├── DownloadError                   5      a model that could not be fetched
    ├── OutputError                     6      a result that is not a picture
    └── Cancelled                     130      stopped by the user; latents kept where possible

A message says what was got, what was expected and where; `hint` says what to do next.
Anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations


class MutoscopeError(Exception):
    """Something went wrong that the user can act on."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class RequestError(MutoscopeError):
    """The request cannot be run as asked."""

    exit_code = 2


class FileError(MutoscopeError):
    """A file is missing, unreadable or of the wrong kind."""

    exit_code = 3


class GGUFError(FileError):
    """A GGUF file is damaged, hostile or of an unsupported kind."""


class WeightError(FileError):
    """The tensors of a file do not make up the model."""


class MediaError(FileError):
    """A picture or clip cannot be read or written."""


class ResourceError(MutoscopeError):
    """Memory, disk or time do not suffice."""

    exit_code = 4


class DownloadError(MutoscopeError):
    """A model could not be fetched."""

    exit_code = 5


class OutputError(MutoscopeError):
    """The numbers that came out are not a picture."""

    exit_code = 6


class Cancelled(MutoscopeError):
    """Stopped on request."""

    exit_code = 130
