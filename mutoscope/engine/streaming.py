"""Weights that do not all fit on the device: some blocks stay there, the others travel, one ahead of the products.

    model = load_wan(path, device=device)     # nothing large is there yet
    stream = stream_blocks(model, device)     # the layers of its blocks fetch their weights from here now
    stream.settle(room_bytes)                 # as many as fit stay, spread evenly over the model
    model(...)                                # the same numbers, whatever travels

    host      block 1    block 2    block 3                pinned memory
                 |          |          |                   copies, in their own stream
    device    [ slot A ] [ slot B ] [ slot A ]             products, in the computing stream

A copy writes a slot only when the products on what it held have ended; a product reads it only when its copy has
ended. Both are told to the device as events (`Lane`); the program never waits for either.

The order of blocks is not told but learned: which one followed which, the last time. Where that fails (the first
forward; a prompt without the side branch) a block is sent for when it is needed, and its products wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mutoscope.engine.devices import has_own_memory
from mutoscope.engine.linear import QuantLinear, once_per_clip
from mutoscope.errors import ResourceError

ALIGNMENT = 256
"""Of a weight within the memory of its block, as allocators of devices give it."""
PIECE_BYTES = 32 << 20
"""Of pinned memory that is asked for at once: torch rounds each up to a power of two."""

Place = Literal["stays", "travels", "copied"]


def place_of(path: str) -> Place:
    """Where the weight of a layer is while its model computes on a device with memory of its own.

    Those of blocks stay or travel, as there is room. What is needed once per clip (the text encoder, keys and values of
    the prompt, embeddings) is copied there for its product and takes no room while the clip is denoised.
    """
    name = path.split(".")[0]
    if name in ("blocks", "vace_blocks"):
        if once_per_clip(path):
            return "copied"
        return "stays" if path.endswith("before_proj") else "travels"
    return "stays" if name == "head" else "copied"


Mark = Any
"""A point in a device's work that other work can wait for."""


class Lane(Protocol):
    """How copies and products are put in order."""

    def host(self, n_bytes: int) -> Tensor:
        """uint8 memory that can be copied from without the processor's help."""

    def copy(self, target: Tensor, parts: Sequence[Tensor], after: Mark) -> Mark:
        """Copy host memory, part by part, beside the products, but not before `after`; the mark of its end."""

    def wait(self, mark: Mark) -> None:
        """Products from now on come after `mark`."""

    def mark(self) -> Mark:
        """Where the products asked for so far end."""

    def finish(self) -> None:
        """Return when all copies have ended."""


class InOrder:
    """For devices without streams: everything at once, one after the other."""

    def host(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, parts: Sequence[Tensor], after: Mark) -> Mark:
        start = 0
        for part in parts:
            target[start : start + len(part)].copy_(part)
            start += len(part)

    def wait(self, mark: Mark) -> None:
        pass

    def mark(self) -> Mark:
        pass

    def finish(self) -> None:
        pass


