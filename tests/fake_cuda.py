"""A CUDA device that computes nothing: every tensor knows its device, shape and type, and no two devices mix.

    with fake_cuda(monkeypatch, free_bytes=8 << 30):
        list(generate(Models(manifest, "cuda:0"), request))       # an error if a forward mixes devices

torch's own FakeTensorMode follows devices through operations on any build of torch. What it leaves to the device, and
what needs values, is made up here. It shows which devices tensors are on, not that a kernel exists or is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mutoscope.engine.streaming import InOrder

CUDA = torch.device("cuda", 0)
TOTAL_BYTES = 16 << 30


_CONTIGUOUS = {"memory_format": torch.contiguous_format}


_ON_DEVICE = (Tensor.contiguous, Tensor.__getitem__, F.interpolate)
"""Made up for tensors of the device only."""


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """From any device, if it fits."""
    assert torch.broadcast_shapes(x.shape, source.shape) == x.shape
    return x


def _getitem(x: Tensor, index: Any) -> Tensor:
    """A view where it is one, else a new tensor on the same device."""
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    assert all(t.device in (x.device, torch.device("cpu")) for t in tensors)
    on_meta = tuple(part.to("meta") if isinstance(part, Tensor) else part for part in parts)
    y = torch.empty_strided(x.shape, x.stride(), device="meta")[on_meta]
    if tensors:
        return torch.empty(y.shape, dtype=x.dtype, device=x.device)
    return x.as_strided(y.shape, y.stride(), x.storage_offset() + y.storage_offset())


def _setitem(x: Tensor, index: Any, value: Any) -> None:
    part = _getitem(x, index)
    if isinstance(value, Tensor):
        _copy(part, value)


def _numpy(x: Tensor) -> Any:
    assert x.device.type == "cpu"
    return np.zeros(x.shape, np.uint8 if x.dtype == torch.uint8 else np.float32)


class FakeCuda(TorchFunctionMode):
    """Notes the types of products on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self._made_up: dict[Any, Callable[..., Any]] = {
            Tensor.data_ptr: lambda x: 0,
            F.interpolate: lambda x, scale_factor, **_: torch.empty(
                *x.shape[:2], *(int(n * scale_factor) for n in x.shape[2:]), dtype=x.dtype, device=x.device
            ),
            Tensor.copy_: _copy,
            Tensor.contiguous: lambda x, **options: torch.empty_like(x, **(options or _CONTIGUOUS)),
            Tensor.__getitem__: _getitem,
            Tensor.__setitem__: _setitem,
            Tensor.new_tensor: lambda x, y: torch.tensor(y, dtype=x.dtype, device=x.device),
            Tensor.numpy: _numpy,
            Tensor.__bool__: lambda x: True,
            Tensor.__float__: lambda x: 1.0,
            Tensor.item: lambda x: 1.0,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, torch._int_mm) and args[0].device == CUDA:
            self.products.add(args[0].dtype)
        if func in _ON_DEVICE and args[0].device != CUDA:
            return func(*args, **(kwargs or {}))
        return self._made_up.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def fake_cuda(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int = 8 << 30, *, bf16: bool = True
) -> Iterator[FakeCuda]:
    """`cuda:0` with that much free memory of 16 GiB; torch's allocator has none yet."""
    made_up = {
        "mem_get_info": lambda device=None: (free_bytes, TOTAL_BYTES),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=TOTAL_BYTES),
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: bf16,
        "set_per_process_memory_fraction": lambda share, device=None: None,
        "empty_cache": lambda: None,
    }
    for name, function in made_up.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr("mutoscope.engine.kernels.fits", lambda *widths: False)  # they read memory
    monkeypatch.setattr("mutoscope.engine.streaming.Streams", lambda device: InOrder())
    with FakeTensorMode(allow_non_fake_inputs=True), FakeCuda() as mode:
        yield mode
