"""LoRA as low-rank side paths: what a layer computes gets a small addition, its packed weight stays as it is.

    y = W x + b    becomes    y = W x + b + up (down x),    down [R, K], up [N, R]

Any number of LoRAs of one layer are one pair of products: their rows and columns side by side, R the sum of their
ranks, with strength and alpha inside of `up`. On processors with fast integers the second one, which is mostly
writing, is no product of the library but part of the pass that follows on the layer (`kernels.Side`), in 8 bits, also
beside bfloat16. Small parameters (biases, norms, modulation, the patch embedding) are exchanged for changed copies.
Both can be undone, and leave no trace:

    undo = attach(model, [(changes, 0.8), ...])
    ...
    undo()                        # the model consists of the very same tensors as before

The addition is 2 R (K + N) operations for each token where the layer has 2 K N, so rank 64 is 8 % of a layer of
1,536 x 1,536 and less of larger ones; what it costs of a forward is in docs/performance.md.

Paper: "LoRA" (arXiv 2106.09685). Formats of files: `lora_files.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine import kernels
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.int8 import (
    Int8,
    Weight,
    gelu_,
    int8_is_fast,
    prepare,
    product,
    quantize_rows,
    rows_of,
    unfinished,
)
from mutoscope.engine.jit import LANES
from mutoscope.engine.kernels import Product, Side, Up
from mutoscope.engine.linear import Packed, QuantLinear, Shared
from mutoscope.engine.lora_files import Changes, is_linear, read_lora

Undo = Callable[[], None]
Loras = tuple[tuple[Changes, float], ...]
"""What opened files change, with their strengths; none of strength 0."""


class SidePath(nn.Module):
    """A linear layer with an addition of low rank; `dense` [N, K] is one of full rank, from `diff` keys."""

    down: Tensor
    up: Tensor
    dense: Tensor | None

    def __init__(self, layer: nn.Module, down: Tensor, up: Tensor, dense: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.takes_shared = getattr(layer, "takes_shared", False)
        self.fuses_gelu = True
        """`forward` takes `gelu`, at the price of a pass of its own where it cannot be fused."""
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("dense", dense, persistent=False)
        self.prepared: tuple[Weight, Weight] | None = None
        """For products beside integers."""
        self.within: Up | None = None
        """For the addition within the pass that follows on the layer."""
        if isinstance(layer, QuantLinear) and dense is None and up.shape[1]:
            if isinstance(layer.precision, Int8):
                self.prepared = _prepared(down), _prepared(up)
            on_cpu = down.dtype == torch.bfloat16 and down.device.type == "cpu"
            if on_cpu and int8_is_fast() and kernels.fits(up.shape[0]):
                self.within = Up.of(up)

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
        if gelu and self.within is not None:
            return self._with_gelu(given)
        low = given.made(str(dtype), lambda x: x.to(dtype))  # once for both paths, under the name layers use
        side = F.linear(low, self.down)
        y = _added(self.layer(given if self.takes_shared else low), side, self.up)
        if self.dense is not None:
            y = y + F.linear(low, self.dense)
        if gelu and y.dtype == torch.float32 and y.device.type == "cpu" and not y.requires_grad:
            return gelu_(y)
        return F.gelu(y, approximate="tanh") if gelu else y

    def _with_gelu(self, given: Shared) -> Tensor:
        """Of a layer in bfloat16, which gives all rows at once. Its product could do the GELU itself, but only before
        the addition."""
        _, p = next(self.products(given))
        y_MN = p.y_MN.to(self.down.dtype)  # the product itself, unless it is float32
        kernels.gelu_bfloat16(p, y_MN)
        return y_MN.view(*given.shape[:-1], -1)

    def _in_integers(self, given: Shared, down: Weight, up: Weight, gelu: bool) -> Tensor:
        """As the layer does it: the addition takes the place of the bias, which is inside of it."""
        layer = self.layer
        assert isinstance(layer, QuantLinear)
        rows = rows_of(given)
        more = product(quantize_rows(product(rows, down, None)), up, layer.bias)
        return layer.precision.linear(given, layer.weight, more, gelu=gelu)

    def products(self, x: Tensor | Shared) -> Iterator[tuple[slice, Product]]:
        """As the layer's; the addition is left to the caller's pass where it can be."""
        if self.within is None:
            y_MN = self(x).flatten(0, -2)
            yield slice(0, len(y_MN)), Product(y_MN)
            return
        layer, dtype = self.layer, self.down.dtype
        assert isinstance(layer, QuantLinear)
        given = x if isinstance(x, Shared) else Shared(x)
        if self.prepared is not None:
            low = unfinished(rows_of(given), self.prepared[0], None)
        else:
            low = Product(F.linear(given.made(str(dtype), lambda x: x.to(dtype)), self.down).flatten(0, -2))
        q_MR, step_M1 = kernels.quantised(low)
        for part, p in layer.products(given):
            yield part, replace(p, side=Side(q_MR[part], step_M1[part], self.within))

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
    try:
        for name in sorted(names):
            path, _, kind = name.rpartition(".")
            module = model.get_submodule(path)
            if kind == "weight" and is_linear(module):
                undo.append(_wrap(model, path, name, loras))
            else:
                undo.append(_exchange(model.get_submodule(path), kind, _total(name, loras)))
    except BaseException:
        _undo_all(undo)
        raise
    return lambda: _undo_all(undo)


def _undo_all(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _wrap(model: nn.Module, path: str, name: str, loras: Sequence[tuple[Changes, float]]) -> Undo:
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
    down, up = _balanced(down, up, to=LANES if dtype == torch.bfloat16 else 1)
    side = SidePath(layer, down.to(device, dtype), up.to(device, dtype), dense)
    model.set_submodule(path, side)
    return lambda: model.set_submodule(path, layer)


def _balanced(down: Tensor, up: Tensor, to: int) -> tuple[Tensor, Tensor]:
    """The same product with rows of `down` about as long as the columns of `up`, whichever file they come from: 8 bits
    then do both justice. By powers of two, so nothing is rounded. With zeros to ranks a multiple of `to`."""
    ratio = torch.linalg.vector_norm(up.float(), dim=0) / torch.linalg.vector_norm(down.float(), dim=1)
    factor = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt().log2().round().exp2()
    more = -len(down) % to
    return F.pad(down * factor[:, None], (0, 0, 0, more)), F.pad(up / factor, (0, more))


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
