"""The beginning of a weight file: names, shapes, types and places of its tensors, and metadata. No torch.

    read_header(path) -> Header        GGUF or safetensors, by its content

A PyTorch checkpoint has no header that could be read without running its pickle; `weights.open_weights` opens those.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from mutoscope.engine.gguf import BLOCKS, GGMLType, GGUFFile, TensorInfo
from mutoscope.errors import FileError, WeightError

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "vae.", "model.")
"""What other programs put before every name of a file."""

INCOMPLETE = "The file is probably incomplete; download it again."
MAX_SAFETENSORS_HEADER_BYTES = 100 << 20  # the limit of the format's own reader
_SAFETENSORS = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}


@dataclass(frozen=True)
class Header:
    """`tensors` in file order under the file's names, less a prefix shared by all."""

    path: Path
    kind: Literal["gguf", "safetensors"]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def file_kind(path: Path) -> Literal["gguf", "safetensors", ""]:
    """By the first bytes; "" for all other files.

    Raises:
        FileError: the file cannot be opened.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise FileError(f"{path} cannot be opened: {error.strerror or error}") from error
    if start.startswith(b"GGUF"):
        return "gguf"
    return "safetensors" if start[8:9] == b"{" else ""


def read_header(path: str | Path) -> Header:
    """Read and check a header; no tensor data is read.

    Raises:
        FileError: the file is missing, damaged (GGUFError, WeightError) or neither GGUF nor safetensors.
    """
    path = Path(path)
    kind = file_kind(path)
    metadata: Mapping[str, Any]
    if kind == "gguf":
        file = GGUFFile(path)
        tensors, metadata = list(file.tensors.values()), file.metadata
    elif kind == "safetensors":
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            metadata, tensors = safetensors_header(mapped, path.name)
    else:
        raise WeightError(
            f"{path.name}: neither GGUF nor safetensors", hint="PyTorch checkpoints can be converted to them."
        )
    prefix = shared_prefix(t.name for t in tensors)
    return Header(path, kind, metadata, {t.name.removeprefix(prefix): t for t in tensors})


def shared_prefix(names: Iterable[str]) -> str:
    """The one of `PREFIXES` that all names begin with, or nothing."""
    known = list(names)
    return next((p for p in PREFIXES if known and all(name.startswith(p) for name in known)), "")


def safetensors_header(mapped: mmap.mmap, name: str) -> tuple[dict[str, Any], list[TensorInfo]]:
    """8 bytes of header length, a JSON header, then data (https://github.com/huggingface/safetensors#format).

    Metadata values are strings in this format; those that are JSON are decoded. `name` is for messages.

    Raises:
        WeightError: damaged, or of a type that cannot be read.
    """

    def fail(message: str, hint: str = INCOMPLETE) -> NoReturn:
        raise WeightError(f"{name}: {message}", hint=hint)

    header_bytes = int.from_bytes(mapped[:8], "little")
    data_start = 8 + header_bytes
    if header_bytes > MAX_SAFETENSORS_HEADER_BYTES or data_start > len(mapped):
        fail(f"header of {header_bytes} bytes in a file of {len(mapped)}")
    try:
        header: dict[str, Any] = json.loads(mapped[8:data_start])
    except (ValueError, RecursionError) as error:
        fail(f"header is not JSON ({error})")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail("metadata is malformed, expected strings under names")
    tensors = []
    for tensor, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            start, stop = (data_start + int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            fail(f"entry of tensor {tensor!r} is malformed ({error!r})")
        if dtype not in _SAFETENSORS:
            fail(f"tensor {tensor!r} is stored as {dtype}, expected one of {', '.join(_SAFETENSORS)}",
                 hint="Choose the 16-bit or a GGUF version of this model.")  # fmt: skip
        type_id = _SAFETENSORS[dtype]
        nbytes = math.prod(shape) * BLOCKS[type_id].nbytes
        sound = all(n >= 0 for n in shape) and data_start <= start <= stop <= len(mapped)
        if not sound or stop - start != nbytes:
            fail(f"tensor {tensor!r} {dtype} {list(shape)} has bytes {start} to {stop} of {len(mapped)}")
        tensors.append(TensorInfo(tensor, shape, type_id, start, nbytes))
    return {key: _decoded(value) for key, value in metadata.items()}, tensors


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
