"""Mutoscope: video generation that you own.

>>> from mutoscope import Engine
>>> Engine("pocket").generate("a red ball falls and bounces").save("ball.mp4")    # doctest: +SKIP

Importing the package is cheap: torch is loaded when an `Engine` is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "GenerationRequest", "__version__"]

if TYPE_CHECKING:
    from mutoscope.engine.pipeline import Engine
    from mutoscope.request import GenerationRequest


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from mutoscope.engine.pipeline import Engine

        return Engine
    if name == "GenerationRequest":
        from mutoscope.request import GenerationRequest

        return GenerationRequest
    raise AttributeError(f"module 'mutoscope' has no attribute {name!r}")
