"""GGUF files: the format, and a memory-mapped reader that trusts nothing. `gguf_writer` writes them.

Format: ggml docs/gguf.md, versions 2 and 3, little endian.

    "GGUF"  u32 version  u64 n_tensors  u64 n_metadata
    n_metadata * (string key, u32 value type, value)
    n_tensors  * (string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset)
    padding to `general.alignment` (32), then tensor data, every tensor at a multiple of the alignment

A string is a u64 length and that many bytes of UTF-8. An array is a u32 element type, a u64 count and
the elements. Dimensions are stored fastest first; here shapes are in torch order (fastest last).

Details that have caused bugs elsewhere:
- Wan patch embeddings have 5 dimensions although ggml stops at 4.
- umt5 tokenizers hold 256,384 strings: opening must only step over them.
- Files made with ComfyUI's tools may reshape a tensor and keep the true shape in
  `comfy.gguf.orig_shape.<tensor>`.
- Counts and lengths come from strangers; nothing is allocated before it is known to fit the file.

No torch here: the file knows bytes, `quants` knows numbers.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from mutoscope.errors import GGUFError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 8

# Far above any real file; a hostile one stops here within a fraction of a second.
MAX_HEADER_BYTES = 256 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NAME_BYTES = (1 << 16) - 1
MAX_ALIGNMENT = 1 << 20

Array: TypeAlias = npt.NDArray[Any]
Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | list[str] | Array


class GGMLType(IntEnum):
    """Tensor types that can be read, by their number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    BF16 = 30


class Block(NamedTuple):
    """`elements` consecutive values of the last dimension are stored in `nbytes` bytes."""

    elements: int
    nbytes: int


BLOCKS: dict[int, Block] = {
    GGMLType.F32: Block(1, 4),
    GGMLType.F16: Block(1, 2),
    GGMLType.Q4_0: Block(32, 18),
    GGMLType.Q4_1: Block(32, 20),
    GGMLType.Q5_0: Block(32, 22),
    GGMLType.Q5_1: Block(32, 24),
    GGMLType.Q8_0: Block(32, 34),
    GGMLType.Q2_K: Block(256, 84),
    GGMLType.Q3_K: Block(256, 110),
    GGMLType.Q4_K: Block(256, 144),
    GGMLType.Q5_K: Block(256, 176),
    GGMLType.Q6_K: Block(256, 210),
    GGMLType.IQ4_NL: Block(32, 18),
    GGMLType.IQ4_XS: Block(256, 136),
    GGMLType.I8: Block(1, 1),
    GGMLType.I16: Block(1, 2),
    GGMLType.I32: Block(1, 4),
    GGMLType.I64: Block(1, 8),
    GGMLType.BF16: Block(1, 2),
}

# Only for the error message.
_UNSUPPORTED = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip

# Types of metadata values by their number in the file, and how numbers are stored.
STRING, ARRAY = 8, 9
_BOOL, _FLOAT32, _UINT32 = 7, 6, 4
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    _UINT32: np.dtype("<u4"),
    5: np.dtype("<i4"),
    _FLOAT32: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

ALIGNMENT_KEY = "general.alignment"
_ORIG_SHAPE = "comfy.gguf.orig_shape."
_INCOMPLETE = "The file is probably incomplete; download it again."
_DAMAGED = "The file is damaged; download it again."

# What people pass instead of a GGUF file, by its first bytes.
_NOT_GGUF = {
    b"version https://git-lfs": "It is a Git LFS pointer, not the file itself; run `git lfs pull`.",
    b"PK\x03\x04": "It is a zip archive or a PyTorch checkpoint; GGUF files come from a converter.",
    b"<": "It looks like a web page; use the file's direct download link.",
    b"ggml": "It is a GGML file from before GGUF; look for a newer conversion.",
    b"FUGG": "It is a big-endian GGUF file; only little endian is supported.",
}


def type_name(type_id: int) -> str:
    """`Q4_K` for 12; also names the types that cannot be read."""
    return GGMLType(type_id).name if type_id in BLOCKS else _UNSUPPORTED.get(type_id, "unknown")


