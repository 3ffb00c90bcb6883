"""Weight files to models: GGUF, safetensors or PyTorch checkpoints behind one face, without needless copies.

    open_weights(path) -> WeightSource      what a file holds, under the names it uses
    load_wan / load_vae / load_umt5         a model whose linear weights stay packed in the mapped files

A model is laid out without memory ("meta"), from the configuration that its shapes imply. Then every linear
layer gets its packed bytes and everything else, which is small, is converted. Each tensor must be used once;
what is missing, left over or of the wrong shape is an error that says so.

Details that have caused bugs:
- the same model circulates in official and diffusers naming, with or without a prefix (each model's file has
  `our_names`);
- `modulation` is stored as [6, D] or [1, 6, D], patch embeddings with 4 or 5 dimensions;
- what is not quantised may be F32, F16 or BF16, depending on the file that was converted;
- city96's unfinished conversions lack the 5-D patch embedding; VACE modules are also published without their
  base.
"""

from __future__ import annotations

import math
import mmap
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mutoscope.engine import umt5, vae, wan
from mutoscope.engine.devices import has_own_memory
from mutoscope.engine.gguf import GGUFFile, TensorInfo
from mutoscope.engine.headers import INCOMPLETE, file_kind, safetensors_header, shared_prefix
from mutoscope.engine.linear import (
    FLOATS,
    Packed,
    Precision,
    QuantEmbedding,
    QuantLinear,
    Unpacked,
    default_compute_dtype,
)
from mutoscope.engine.precision import REPACKED, chooser, read_sidecar, repacked
from mutoscope.engine.quants import as_tensor, workers
from mutoscope.engine.streaming import place_of
from mutoscope.errors import WeightError
from mutoscope.request import PrecisionName

_TYPE_OF = {dtype: type_id for type_id, dtype in FLOATS.items()}


# ---------------------------------------------------------------- files


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file; `read` gives its bytes, uint8 [nbytes], without copying them."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int
    path: Path
    read: Callable[[], Tensor]
    mapped: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def packed(self, shape: Sequence[int] | None = None) -> Packed:
        data = self.read()
        at = data.data_ptr() if self.mapped else 0
        return Packed(data, self.type_id, tuple(shape or self.shape), at)


@dataclass(frozen=True)
class WeightSource:
    """An open weight file. `tensors` in file order under the file's names, less a prefix shared by all."""

    path: Path
    kind: Literal["gguf", "safetensors", "pytorch"]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def open_weights(path: str | Path) -> WeightSource:
    """Open a file of tensors; its content decides what it is, not its name.

    Raises:
        FileError: the file is missing, damaged (GGUFError, WeightError) or none of the three kinds.
    """
    path = Path(path)
    kind: Literal["gguf", "safetensors", "pytorch"]
    found = file_kind(path)
    if found == "gguf":
        kind, metadata, tensors = "gguf", *_read_gguf(path)
    elif found == "safetensors":
        kind, metadata, tensors = "safetensors", *_read_safetensors(path)
    elif zipfile.is_zipfile(path):
        kind, metadata, tensors = "pytorch", *_read_pytorch(path)
    else:
        with path.open("rb") as stream:
            start = stream.read(4)
        raise WeightError(
            f"{path.name} starts with {start!r}: neither GGUF, safetensors nor a PyTorch checkpoint",
            hint=INCOMPLETE,
        )
    prefix = shared_prefix(t.name for t in tensors)
    return WeightSource(path, kind, metadata, {t.name.removeprefix(prefix): t for t in tensors})


def _read_gguf(path: Path) -> tuple[Mapping[str, Any], list[Stored]]:
    file = GGUFFile(path)

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: as_tensor(file.data(name))

    return file.metadata, [
        Stored(t.name, t.shape, t.type_id, t.nbytes, path, reader(t.name)) for t in file.tensors.values()
    ]


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], list[Stored]]:
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    metadata, tensors = safetensors_header(mapped, path.name)

    def reader(t: TensorInfo) -> Callable[[], Tensor]:
        return lambda: as_tensor(np.frombuffer(mapped, np.uint8, t.nbytes, t.offset))

    return metadata, [Stored(t.name, t.shape, t.type_id, t.nbytes, path, reader(t)) for t in tensors]


