"""Where the time of a forward goes, seen from outside: who calls what the engine computes with, for how long.

products        of linear layers and of attention
softmax         of attention
weights         unpacked, or converted to 8 bits
other passes    norms, rotation, gates, 8-bit activations: the compiled ones
rest            whatever else: operations of the library, copies, Python
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from mutoscope.engine import attention, int8, jit, linear


class _Instead:
    """A module of which some functions are others."""

    def __init__(self, module: Any, **others: Any) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def shares(forward: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Parts of one forward, of 1."""
    spent: dict[str, float] = {}
    with _watched(spent, clock):
        start = clock()
        forward()
        whole = clock() - start
    spent["rest"] = whole - sum(spent.values())
    return {name: seconds / whole for name, seconds in spent.items()}


@contextmanager
def _watched(spent: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    inside = False  # a kernel that unpacks a weight is part of that

    def timed(name: str | None, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args, **kwargs)
            of = name or ("softmax" if args[0].name.startswith("softmax") else "other passes")
            start, inside = clock(), True
            try:
                return function(*args, **kwargs)
            finally:
                inside = False
                spent[of] = spent.get(of, 0.0) + clock() - start

        return call

    onednn = torch.ops.onednn
    ops = _Instead(
        torch.ops, onednn=_Instead(onednn, qlinear_pointwise=timed("products", onednn.qlinear_pointwise))
    )
    softmax = timed("softmax", torch.softmax)
    with ExitStack() as stack:
        for owner, name, instead in (
            (int8, "torch", _Instead(torch, ops=ops)),
            (int8.Int8, "_converted", timed("weights", int8.Int8._converted)),
            (attention, "torch", _Instead(torch, mm=timed("products", torch.mm), softmax=softmax)),
            (linear, "linear_pointwise", timed("products", linear.linear_pointwise)),
            (linear, "dequantize", timed("weights", linear.dequantize)),
            (jit.Compiled, "__call__", timed(None, jit.Compiled.__call__)),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, instead))
        yield
