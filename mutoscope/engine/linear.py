"""Linear layers and token tables that keep their weights packed, as the file stores them.

A weight is unpacked for one product and forgotten: into a buffer that all layers of a model share, so a
model needs the bytes of its file and room for its largest layer. One unpacking serves the whole batch (prompt
and negative prompt together). Weights already stored in the compute dtype are used where they lie.

*How* a product is computed is a `Precision`, chosen per layer when the model is built; layers and models do
not know which. Inference only: the next layer overwrites the shared buffer, so nothing can be differentiated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine import few_rows, pages
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.kernels import Product
from mutoscope.engine.quants import dequantize, dequantize_rows

FLOATS: dict[int, torch.dtype] = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}
"""Stored types that are plain numbers."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor as stored: uint8 [nbytes], usually memory of the mapped file, never written to.

    mapped_at: its address, if it is memory of a mapped file; a copy of it has another one.
    """

    data: Tensor
    type_id: int
    shape: tuple[int, ...]
    mapped_at: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether the stored bytes are `dtype` numbers that can be used in place."""
        return FLOATS.get(self.type_id) == dtype and self.data.data_ptr() % dtype.itemsize == 0

    def values(self, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
        """The numbers, `dtype` of `shape`: a view of the stored bytes where possible, else in `buffer`."""
        if self.is_plain(dtype):
            return self.data.view(dtype).view(self.shape)
        out = None if buffer is None else buffer[: self.numel]
        return dequantize(self.type_id, self.data, dtype, out).view(self.shape)

    def to(self, device: torch.device) -> Packed:
        return Packed(self.data.to(device), self.type_id, self.shape, self.mapped_at)

    def drop_pages(self) -> None:
        """Let go of its pages of the mapped file; they are read again when needed."""
        if self.mapped_at and self.data.data_ptr() == self.mapped_at:
            pages.drop(self.data)


class Shared:
    """Activations that go into several layers; what one of them makes of these is kept for the others.

    x: the activations, or what makes them if somebody needs them as they are; then `shape` is theirs.
    low: what no number of them is below, if that is known.
    ways: shorter ways to what layers make of them, by its name.
    """

    def __init__(
        self,
        x: Tensor | Callable[[], Tensor],
        low: float | None = None,
        *,
        shape: torch.Size | None = None,
        ways: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self._x = x
        self.low = low
        self._shape = shape
        self._ways = ways or {}
        self._made: dict[str, Any] = {}

    @property
    def shape(self) -> torch.Size:
        return self._shape or self.x.shape

    @property
    def x(self) -> Tensor:
        if not isinstance(self._x, Tensor):
            self._x = self._x()
        return self._x

    def made(self, what: str, make: Callable[[Tensor], Any]) -> Any:
        """`make(x)`, once under this name."""
        if what not in self._made:
            way = self._ways.get(what)
            self._made[what] = make(self.x) if way is None else way()
        return self._made[what]


def shared(x: Tensor, *layers: nn.Module, low: float | None = None) -> Tensor | Shared:
    """`x` to be given to all these layers in turn. It must not be changed in between. `low`: see `Shared`."""
    return Shared(x, low) if all(getattr(layer, "takes_shared", False) for layer in layers) else x


class Precision(Protocol):
    """How the product of activations and a packed weight is computed."""

    dtype: torch.dtype
    """What attention should compute in beside it."""

    def admit(self, weight: Packed) -> None:
        """Called once for every weight that will be used, before the first product."""

    kept_bytes: int
    """Memory that it keeps between products at the moment."""

    def settle(self, room_bytes: int) -> int:
        """How much memory it may keep between products beside that of one product; how much of it it will use."""

    def linear(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        """x [..., K] with a weight [N, K] and float32 bias [N] to [..., N]; then, if asked, GELU (tanh) of it.

        The result is of `dtype` or, where that costs nothing, float32.
        """

    def products(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None
    ) -> Iterator[tuple[slice, Product]]:
        """The same in runs of rows, each as the kernel leaves it."""

    def fuses_gelu(self, device: torch.device) -> bool:
        """Whether GELU comes with the product at little or no cost."""

    def rows_at_once(self, n_out: int) -> int:
        """With how many rows a layer of that width is fastest, if no slower than with all; 0: all."""


class Unpacked:
    """The exact weights, rounded to `dtype`, and a dense product in that dtype.

    With `drop`, every weight's pages of the file are let go of after its product.
    """

    def __init__(self, dtype: torch.dtype, *, drop: bool = False) -> None:
        self.dtype = dtype
        self.drop = drop
        self.kept_bytes = 0
        self.buffer_numel = 0
        self._file_bytes = 0
        self._buffers: dict[torch.device, Tensor] = {}
        self._held: tuple[Tensor, Tensor] | None = None

    def admit(self, weight: Packed) -> None:
        self._file_bytes += weight.data.nbytes
        if not weight.is_plain(self.dtype):
            self.buffer_numel = max(self.buffer_numel, weight.numel)

    def settle(self, room_bytes: int) -> int:
        self.drop = self._file_bytes > room_bytes
        return 0 if self.drop else self._file_bytes

    def linear(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        x = x.made(str(self.dtype), self._convert) if isinstance(x, Shared) else x.to(self.dtype)
        if self._few(x, weight):
            return self._of_few(x, weight, bias, gelu)
        w = self.unpacked(weight)
        b = None if bias is None else bias.to(self.dtype)
        if self.fuses_gelu(w.device):
            y = linear_pointwise(x, w, b, gelu)
        else:
            y = F.linear(x, w, b)
            y = F.gelu(y, approximate="tanh") if gelu else y
        if self.drop:
            weight.drop_pages()
        return y

    def _few(self, x: Tensor, weight: Packed) -> bool:
        n_rows, on_cpu = x.shape[:-1].numel(), weight.data.device.type == "cpu"
        bfloat16 = x.dtype == torch.bfloat16
        return on_cpu and bfloat16 and few_rows.can(weight.type_id, n_rows, x.shape[-1], weight.shape[0])

    def _of_few(self, x: Tensor, weight: Packed, bias: Tensor | None, gelu: bool) -> Tensor:
        """The same without unpacking, to float32."""
        y = few_rows.product(x.flatten(0, -2), weight.data, weight.shape[0])
        y = y if bias is None else y.add_(bias)
        if self.drop:
            weight.drop_pages()
        return (F.gelu(y, approximate="tanh") if gelu else y).view(*x.shape[:-1], -1)

    def unpacked(self, weight: Packed) -> Tensor:
        """The weight's numbers; those of the last one are still in the buffer if it is asked for again."""
        if self._held is None or self._held[0] is not weight.data:
            self._held = None  # whatever happens now, the buffer is written to
            buffer = self.buffer(weight.data.device, weight.numel)
            self._held = weight.data, weight.values(self.dtype, buffer)
        return self._held[1]

    def products(
        self, x: Tensor | Shared, weight: Packed, bias: Tensor | None
    ) -> Iterator[tuple[slice, Product]]:
        y_MN = self.linear(x, weight, bias).flatten(0, -2)
        yield slice(0, len(y_MN)), Product(y_MN)

    def fuses_gelu(self, device: torch.device) -> bool:
        return device.type == "cpu" and self.dtype == torch.bfloat16 and _has_linear_pointwise()

    def rows_at_once(self, n_out: int) -> int:
        return 0  # every part would unpack the weight again

    def _convert(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def buffer(self, device: torch.device, numel: int = 0) -> Tensor:
        """Made at the first use. For the largest weight admitted: on the processor memory is touched only as far as a
        weight reaches. Elsewhere for `numel`, and made anew for a larger one."""
        size = numel if numel and device.type != "cpu" else self.buffer_numel
        if device not in self._buffers or self._buffers[device].numel() < size:
            with torch.inference_mode(False):  # else it could not be written to outside of inference mode
                self._buffers[device] = torch.empty(size, dtype=self.dtype, device=device)
        return self._buffers[device]

    def forget(self) -> None:
        """Give the memory for unpacked weights back; it is made again when needed."""
        self._held = None
        self._buffers.clear()


@cache
def _has_linear_pointwise() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """oneDNN's product with bias and GELU inside, rounded once. F.linear adds the bias in a pass of its own."""
    after = ("gelu", [], "tanh") if gelu else ("none", [], "")
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)
    return result


class QuantLinear(nn.Module):
    """`nn.Linear` on a packed weight [N, K]; the bias is float32.

    device: where it computes, if that is not where its packed bytes lie: they are copied there for each product, unless
    `fetch` gives them (see `streaming`).
    """

    takes_shared = True
    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Packed, bias: Tensor | None, precision: Precision, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.device = device or weight.data.device
        self.fetch: Callable[[], Tensor] | None = None
        self._copy: weakref.ref[Tensor] | None = None
        self.out_features, self.in_features = weight.shape
        self.type_id = weight.type_id
        self.mapped_at = weight.mapped_at
        self.precision = precision
        self.register_buffer("packed", weight.data, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        precision.admit(weight)

    @property
    def weight(self) -> Packed:
        """On the device where it computes."""
        if self.fetch is not None:
            data = self.fetch()
        elif self.packed.device == self.device:
            return self.stored
        else:
            there = None if self._copy is None else self._copy()  # if it was used by the last product too
            data = self.packed.to(self.device) if there is None else there
            self._copy = weakref.ref(data)
            self.stored.drop_pages()
        return Packed(data, self.type_id, (self.out_features, self.in_features))

    @property
    def stored(self) -> Packed:
        """Where it lies."""
        return Packed(self.packed, self.type_id, (self.out_features, self.in_features), self.mapped_at)

    @property
    def fuses_gelu(self) -> bool:
        return self.precision.fuses_gelu(self.device)

    @property
    def rows_at_once(self) -> int:
        """With how many rows it is fastest, where it is as fast with these as with all; 0: all."""
        return self.precision.rows_at_once(self.out_features)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What attention between such layers should compute in."""
        return self.precision.dtype

    def forward(self, x: Tensor | Shared, *, gelu: bool = False) -> Tensor:
        return self.precision.linear(x, self.weight, self.bias, gelu=gelu)

    def products(self, x: Tensor | Shared) -> Iterator[tuple[slice, Product]]:
        """`forward` in runs of rows (tokens of all samples), the last pass left to the caller."""
        return self.precision.products(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {GGMLType(self.type_id).name}"


def once_per_clip(path: str) -> bool:
    """Whether a layer of the transformer makes keys or values of the prompt: a few rows, and not in every step."""
    return ".cross_attn.k" in path or ".cross_attn.v" in path


def _precisions(model: nn.Module) -> list[Precision]:
    return list({layer.precision: None for layer in model.modules() if isinstance(layer, QuantLinear)})


def kept_bytes(model: nn.Module) -> int:
    """Memory that its layers keep between products at the moment."""
    return sum(precision.kept_bytes for precision in _precisions(model))


def forget_buffers(model: nn.Module) -> None:
    """Give back what its layers hold between products on a device; large ones may not be needed again."""
    for precision in _precisions(model):
        if isinstance(precision, Unpacked):
            precision.forget()


def settle(model: nn.Module, room_bytes: int) -> int:
    """Share out memory that may be kept between products: converted weights first, then pages of the file.

    Returns how much will be used, which can be more: what cannot be done without.
    """
    used = 0
    for precision in sorted(_precisions(model), key=lambda p: isinstance(p, Unpacked)):
        used += precision.settle(max(0, room_bytes - used))
    return used


class QuantEmbedding(nn.Module):
    """`nn.Embedding` on a packed table [R, D]: unpacks only the rows asked for, in float32.

    The table stays in host memory (a mapped file costs nothing there) and only the rows travel to the device.
    """

    def __init__(self, table: Packed) -> None:
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ids [...] to float32 rows [..., D]."""
        rows = self.table.data.view(self.num_embeddings, -1)
        found = dequantize_rows(self.table.type_id, rows, ids.flatten().to(rows.device))
        return found.view(*ids.shape, -1).to(ids.device)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {GGMLType(self.table.type_id).name}"


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on CPUs with instructions for it; else float16 on GPUs, float32 on CPUs."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
