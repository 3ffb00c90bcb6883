"""LoRA as low-rank side paths: what a layer computes gets a small addition, its packed weight stays as it is.

    y = W x + b    becomes    y = W x + b + up (down x),    down [R, K], up [N, R]

Any number of LoRAs of one layer are one pair of products: their rows and columns side by side, R the sum of their
ranks, with strength and alpha inside of `up`. Small parameters (biases, norms, modulation, the patch embedding) are
exchanged for changed copies. Both can be undone, and leave no trace:

    undo = attach(model, [(changes, 0.8), ...])
    ...
    undo()                        # the model consists of the very same tensors as before

The addition is 2 R (K + N) operations for each token where the layer has 2 K N, so rank 64 is 8 % of a layer of
1,536 x 1,536 and less of larger ones; what it costs of a forward is in docs/performance.md.

Paper: "LoRA" (arXiv 2106.09685). Formats of files: `lora_files.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.int8 import Int8, Weight, gelu_, prepare, product, quantize_rows, rows_of, unfinished
from mutoscope.engine.kernels import Product
from mutoscope.engine.linear import Packed, QuantLinear, Shared, Unpacked, linear_pointwise
from mutoscope.engine.lora_files import Changes, is_linear, read_lora

Undo = Callable[[], None]
Loras = tuple[tuple[Changes, float], ...]
"""What opened files change, with their strengths; none of strength 0."""


class SidePath(nn.Module):
    """A linear layer with an addition of low rank; `dense` [N, K] is one of full rank, from `diff` keys."""

    down: Tensor
    up: Tensor
    dense: Tensor | None

    def __init__(self, layer: nn.Module, down: Tensor, up: Tensor, dense: Tensor | None, wide: Wide) -> None:
        super().__init__()
        self.layer = layer
        self.wide = wide
        self.takes_shared = getattr(layer, "takes_shared", False)
        self.fuses_gelu = True
        """`forward` takes `gelu`, at the price of a pass of its own where it cannot be fused."""
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("dense", dense, persistent=False)
        integers = isinstance(layer, QuantLinear) and isinstance(layer.precision, Int8) and up.shape[1] > 0
        self.prepared = (_prepared(down), _prepared(up)) if integers and dense is None else None

    @property
    def in_features(self) -> int:
        return int(self.down.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.up.shape[0])

    @property
    def precision(self) -> Any:
        return getattr(self.layer, "precision", None)

    @property
    def rows_at_once(self) -> int:
        return int(getattr(self.layer, "rows_at_once", 0))

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.down.dtype

    def forward(self, x: Tensor | Shared, *, gelu: bool = False) -> Tensor:
        """x [..., K] to [..., N]; then, if asked, GELU (tanh) of it."""
        dtype = self.down.dtype
        given = x if isinstance(x, Shared) else Shared(x)
        if self.prepared is not None:
            return self._in_integers(given, *self.prepared, gelu)
        low = given.made(str(dtype), lambda x: x.to(dtype))  # once for both paths, under the name layers use
        side = F.linear(low, self.down)
        if gelu and self.dense is None and self.wide.takes(self.layer):
            return self.wide.linear(self.layer, low, side, self.up)
        y = _added(self.layer(given if self.takes_shared else low), side, self.up)
        if self.dense is not None:
            y = y + F.linear(low, self.dense)
        if gelu and y.dtype == torch.float32 and y.device.type == "cpu" and not y.requires_grad:
            return gelu_(y)
        return F.gelu(y, approximate="tanh") if gelu else y

    def _in_integers(self, given: Shared, down: Weight, up: Weight, gelu: bool) -> Tensor:
        """As the layer does it: the addition takes the place of the bias, which is inside of it."""
        layer = self.layer
        assert isinstance(layer, QuantLinear)
        rows = rows_of(given)
        more = product(quantize_rows(product(rows, down, None)), up, layer.bias)
        return layer.precision.linear(given, layer.weight, more, gelu=gelu)

    def products(self, x: Tensor | Shared) -> Iterator[tuple[slice, Product]]:
        """As the layer's; beside integer products the addition is a second one."""
        if self.prepared is None:
            y_MN = self(x).flatten(0, -2)
            yield slice(0, len(y_MN)), Product(y_MN)
            return
        layer, (down, up) = self.layer, self.prepared
        assert isinstance(layer, QuantLinear)
        given = x if isinstance(x, Shared) else Shared(x)
        low = quantize_rows(product(rows_of(given), down, None))
        for part, p in layer.products(given):
            side = unfinished(low[part], up, None)
            yield part, Product(p.y_MN, p.step_M1, p.bias, side.y_MN, side.step_M1)

    def extra_repr(self) -> str:
        return f"rank {self.down.shape[0]}" + ("" if self.dense is None else " and a dense difference")


def _prepared(matrix: Tensor) -> Weight:
    """A matrix for integer products."""
    values = matrix.float().contiguous()
    return prepare(Packed(values.view(torch.uint8).flatten(), GGMLType.F32, tuple(values.shape)))


def _added(y: Tensor, side: Tensor, up: Tensor) -> Tensor:
    """y + side up^T; in place, y being a fresh result."""
    if not up.shape[1]:
        return y
    if y.requires_grad or not y.is_contiguous():
        return y + F.linear(side, up)
    if y.dtype != up.dtype:
        return y.add_(F.linear(side, up))
    y.view(-1, y.shape[-1]).addmm_(side.reshape(-1, side.shape[-1]), up.t())
    return y