def _read_pytorch(path: Path) -> tuple[Mapping[str, Any], list[Stored]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightError(f"{path.name} cannot be read as a PyTorch checkpoint: {error}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightError(f"{path.name}: a {type(found).__name__}, expected a dictionary of tensors")

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor.flatten().view(torch.uint8)

    tensors = []
    for name, tensor in found.items():
        if tensor.dtype not in _TYPE_OF:
            raise WeightError(f"{path.name}: tensor {name!r} is {tensor.dtype}, expected 16/32-bit floats")
        type_id = _TYPE_OF[tensor.dtype]
        nbytes = tensor.numel() * tensor.itemsize
        tensors.append(Stored(name, tuple(tensor.shape), type_id, nbytes, path, reader(tensor), mapped=False))
    return {}, tensors


# ---------------------------------------------------------------- models


_Names = Callable[[Iterable[str]], dict[str, str]]


class _LaidOut(TorchFunctionMode):
    """Models made inside have no memory, and no numbers are drawn for them (drawing imports half of torch)."""

    def __enter__(self) -> _LaidOut:
        self._meta = torch.device("meta")
        self._meta.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._meta.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class _Supply:
    """The tensors of one model under our names; keeps account of what was taken."""

    def __init__(self, arch: str, sources: Sequence[WeightSource], our_names: _Names) -> None:
        self.arch = arch
        self.metadata: Mapping[str, Any] = ChainMap(*(s.metadata for s in reversed(sources)))
        self.tensors: dict[str, Stored] = {}
        for source in sources:
            for theirs, ours in our_names(source.tensors).items():
                tensor = source.tensors[theirs]
                if ours in self.tensors:
                    first = self.tensors[ours]
                    raise WeightError(
                        f"tensor {ours!r} is given twice: {first.name!r} in {first.path.name} "
                        f"and {tensor.name!r} in {source.path.name}",
                        hint="An overlay may only add tensors to its base file.",
                    )
                self.tensors[ours] = tensor
        self.files = ", ".join(sorted({t.path.name for t in self.tensors.values()})) or "no file"
        self._left = dict(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def take(self, name: str, expected: Sequence[int]) -> Packed:
        """The tensor for a parameter of shape `expected`, give or take dimensions of 1 and folded patches."""
        tensor = self._left.pop(name)
        if not _same_layout(name, tensor.shape, tuple(expected)):
            raise WeightError(
                f"{name}: shape {list(tensor.shape)} but {list(expected)} expected "
                f"(file {tensor.path.name}, arch {self.arch})"
            )
        return tensor.packed(expected)

    def require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise WeightError(
                f"{_some(missing)} missing (file {self.files}, arch {self.arch})",
                hint="The file is incomplete or of another model.",
            )

    def finish(self) -> None:
        if self._left:
            hint = "The file is of another model."
            if any(name.startswith("img_emb.") or ".k_img." in name for name in self._left):
                hint = "This is an image-to-video checkpoint; use a text-to-video or VACE one."
            message = f"{_some(list(self._left))} unknown (file {self.files}, arch {self.arch})"
            raise WeightError(message, hint=hint)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}"


def _same_layout(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if name.endswith("patch_embedding.weight"):
        return math.prod(got) == math.prod(expected) and got[-2:] == expected[-2:]
    return tuple(n for n in got if n != 1) == tuple(n for n in expected if n != 1)


def _parameter(values: Tensor, device: torch.device) -> nn.Parameter:
    """A copy of its own, so that small tensors keep no mapped page alive."""
    return nn.Parameter(values.to(device, copy=True), requires_grad=False)


def _fill(
    model: nn.Module,
    supply: _Supply,
    device: torch.device,
    precision_of: Callable[[str, Packed], Precision],
    repack: Callable[[Packed], Packed] | None = None,
) -> None:
    """Give every layer of a meta-device model its weights: packed where large, float32 elsewhere.

    On a device with memory of its own, large ones stay on the host (see `streaming.place_of`).
    repack: packs the linear weights of its blocks anew.
    """

    def small(name: str, shape: Sequence[int]) -> nn.Parameter:
        return _parameter(supply.take(name, shape).values(torch.float32), device)

    supply.require(name for name, _ in model.named_parameters())
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = supply.take(f"{path}.weight", module.weight.shape)
            if repack is not None and "blocks." in path:
                weight = repack(weight)
            if not has_own_memory(device) or place_of(path) == "stays":
                weight = weight.to(device)
            bias = None if module.bias is None else small(f"{path}.bias", module.bias.shape).data
            model.set_submodule(path, QuantLinear(weight, bias, precision_of(path, weight), device))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(path, QuantEmbedding(supply.take(f"{path}.weight", module.weight.shape)))
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, small(f"{path}.{name}", parameter.shape))
    supply.finish()
    model.requires_grad_(False).eval()


def load_wan(
    paths: str | Path | Sequence[str | Path],
    *,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    precision: PrecisionName = "auto",
    sidecar: bool = True,
) -> wan.WanModel:
    """The diffusion transformer of one file, several shards, or a base file with VACE modules on top.

    Linear weights stay packed and run as `precision` says, or all in `compute_dtype` if that is given, except the
    parts that `WanModel.FLOAT32` lists; all else is float32. `sidecar`: whether to follow that of the first file.

    Raises:
        WeightError: the tensors do not make up a Wan 2.1 model. FileError: its sidecar is of another file.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    device = torch.device(device)
    supply = _Supply("wan", [open_weights(p) for p in paths], wan.our_names)
    if "patch_embedding.weight" not in supply.tensors:
        if "blocks.0.modulation" in supply.tensors:
            raise WeightError(
                f"{supply.files}: tensor 'patch_embedding.weight' is missing from a Wan model",
                hint="The conversion was not finished (its 5-D tensors were never added); get another file.",
            )
        if "vace_patch_embedding.weight" in supply.tensors:
            raise WeightError(
                f"{supply.files}: these are VACE modules without the model they extend",
                hint="Give the text-to-video file of the same size too.",
            )
    config = wan.WanConfig.from_tensors(supply.shapes, supply.metadata)
    supply.arch = "wan_vace" if config.vace_layers else "wan_t2v"
    with _LaidOut():
        model = wan.WanModel(config)
    found = read_sidecar(Path(paths[0])) if sidecar else None
    choose = chooser(compute_dtype or precision, device, found["bf16"] if found else ())
    type_id = REPACKED.get(precision)
    if type_id is None:
        _fill(model, supply, device, choose)
    else:
        with workers() as pool:
            _fill(model, supply, device, choose, partial(repacked, type_id=type_id, pool=pool))
    return model


def load_umt5(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    drop: bool = False,
) -> tuple[umt5.UMT5Encoder, Mapping[str, Any]]:
    """The text encoder and its file's metadata (which holds the tokenizer, in a GGUF file).

    drop: let go of each weight's pages of the file after use, so that 6 GB of them never count as this process's
    memory. That takes half as long as a short prompt's products.

    Raises:
        WeightError: the tensors do not make up a UMT5 encoder.
    """
    device = torch.device(device)
    if compute_dtype is None:
        compute_dtype = default_compute_dtype(device)
    if compute_dtype == torch.float16:
        compute_dtype = torch.float32  # the numbers of T5 do not fit into float16
    source = open_weights(path)
    supply = _Supply("umt5", [source], umt5.our_names)
    config = umt5.UMT5Config.from_tensors(supply.shapes, supply.metadata)
    with _LaidOut():
        model = umt5.UMT5Encoder(config)
    precision = Unpacked(compute_dtype, drop=drop)
    _fill(model, supply, device, lambda path, weight: precision)
    return model, source.metadata


@dataclass(frozen=True)
class _VAEPart:
    """A parameter of a VAE that is laid out, and where its numbers are."""

    module: nn.Module
    name: str
    packed: Packed
    dtype: torch.dtype
    trimmable: bool


def _vae_parts(path: str | Path, dtype: torch.dtype) -> tuple[vae.WanVAE, list[_VAEPart]]:
    """A VAE without numbers, and all that has to be filled in."""
    supply = _Supply("wan_vae", [open_weights(path)], vae.our_names)
    if "decoder.upsamples.0.upsamples.0.residual.0.gamma" in supply.tensors:
        raise WeightError(f"{supply.files} is a Wan 2.2 VAE, expected one of Wan 2.1")
    config = vae.VAEConfig.from_tensors(supply.shapes, supply.metadata)
    with _LaidOut():
        model = vae.WanVAE(config)
    supply.require(name for name, _ in model.named_parameters())
    resampling = {id(m.time_conv) for m in model.modules() if isinstance(m, vae.Downsample | vae.Upsample)}
    parts = []
    for module_name, module in model.named_modules():
        trimmable = isinstance(module, vae.CausalConv3d) and id(module) not in resampling
        kept = torch.float32 if isinstance(module, vae.RMSNorm) else dtype
        for name, parameter in module.named_parameters(recurse=False):
            full, shape = f"{module_name}.{name}", parameter.shape
            stored = supply.tensors[full].shape
            if trimmable and len(stored) == 5 and stored[2] == 1:
                shape = (*shape[:2], 1, *shape[3:])
            parts.append(_VAEPart(module, name, supply.take(full, shape), kept, trimmable))
    supply.finish()
    return model, parts


def check_vae(path: str | Path, *, compute_dtype: torch.dtype) -> tuple[vae.VAEConfig, int]:
    """What `load_vae` would give, without reading numbers: its configuration, and the most it takes in bytes.

    Raises what `load_vae` raises.
    """
    model, parts = _vae_parts(path, compute_dtype)
    return model.config, sum(part.packed.numel * part.dtype.itemsize for part in parts)


def load_vae(
    path: str | Path, *, device: str | torch.device = "cpu", compute_dtype: torch.dtype | None = None
) -> vae.WanVAE:
    """The VAE, convolutions in `compute_dtype` (default: `default_compute_dtype`), norms in float32.

    A convolution whose taps on earlier frames are all zero, or were never stored, becomes a spatial one.

    Raises:
        WeightError: the tensors do not make up a Wan 2.1 VAE.
    """
    device = torch.device(device)
    model, parts = _vae_parts(path, compute_dtype or default_compute_dtype(device))
    for part in parts:
        values = part.packed.values(part.dtype)
        if part.trimmable and values.ndim == 5 and not values[:, :, :-1].any():
            values = values[:, :, -1:].contiguous()
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.ndim)
        if layout is not None and device.type == "cpu":  # activations follow; a tenth faster
            values = values.contiguous(memory_format=layout)
        setattr(part.module, part.name, _parameter(values, device))
    return model.requires_grad_(False).eval()