class Streams:
    """For CUDA and what torch offers in the same way (ROCm, XPU): copies in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.side = self.module.Stream(device)

    def host(self, n_bytes: int) -> Tensor:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as e:
            raise ResourceError(
                f"{n_bytes >> 20} MiB of memory cannot be pinned for weights that do not fit on {self.device} "
                f"({str(e).splitlines()[0]}).",
                hint="Take a smaller quantisation, free memory, or allow more of the device (--vram).",
            ) from e

    def copy(self, target: Tensor, parts: Sequence[Tensor], after: Mark) -> Mark:
        with self.module.stream(self.side):
            self.side.wait_event(after)
            start = 0
            for part in parts:
                target[start : start + len(part)].copy_(part, non_blocking=True)
                start += len(part)
            return self.side.record_event()

    def wait(self, mark: Mark) -> None:
        self.module.current_stream(self.device).wait_event(mark)

    def mark(self) -> Mark:
        return self.module.current_stream(self.device).record_event()

    def finish(self) -> None:
        self.side.synchronize()


@dataclass(eq=False)
class Block:
    """Layers whose weights stay or travel together."""

    layers: list[QuantLinear]
    parts: list[slice] = field(init=False)
    """Of each layer, within the memory of all."""
    nbytes: int = field(init=False)
    stays: bool = True
    kept: Tensor | None = None
    """On the device, if it stays and was used."""
    pinned: list[Tensor] | None = None
    """On the host, if it travels and was used."""

    def __post_init__(self) -> None:
        start, self.parts = 0, []
        for layer in self.layers:
            self.parts.append(slice(start, start + layer.packed.nbytes))
            start += -(-layer.packed.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = start

    def fill(self, memory: Sequence[Tensor]) -> None:
        """Copy the weights from where they are stored into uint8 memory, in one piece or several."""
        starts = [sum(len(m) for m in memory[:i]) for i in range(len(memory))]
        for layer, part in zip(self.layers, self.parts, strict=True):
            for piece, at in zip(memory, starts, strict=True):
                a, b = max(part.start, at), min(part.stop, at + len(piece))
                if a < b:
                    piece[a - at : b - at].copy_(layer.packed[a - part.start : b - part.start])
            layer.stored.drop_pages()


@dataclass(eq=False)
class Slot:
    """Memory on the device for one travelling block."""

    memory: Tensor
    free: Mark
    """When the products on what it holds have ended."""
    block: Block | None = None
    ready: Mark = None
    """When it holds all of its block."""


class BlockStream:
    """The blocks of a model and where they are. Nothing is on the device before it is used."""

    def __init__(self, blocks: Sequence[Block], device: torch.device, lane: Lane) -> None:
        self.blocks, self.device, self.lane = list(blocks), device, lane
        self._following: dict[Block, Block] = dict(pairwise(self.blocks))
        self._slots: list[Slot] = []
        self._last: Slot | None = None
        """The slot that was read last, or is being read."""
        self._now: Block | None = None
        self._memory: Tensor | None = None
        """Where the block in work is."""
        for block in self.blocks:
            for layer, part in zip(block.layers, block.parts, strict=True):
                layer.fetch = partial(self._fetch, block, part)

    @property
    def all_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def least_bytes(self) -> int:
        """What it needs on the device at least: the block in work and the one ahead of it."""
        return min(self.all_bytes, 2 * max((block.nbytes for block in self.blocks), default=0))

    @property
    def travelling(self) -> list[Block]:
        return [block for block in self.blocks if not block.stays]

    def settle(self, room_bytes: int) -> int:
        """Let as many blocks stay as fit into that much of the device, beside those that travel.

        Returns how much will be used, which can be more: `least_bytes`.
        """
        n = len(self.blocks)
        for n_travel in range(n + 1):
            travels = {i * n // n_travel for i in range(n_travel)}  # evenly spread: time to send each
            kept = sum(block.nbytes for i, block in enumerate(self.blocks) if i not in travels)
            slots = self.least_bytes if travels else 0
            if kept + slots <= room_bytes:
                break
        self.lane.finish()
        self._leave()
        for i, block in enumerate(self.blocks):
            block.stays = i not in travels
            if block.stays:
                block.pinned = None
            else:
                block.kept = None
        if not travels:
            self._slots, self._last = [], None
        return kept + slots

    def _fetch(self, block: Block, part: slice) -> Tensor:
        """The packed bytes of a layer, for the product that is asked for next."""
        if block is not self._now:
            self._enter(block)
        assert self._memory is not None
        return self._memory[part]

    def _enter(self, block: Block) -> None:
        if self._now is not None:
            self._following[self._now] = block
        self._leave()
        if block.stays:
            if block.kept is None:
                block.kept = self._room(block.nbytes)
                block.fill([block.kept])
            self._memory = block.kept
        else:
            slot = self._slot_with(block) or self._send(block)
            self.lane.wait(slot.ready)
            self._last, self._memory = slot, slot.memory
        self._now = block
        ahead = self._next_travelling(block)
        if ahead is not None and self._slot_with(ahead) is None:
            self._send(ahead)

    def _leave(self) -> None:
        """The products on the block in work have all been asked for."""
        if self._now is not None and not self._now.stays and self._last is not None:
            self._last.free = self.lane.mark()
        self._now = self._memory = None

    def _send(self, block: Block) -> Slot:
        """Start the copy of a block into the slot that is not being read."""
        if not self._slots:
            size = max(b.nbytes for b in self.blocks)
            self._slots = [Slot(self._room(size), self.lane.mark()) for _ in range(2)]
        slot = next(s for s in self._slots if s is not self._last)
        if block.pinned is None:
            sizes = [min(PIECE_BYTES, block.nbytes - at) for at in range(0, block.nbytes, PIECE_BYTES)]
            block.pinned = [self.lane.host(size) for size in sizes]
            block.fill(block.pinned)
        slot.block = block
        slot.ready = self.lane.copy(slot.memory, block.pinned, slot.free)
        return slot

    def _slot_with(self, block: Block) -> Slot | None:
        return next((slot for slot in self._slots if slot.block is block), None)

    def _next_travelling(self, block: Block) -> Block | None:
        for _ in self.blocks:
            if block not in self._following:
                return None
            block = self._following[block]
            if not block.stays:
                return block
        return None

    def _room(self, n_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)


def stream_blocks(model: nn.Module, device: torch.device, lane: Lane | None = None) -> BlockStream:
    """Let the layers of a transformer's blocks fetch their weights from a stream; see `place_of`."""
    groups: dict[str, list[QuantLinear]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and place_of(path) == "travels":
            groups.setdefault(".".join(path.split(".")[:2]), []).append(layer)
    lane = lane or (Streams(device) if has_own_memory(device) else InOrder())
    return BlockStream([Block(layers) for layers in groups.values()], device, lane)