def nbytes(type_id: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of torch-order `shape`.

    Raises:
        GGUFError: the type is not supported, or the last dimension is not a whole number of blocks.
    """
    if type_id not in BLOCKS:
        raise GGUFError(
            f"tensor type {type_id} ({type_name(type_id)}) is not supported.",
            hint=f"Choose a file with one of {', '.join(t.name for t in GGMLType)}.",
        )
    block = BLOCKS[type_id]
    columns = shape[-1] if shape else 1
    if columns % block.elements:
        raise GGUFError(
            f"last dimension {columns} of shape {list(shape)} is not a multiple of the "
            f"{type_name(type_id)} block of {block.elements}"
        )
    return math.prod(shape) // block.elements * block.nbytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in its file: `shape` in torch order, `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return type_name(self.type_id)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Encoded(NamedTuple):
    """A metadata value exactly as it stands in a file: type number and bytes. Copies without decoding."""

    type_id: int
    payload: bytes


class _Cursor:
    """Reads the header front to back; every step is checked against the end of the file."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.pos = 0
        self.end = min(len(buffer), MAX_HEADER_BYTES)
        self.n_strings = 0

    def fail(self, message: str, *, at: int | None = None, hint: str = _DAMAGED) -> NoReturn:
        raise GGUFError(f"{self.path.name}, byte {self.pos if at is None else at}: {message}.", hint=hint)

    def skip(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes`; returns where they start."""
        start = self.pos
        if n_bytes > self.end - start:
            if self.end < len(self.buffer):
                self.fail(f"{what} needs {n_bytes} bytes, but a header may have {MAX_HEADER_BYTES} at most")
            self.fail(f"{what} needs {n_bytes} bytes, but {self.end - start} are left", hint=_INCOMPLETE)
        self.pos = start + n_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.buffer, self.skip(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.buffer, self.skip(8, what))[0]
        return value

    def count(self, what: str, limit: int) -> int:
        at = self.pos
        value = self.u64(what)
        if value > limit:
            self.fail(f"{what} is {value}, but {limit} is the most that is accepted", at=at)
        return value

    def text(self, what: str) -> str:
        at = self.pos
        n_bytes = self.u64(f"length of {what}")
        start = self.skip(n_bytes, what)
        try:
            return self.buffer[start : self.pos].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason})", at=at)

    def name(self, what: str) -> str:
        at = self.pos
        text = self.text(what)
        if not 0 < len(text) <= MAX_NAME_BYTES:
            self.fail(f"{what} has {len(text)} characters, expected 1 to {MAX_NAME_BYTES}", at=at)
        return text

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings. The one loop whose speed matters: 256k turns for a umt5 tokenizer."""
        if self.n_strings + count > MAX_STRINGS:
            self.fail(f"{what} has {count} strings, but {MAX_STRINGS} in all is the most that is accepted")
        self.n_strings += count
        unpack, buffer, end, pos = _U64.unpack_from, self.buffer, self.end, self.pos
        for i in range(count):
            if pos + 8 > end or (n_bytes := unpack(buffer, pos)[0]) > end - pos - 8:
                self.fail(f"string {i} of {count} of {what} runs past the end", at=pos, hint=_INCOMPLETE)
            pos += 8 + n_bytes
        self.pos = pos


class _Slot(NamedTuple):
    """Where a metadata value lies. `item` is the element type of an array, None for a scalar."""

    type_id: int
    item: int | None
    length: int
    start: int  # of the value, behind its type number
    items: int  # of the first array element
    end: int


class Metadata(Mapping[str, Value]):
    """The key-value part of a file. Scalars and strings are checked on opening, arrays decode when asked.

    Arrays of numbers come as read-only numpy views into the file, arrays of strings as lists (kept once
    decoded).
    """

    def __init__(self, cursor: _Cursor, n_keys: int) -> None:
        self._buffer = cursor.buffer
        self._path = cursor.path
        self._slots: dict[str, _Slot] = {}
        self._values: dict[str, Value] = {}
        for _ in range(n_keys):
            at = cursor.pos
            key = cursor.name("metadata key")
            if key in self._slots:
                cursor.fail(f"metadata key {key!r} appears twice", at=at)
            self._slots[key] = self._step(cursor, key)

    def _step(self, cursor: _Cursor, key: str) -> _Slot:
        at = cursor.pos
        what = f"value of {key!r}"
        type_id, item, count = cursor.u32(f"type of {key!r}"), None, 1
        start = items = cursor.pos
        if type_id == STRING:
            self._values[key] = cursor.text(what)
        elif type_id in NUMBERS:
            cursor.skip(NUMBERS[type_id].itemsize, what)
            self._values[key] = self._numbers(cursor, key, type_id, start, 1)[0].item()
        elif type_id == ARRAY:
            item = cursor.u32(f"element type of {key!r}")
            count = cursor.u64(f"length of {key!r}")
            items = cursor.pos
            if item == STRING:
                cursor.skip_strings(count, what)
            elif item in NUMBERS:
                cursor.skip(count * NUMBERS[item].itemsize, what)
                self._numbers(cursor, key, item, items, count)
            else:
                problem = "an array of arrays" if item == ARRAY else f"an array of unknown type {item}"
                cursor.fail(f"{what} is {problem}, expected numbers or strings", at=at)
        else:
            cursor.fail(f"{what} has unknown type {type_id}, expected 0 to 12", at=at)
        return _Slot(type_id, item, count, start, items, cursor.pos)

    def _numbers(self, cursor: _Cursor, key: str, type_id: int, start: int, count: int) -> Array:
        if type_id == _BOOL:
            raw = np.frombuffer(self._buffer, np.uint8, count, start)
            if count and raw.max() > 1:
                cursor.fail(f"value of {key!r} has a boolean of {raw.max()}, expected 0 or 1", at=start)
        return np.frombuffer(self._buffer, NUMBERS[type_id], count, start)

    def _strings(self, key: str, slot: _Slot) -> list[str]:
        unpack, buffer, pos = _U64.unpack_from, self._buffer, slot.items
        out = []
        try:
            for _ in range(slot.length):
                start = pos + 8
                pos = start + unpack(buffer, pos)[0]
                out.append(buffer[start:pos].decode("utf-8"))
        except UnicodeDecodeError as error:
            where = f"{self._path.name}, byte {start}"
            message = f"{where}: string {len(out)} of {key!r} is not UTF-8 ({error.reason})."
            raise GGUFError(message, hint=_DAMAGED) from None
        return out

    def __getitem__(self, key: str) -> Value:
        if key in self._values:
            return self._values[key]
        slot = self._slots[key]
        assert slot.item is not None
        if slot.item != STRING:
            return np.frombuffer(self._buffer, NUMBERS[slot.item], slot.length, slot.items)
        value = self._values[key] = self._strings(key, slot)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def encoded(self, key: str) -> Encoded:
        """The value as stored, for writing it into another file unchanged."""
        slot = self._slots[key]
        return Encoded(slot.type_id, self._buffer[slot.start : slot.end])

    def type_of(self, key: str) -> int:
        """The number of the value's type in the file (4 is u32, 8 is string, 9 is array ...)."""
        return self._slots[key].type_id


class GGUFFile:
    """An open GGUF file. Tensor data stays in the file; `data` hands out views of the memory map.

        with GGUFFile(path) as file:
            info = file.tensors["blocks.0.self_attn.q.weight"]
            packed = file.data(info.name)                        # uint8 [info.nbytes]

    `tensors` is in the order of the file. Truncating the file while it is open crashes the process, as with
    every memory map.

    Raises:
        GGUFError: the file cannot be opened, is damaged, incomplete or of an unsupported kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                self.size_bytes = os.fstat(stream.fileno()).st_size
                if self.size_bytes < 24:
                    raise GGUFError(
                        f"{self.path.name}: got {self.size_bytes} bytes, but the shortest GGUF file has 24.",
                        hint=_INCOMPLETE,
                    )
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise GGUFError(f"{self.path} cannot be opened: {error.strerror or error}") from error
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        cursor = _Cursor(self._map, self.path)
        start = self._map[:32]
        if start[:4] != MAGIC:
            hints = (hint for magic, hint in _NOT_GGUF.items() if start.startswith(magic))
            message = f"starts with {start[:4]!r}, expected {MAGIC!r}: not a GGUF file"
            cursor.fail(message, hint=next(hints, "Check the file's name."))
        cursor.skip(4, "magic")
        self.version = cursor.u32("version")
        if self.version and not self.version & 0xFFFF:
            cursor.fail("big-endian file, expected little endian", at=4, hint="Look for another conversion.")
        if self.version not in VERSIONS:
            cursor.fail(f"version {self.version}, expected 2 or 3", at=4, hint="Look for another conversion.")
        n_tensors = cursor.count("number of tensors", MAX_TENSORS)
        n_keys = cursor.count("number of metadata keys", MAX_KEYS)
        self.metadata = Metadata(cursor, n_keys)
        self.alignment = self._alignment(cursor)
        rows = [self._tensor_info(cursor) for _ in range(n_tensors)]
        data_start = -(-cursor.pos // self.alignment) * self.alignment
        for at, info in rows:
            self._place(cursor, at, info, data_start)
        self._refuse_overlap(cursor)

    def _alignment(self, cursor: _Cursor) -> int:
        value = self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if ALIGNMENT_KEY in self.metadata and self.metadata.type_of(ALIGNMENT_KEY) != _UINT32:
            cursor.fail(f"{ALIGNMENT_KEY} is a {type(value).__name__}, expected a u32")
        assert isinstance(value, int)
        if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            cursor.fail(f"{ALIGNMENT_KEY} is {value}, expected a power of two from 8 to {MAX_ALIGNMENT}")
        return value

    def _tensor_info(self, cursor: _Cursor) -> tuple[int, TensorInfo]:
        at = cursor.pos
        name = cursor.name("tensor name")
        n_dims = cursor.u32(f"number of dimensions of {name!r}")
        if n_dims > MAX_DIMS:
            cursor.fail(f"tensor {name!r} has {n_dims} dimensions, expected {MAX_DIMS} at most", at=at)
        stored = struct.unpack_from(f"<{n_dims}Q", self._map, cursor.skip(8 * n_dims, f"shape of {name!r}"))
        shape = tuple(reversed(stored))
        if 0 in shape:
            cursor.fail(f"tensor {name!r} has an empty dimension in shape {list(shape)}", at=at)
        type_id = cursor.u32(f"type of {name!r}")
        offset = cursor.u64(f"offset of {name!r}")
        try:
            size = nbytes(type_id, shape)
        except GGUFError as error:
            cursor.fail(f"tensor {name!r}: {error.message.rstrip('.')}", at=at, hint=error.hint or _DAMAGED)
        return at, TensorInfo(name, shape, type_id, offset, size)

    def _place(self, cursor: _Cursor, at: int, info: TensorInfo, data_start: int) -> None:
        """Check one tensor against the file and enter it, with its absolute offset and original shape."""
        if info.name in self.tensors:
            cursor.fail(f"tensor {info.name!r} appears twice", at=at)
        if info.offset % self.alignment:
            cursor.fail(
                f"tensor {info.name!r} has offset {info.offset}, expected a multiple of {self.alignment}",
                at=at,
            )
        offset = data_start + info.offset
        if offset + info.nbytes > self.size_bytes:
            cursor.fail(
                f"tensor {info.name!r} {info.type_name} {list(info.shape)} ends at byte "
                f"{offset + info.nbytes}, but the file has {self.size_bytes}",
                at=at,
                hint=_INCOMPLETE,
            )
        shape = self._original_shape(cursor, at, info)
        self.tensors[info.name] = TensorInfo(info.name, shape, info.type_id, offset, info.nbytes)

    def _original_shape(self, cursor: _Cursor, at: int, info: TensorInfo) -> tuple[int, ...]:
        value = self.metadata.get(_ORIG_SHAPE + info.name)
        if value is None:
            return info.shape
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) > MAX_DIMS:
            cursor.fail(f"{_ORIG_SHAPE}{info.name} is not a list of up to {MAX_DIMS} integers", at=at)
        shape = tuple(int(n) for n in value)
        if any(n <= 0 for n in shape) or math.prod(shape) != info.numel:
            cursor.fail(
                f"{_ORIG_SHAPE}{info.name} is {list(shape)}, but the tensor has {info.numel} elements", at=at
            )
        return shape

    def _refuse_overlap(self, cursor: _Cursor) -> None:
        by_offset = sorted(self.tensors.values(), key=lambda info: info.offset)
        for first, second in pairwise(by_offset):
            if first.offset + first.nbytes > second.offset:
                cursor.fail(f"tensors {first.name!r} and {second.name!r} share bytes", at=second.offset)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The packed bytes of a tensor, uint8 [nbytes]: a read-only view, no copy.

        Raises:
            GGUFError: there is no such tensor, or the file is closed.
        """
        if self._map.closed:
            raise GGUFError(f"{self.path.name}: read of {name!r} from a closed file")
        if name not in self.tensors:
            raise GGUFError(f"{self.path.name}: no tensor {name!r} among {len(self.tensors)}")
        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)

    def close(self) -> None:
        """Unmap the file. Views handed out before keep it mapped until they are gone."""
        with contextlib.suppress(BufferError):  # raised while a view is in use; the map goes with it
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
