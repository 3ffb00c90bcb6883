"""Devices: which there are, what memory they have, and what is said when one of them is missing or full.

The engine is the same on all of them. What differs between the processor and a device with memory of its own is here,
in `streaming.py`, and in the branches on `device.type` of attention, linear layers and precisions. None of it was ever
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import psutil
import torch

from mutoscope.errors import RequestError, ResourceError
from mutoscope.events import Event
from mutoscope.request import GenerationRequest

GIB = 1 << 30
DEVICE_SHARE = 0.9
"""Of a device's free memory that is used where nothing was said."""

P = ParamSpec("P")


def open_device(name: str | None = None, *, said: str = "--device ") -> torch.device:
    """The device of that name, with its number; without a name a GPU if there is one, else the processor.

    Raises:
        RequestError: there is no such device. `said` is how its name was given.
    """
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as e:
        raise RequestError(
            f"{said}{chosen}: cannot be used here ({str(e).splitlines()[0]}).",
            hint=f"There is {', '.join(map(str, found()))}; mutoscope doctor tells more.",
        ) from e


def found() -> list[torch.device]:
    """The processor, and what torch offers beside it."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        devices += [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return devices


def has_own_memory(device: torch.device) -> bool:
    """Whether weights must travel to it."""
    return device.type not in ("cpu", "mps")


def free_bytes(device: torch.device) -> int:
    """What this process can still get there, what its allocator keeps for reuse included; without swapping."""
    if not has_own_memory(device):
        return int(psutil.virtual_memory().available)
    module: Any = torch.get_device_module(device)
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0] + unused)


def allowed_bytes(device: torch.device, promised: int | None, context_bytes: int) -> int:
    """What this process may have in all on a device with memory of its own.

    promised: what it was told to stay below; else nearly all that is free. context_bytes: what is there before the
    first tensor and counts too.
    """
    module: Any = torch.get_device_module(device)
    have = free_bytes(device) + int(module.memory_allocated(device))
    if promised is None:
        return context_bytes + int(DEVICE_SHARE * have)
    return min(promised, context_bytes + have)


def limit(device: torch.device, promised: int | None, context_bytes: int) -> None:
    """Let torch itself refuse to take more of the device than was promised.

    Raises:
        ResourceError: the device has not got that much.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if promised is not None and promised > total:
        raise ResourceError(
            f"--vram: {promised / GIB:.1f} GiB are allowed, {device} has {total / GIB:.1f} GiB.",
            hint="Leave it out to use what is free.",
        )
    share = 1.0 if promised is None else max(0, promised - context_bytes) / total
    torch.cuda.set_per_process_memory_fraction(share, device)


def empty_cache(device: torch.device) -> None:
    """Give what the device's allocator keeps for reuse back to the device."""
    if has_own_memory(device):
        module: Any = torch.get_device_module(device)
        module.empty_cache()


def tells_out_of_memory(
    generate: Callable[Concatenate[Any, GenerationRequest, P], Iterator[Event]],
) -> Callable[Concatenate[Any, GenerationRequest, P], Iterator[Event]]:
    """For `generate(models, request)`: a device that is full although it should not be is told with what may help."""

    @wraps(generate)
    def told(models: Any, request: GenerationRequest, *args: P.args, **options: P.kwargs) -> Iterator[Event]:
        try:
            yield from generate(models, request, *args, **options)
        except torch.OutOfMemoryError as e:
            raise _full(models.device, models.allowed_bytes, request.frames) from e

    return told


def _full(device: torch.device, allowed: int, frames: int | None) -> ResourceError:
    shorter = 1 + 4 * (((frames or 81) * 2 // 3 - 1) // 4)
    return ResourceError(
        f"{device} ran out of memory, though by the estimate {allowed / GIB:.1f} GiB were enough.",
        hint=f"Try --vram {0.8 * allowed / GIB:.1f}GiB, which leaves more of it to the clip than to weights, "
        f"or {max(1, shorter)} frames, or close what else uses it.",
    )
