"""Write GGUF files: metadata as it is given, then tensor after tensor. `gguf` describes the format and reads it.

The order of tensors and keys is the order in which they were given. A file has its name only when it is complete:
until then it is `<name>.part` beside it.

No torch here either: tensors come as packed bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np

from mutoscope.engine.gguf import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    NUMBERS,
    STRING,
    VERSIONS,
    Array,
    Encoded,
    nbytes,
    type_name,
)

Data: TypeAlias = bytes | bytearray | memoryview | Array

_NUMBER_IDS = {dtype: type_id for type_id, dtype in NUMBERS.items()}


class _Pending(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int
    data: Data | Callable[[], Data]


class GGUFWriter:
    """Writes a GGUF file (version 3) tensor by tensor; memory holds one tensor at a time.

        writer = GGUFWriter(path, {"general.architecture": "wan"})
        writer.add("head.head.bias", (64,), GGMLType.F32, lambda: bias.numpy())
        writer.write()

    Metadata values: bool, int (u32 where it fits, else i32, u64 or i64), float (f32), str, list of one of
    these (integers as i32 where they fit, else i64), numpy scalar or 1-D array (the dtype decides), or an
    `Encoded` value taken from another file. The file appears under its name only when complete.
    """

    def __init__(
        self, path: str | os.PathLike[str], metadata: Mapping[str, object], alignment: int = DEFAULT_ALIGNMENT
    ) -> None:
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}, expected a power of two from 8 to {MAX_ALIGNMENT}")
        self.path = Path(path)
        self.alignment = alignment
        self._metadata = {key: value for key, value in metadata.items() if key != ALIGNMENT_KEY}
        if alignment != DEFAULT_ALIGNMENT:
            self._metadata[ALIGNMENT_KEY] = np.uint32(alignment)
        self._tensors: dict[str, _Pending] = {}

    def add(self, name: str, shape: tuple[int, ...], type_id: int, data: Data | Callable[[], Data]) -> None:
        """Declare a tensor; `shape` in torch order, `data` packed bytes or a function that makes them.

        Raises:
            GGUFError: unsupported type, or a last dimension that is not a whole number of blocks.
            ValueError: a name given twice, or a shape that no reader accepts.
        """
        if name in self._tensors:
            raise ValueError(f"tensor {name!r} was added twice")
        if len(shape) > MAX_DIMS or any(n < 1 for n in shape):
            raise ValueError(
                f"tensor {name!r} has shape {list(shape)}, expected up to {MAX_DIMS} dimensions >= 1"
            )
        self._tensors[name] = _Pending(name, tuple(shape), int(type_id), nbytes(type_id, shape), data)

    def write(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the file; `progress(done, of)` is called after each tensor with byte counts.

        Raises:
            ValueError: a tensor's data has not the declared size.
            OSError: the disk is full or the folder cannot be written. Nothing is left behind.
        """
        part = self.path.with_name(self.path.name + ".part")
        try:
            with part.open("wb") as stream:
                stream.write(self._header())
                self._write_data(stream, progress)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _header(self) -> bytes:
        out = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(self._tensors), len(self._metadata)))
        for key, value in self._metadata.items():
            type_id, payload = value if isinstance(value, Encoded) else _encode(key, value)
            out += _text(key) + struct.pack("<I", type_id) + payload
        offset = 0
        for name, shape, type_id, size, _ in self._tensors.values():
            out += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            out += struct.pack("<IQ", type_id, offset)
            offset += self._padded(size)
        return bytes(out.ljust(self._padded(len(out)), b"\0"))

    def _padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    def _write_data(self, stream: BinaryIO, progress: Callable[[int, int], None] | None) -> None:
        total = sum(tensor.nbytes for tensor in self._tensors.values())
        done = 0
        for tensor in self._tensors.values():
            data = tensor.data() if callable(tensor.data) else tensor.data
            view = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else memoryview(data)
            if view.nbytes != tensor.nbytes:
                raise ValueError(
                    f"tensor {tensor.name!r} {type_name(tensor.type_id)} {list(tensor.shape)} "
                    f"got {view.nbytes} bytes, expected {tensor.nbytes}"
                )
            stream.write(view)
            stream.write(bytes(self._padded(tensor.nbytes) - tensor.nbytes))
            done += tensor.nbytes
            if progress:
                progress(done, total)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encode(key: str, value: object) -> Encoded:
    """A Python or numpy value as GGUF stores it."""
    if isinstance(value, str):
        return Encoded(STRING, _text(value))
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return Encoded(ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_text, value)))
    number = _as_numpy(value)
    if number is None:
        raise TypeError(
            f"metadata {key!r} is {value!r:.80}; expected a number, a string or a flat list of these"
        )
    type_id = _NUMBER_IDS[number.dtype]
    if number.ndim == 0:
        return Encoded(type_id, number.tobytes())
    return Encoded(ARRAY, struct.pack("<IQ", type_id, number.size) + number.tobytes())


def _as_numpy(value: object) -> Array | None:
    """`value` as a little-endian array of 0 or 1 dimensions, or None where GGUF has no such type."""
    if isinstance(value, np.generic):  # np.float64 is also a float
        pass
    elif isinstance(value, bool | float):
        value = np.bool_(value) if isinstance(value, bool) else np.float32(value)
    elif isinstance(value, int):
        value = _smallest(value, value, "u4", "i4", "u8", "i8")
    elif isinstance(value, list):
        kinds = {type(item) for item in value}
        if kinds == {int}:
            dtype = _smallest(min(value), max(value), "i4", "i8", "u8")
            value = None if dtype is None else np.array(value, dtype.dtype)
        elif kinds == {bool} or kinds == {float}:
            value = np.array(value, bool if kinds == {bool} else np.float32)
    if not isinstance(value, np.generic | np.ndarray):
        return None
    array = np.asarray(value)
    dtype_le = array.dtype.newbyteorder("<")
    return array.astype(dtype_le) if array.ndim < 2 and dtype_le in _NUMBER_IDS else None


def _smallest(low: int, high: int, *dtypes: str) -> np.generic | None:
    """`low` as a scalar of the first dtype that holds both bounds."""
    for dtype in dtypes:
        bounds = np.iinfo(dtype)
        if bounds.min <= low and high <= bounds.max:
            return np.dtype(dtype).type(low)  # type: ignore[no-any-return]
    return None