class Wide:
    """One product for both paths, [x, side] with [W, up], where a GELU is fused into it.

    Only the product itself can apply the GELU at no cost: as a pass of its own it takes a third of the layer's time
    in bfloat16. The wide weight is put together in a buffer that all layers share.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def takes(self, layer: nn.Module) -> bool:
        return isinstance(layer, QuantLinear) and isinstance(layer.precision, Unpacked) and layer.fuses_gelu

    def linear(self, layer: nn.Module, x: Tensor, side: Tensor, up: Tensor) -> Tensor:
        """GELU of the layer's product with its addition."""
        assert isinstance(layer, QuantLinear)
        assert isinstance(layer.precision, Unpacked)
        n, k, r = layer.out_features, layer.in_features, up.shape[1]
        if self._buffer is None or self._buffer.numel() < n * (k + r):
            self._buffer = torch.empty(n * (k + r), dtype=up.dtype, device=up.device)
        weight = self._buffer[: n * (k + r)].view(n, k + r)
        weight[:, :k] = layer.precision.unpacked(layer.weight)
        weight[:, k:] = up
        bias = None if layer.bias is None else layer.bias.to(up.dtype)
        return linear_pointwise(torch.cat((x, side), -1), weight, bias, gelu=True)


class Attached:
    """The LoRAs that a transformer has at the moment, and the files last opened, whose values stay in the map."""

    def __init__(self) -> None:
        self._files: dict[Any, Changes] = {}
        self._now: Loras = ()
        self._undo: Undo | None = None

    def open(self, model: nn.Module, wanted: Sequence[tuple[Path, float]]) -> Loras:
        """Read and check files against `model`, which has none attached; what is open already is not read again.

        Raises:
            FileError, WeightError: see `lora_files`.
        """
        files: dict[Any, Changes] = {}
        for path, _ in wanted:
            key = _identity(path)
            files[key] = files.get(key) or self._files.get(key) or read_lora(path).changes(model)
        self._files = files
        return tuple((files[_identity(path)], strength) for path, strength in wanted if strength)

    def attach(self, model: nn.Module, loras: Loras) -> None:
        """Let `model` have these and no others; nothing is done if it has them."""
        if loras == self._now:
            return
        self.detach()
        self._undo = attach(model, loras)
        self._now = loras

    def detach(self) -> None:
        if self._undo is not None:
            self._undo()
        self._now, self._undo = (), None


def _identity(path: Path) -> Any:
    """Changes when the file does."""
    try:
        stat = path.stat()
    except OSError:
        return path, None  # reading it will tell
    return path.absolute(), stat.st_size, stat.st_mtime_ns


def attach(model: nn.Module, loras: Sequence[tuple[Changes, float]]) -> Undo:
    """Let `model` compute with LoRAs of these strengths; the function returned takes all of it back."""
    undo: list[Undo] = []
    dense = {name for changes, _ in loras for name in changes.differences}
    names = {name for changes, _ in loras for name in changes.pairs} | dense
    wide = Wide()
    try:
        for name in sorted(names):
            path, _, kind = name.rpartition(".")
            module = model.get_submodule(path)
            if kind == "weight" and is_linear(module):
                undo.append(_wrap(model, path, name, loras, wide))
            else:
                undo.append(_exchange(model.get_submodule(path), kind, _total(name, loras)))
    except BaseException:
        _undo_all(undo)
        raise
    return lambda: _undo_all(undo)


def _undo_all(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _wrap(model: nn.Module, path: str, name: str, loras: Sequence[tuple[Changes, float]], wide: Wide) -> Undo:
    layer = model.get_submodule(path)
    first = next(iter([*layer.buffers(), *layer.parameters()]))
    device = getattr(layer, "device", first.device)
    dtype = getattr(layer, "compute_dtype", first.dtype)
    pairs = [(c.pairs[name].matrices(), strength) for c, strength in loras if name in c.pairs]
    shape = (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
    down = torch.cat([d for (d, _), _ in pairs]) if pairs else torch.empty(0, shape[1])
    up = torch.cat([u * strength for (_, u), strength in pairs], 1) if pairs else torch.empty(shape[0], 0)
    full = [d.tensor() * strength for c, strength in loras for d in c.differences.get(name, ())]
    dense = torch.stack([d.view(shape) for d in full]).sum(0).to(device, dtype) if full else None
    side = SidePath(layer, down.to(device, dtype), up.to(device, dtype), dense, wide)
    model.set_submodule(path, side)
    return lambda: model.set_submodule(path, layer)


def _total(name: str, loras: Sequence[tuple[Changes, float]]) -> Tensor:
    """The whole difference of a parameter, float32, of any shape with as many numbers."""
    parts: list[Tensor] = []
    for changes, strength in loras:
        if name in changes.pairs:
            down, up = changes.pairs[name].matrices()
            parts.append((up @ down).flatten() * strength)
        parts += [d.tensor().flatten() * strength for d in changes.differences.get(name, ())]
    return torch.stack(parts).sum(0)


def _exchange(module: nn.Module, kind: str, difference: Tensor) -> Undo:
    """Put a changed copy in the place of a parameter or buffer; the old one itself comes back."""
    # A wrapped layer keeps its bias inside.
    owner = module.layer if isinstance(module, SidePath) else module
    assert isinstance(owner, nn.Module)
    place = owner._parameters if kind in owner._parameters else owner._buffers
    old = place[kind]
    assert old is not None
    new = old.detach() + difference.view(old.shape).to(old.device, old.dtype)
    place[kind] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new  # type: ignore[assignment]

    def back() -> None:
        place[kind] = old  # type: ignore[assignment]

    return back
