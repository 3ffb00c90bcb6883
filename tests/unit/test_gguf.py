"""GGUF files: both directions against gguf-py, and every way a file can be wrong."""

from __future__ import annotations

import importlib.util
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from mutoscope.engine.gguf import (
    BLOCKS,
    MAX_HEADER_BYTES,
    Encoded,
    GGMLType,
    GGUFFile,
    nbytes,
    type_name,
)
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.errors import GGUFError

METADATA = {
    "general.architecture": "wan",
    "a.bool": True,
    "a.u32": 2**32 - 1,
    "a.i32": -5,
    "a.u64": 2**63,
    "a.i64": -(2**40),
    "a.float": 0.5,
    "a.text": "größer 影",
    "a.empty": "",
    "a.u8": np.uint8(7),
    "a.f64": np.float64(1e300),
    "an.strings": ["", "a", "▁影"],
    "an.ints": [1, -2, 3],
    "an.i64s": [2**40, -1],
    "an.floats": [1.5, -0.25],
    "an.bools": [True, False],
    "an.u8s": np.arange(5, dtype=np.uint8),
    "an.empty": np.array([], np.int32),
}


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


# ---------------------------------------------------------------- raw files, piece by piece


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def text(raw: bytes) -> bytes:
    return u64(len(raw)) + raw


def head(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(n_tensors, n_keys)


def key(name: bytes, type_id: int, value: bytes) -> bytes:
    return text(name) + u32(type_id) + value


def info(name: bytes, dims: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + u64(*dims) + u32(type_id) + u64(offset)


def with_data(raw: bytes, n_bytes: int = 64) -> bytes:
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(n_bytes)


def one(name: bytes = b"x", dims: tuple[int, ...] = (4,), type_id: int = 0, offset: int = 0) -> bytes:
    return with_data(head(1) + info(name, dims, type_id, offset))


ALIGN = b"general.alignment"
ORIG = b"comfy.gguf.orig_shape.x"

BROKEN = {
    # what is wrong: (bytes, part of the message)
    "empty": (b"", "got 0 bytes, but the shortest GGUF file has 24"),
    "short": (head()[:23], "got 23 bytes"),
    "magic": (bytes(64), r"byte 0: starts with b'\x00\x00\x00\x00', expected b'GGUF'"),
    "zip": (b"PK\x03\x04" + bytes(64), "It is a zip archive or a PyTorch checkpoint"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(64), "It looks like a web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "It is a Git LFS pointer"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte 4: big-endian file"),
    "version 0": (head(version=0), "byte 4: version 0, expected 2 or 3"),
    "version 1": (head(version=1), "byte 4: version 1, expected 2 or 3"),
    "version 4": (head(version=4), "byte 4: version 4, expected 2 or 3"),
    "too many tensors": (head(2**63), f"byte 8: number of tensors is {2**63}, but"),
    "too many keys": (head(0, 2**64 - 1), f"byte 16: number of metadata keys is {2**64 - 1}, but"),
    "missing tensors": (head(3), "byte 24: length of tensor name needs 8 bytes, but 0 are left"),
    "missing keys": (head(0, 1), "byte 24: length of metadata key needs 8 bytes, but 0 are left"),
    "long key": (head(0, 1) + u64(2**60) + b"abc", f"metadata key needs {2**60} bytes, but 3 are left"),
    "empty key": (head(0, 1) + key(b"", 4, u32(1)), "metadata key has 0 characters, expected 1 to 65535"),
    "key not UTF-8": (head(0, 1) + key(b"\xff\xfe", 4, u32(1)), "metadata key is not UTF-8"),
    "key twice": (head(0, 2) + key(b"a", 4, u32(1)) * 2, "byte 41: metadata key 'a' appears twice"),
    "value type": (head(0, 1) + key(b"a", 13, u32(1)), "value of 'a' has unknown type 13, expected 0 to 12"),
    "value cut": (head(0, 1) + key(b"a", 10, u32(1)), "value of 'a' needs 8 bytes, but 4 are left"),
    "boolean": (head(0, 1) + key(b"a", 7, b"\2"), "value of 'a' has a boolean of 2, expected 0 or 1"),
    "text length": (head(0, 1) + key(b"a", 8, u64(9) + b"abc"), "value of 'a' needs 9 bytes, but 3 are left"),
    "text not UTF-8": (head(0, 1) + key(b"a", 8, text(b"\x80")), "value of 'a' is not UTF-8"),
    "nested": (head(0, 1) + key(b"a", 9, u32(9) + u64(1)), "value of 'a' is an array of arrays"),
    "element type": (head(0, 1) + key(b"a", 9, u32(77) + u64(1)), "an array of unknown type 77"),
    "array length": (
        head(0, 1) + key(b"a", 9, u32(6) + u64(2**62)),
        f"value of 'a' needs {2**64} bytes, but 0 are left",
    ),
    "array boolean": (head(0, 1) + key(b"a", 9, u32(7) + u64(2) + b"\1\3"), "boolean of 3"),
    "string count": (head(0, 1) + key(b"a", 9, u32(8) + u64(2**40)), f"value of 'a' has {2**40} strings"),
    "string cut": (
        head(0, 1) + key(b"a", 9, u32(8) + u64(2) + text(b"ok") + u64(2**63)),
        "string 1 of 2 of value of 'a' runs past the end",
    ),
    "alignment type": (head(0, 1) + key(ALIGN, 10, u64(32)), "general.alignment is a int, expected a u32"),
    "alignment 0": (head(0, 1) + key(ALIGN, 4, u32(0)), "general.alignment is 0, expected a power of two"),
    "alignment 24": (head(0, 1) + key(ALIGN, 4, u32(24)), "general.alignment is 24, expected a power of two"),
    "alignment 2^31": (head(0, 1) + key(ALIGN, 4, u32(2**31)), f"general.alignment is {2**31}, expected"),
    "tensor name": (one(b""), "tensor name has 0 characters"),
    "tensor UTF-8": (one(b"\xc0"), "tensor name is not UTF-8"),
    "dimensions": (one(dims=(1,) * 9), "tensor 'x' has 9 dimensions, expected 8 at most"),
    "many dimensions": (with_data(head(1) + text(b"x") + u32(2**32 - 1)), "has 4294967295 dimensions"),
    "empty dimension": (one(dims=(4, 0)), "tensor 'x' has an empty dimension in shape [0, 4]"),
    "huge": (one(dims=(2**63, 2**63)), f"ends at byte {96 + 4 * 2**126}, but the file has 160"),
    "wrap to zero": (one(dims=(2**32, 2**32)), f"ends at byte {96 + 4 * 2**64}, but"),
    "known type": (one(type_id=16), "tensor 'x': tensor type 16 (IQ2_XXS) is not supported. Choose a file"),
    "unknown type": (one(type_id=999), "tensor 'x': tensor type 999 (unknown) is not supported"),
    "removed type": (one(type_id=4), "tensor 'x': tensor type 4 (Q4_2) is not supported"),
    "part of a block": (one(dims=(33,), type_id=8), "last dimension 33 of shape [33] is not a multiple of"),
    "rows of blocks": (one(dims=(16, 2), type_id=8), "last dimension 16 of shape [2, 16] is not a multiple"),
    "offset": (one(offset=4), "tensor 'x' has offset 4, expected a multiple of 32"),
    "offset past end": (one(offset=2**64 - 32), "tensor 'x' F32 [4] ends at byte 18446744073709551664, but"),
    "cut off": (
        one()[:-49],
        "tensor 'x' F32 [4] ends at byte 80, but the file has 79. The file is probably inc",
    ),
    "tensor twice": (with_data(head(2) + info(b"x", (4,)) * 2), "tensor 'x' appears twice"),
    "overlap": (
        with_data(head(2) + info(b"x", (16,)) + info(b"y", (4,), offset=32)),
        "tensors 'x' and 'y' share bytes",
    ),
    "shape override": (
        with_data(head(1, 1) + key(ORIG, 9, u32(5) + u64(2) + u32(2, 3)) + info(b"x", (4,))),
        "comfy.gguf.orig_shape.x is [2, 3], but the tensor has 4 elements",
    ),
    "negative override": (
        with_data(head(1, 1) + key(ORIG, 9, u32(5) + u64(2) + struct.pack("<2i", -2, -2)) + info(b"x", (4,))),
        "comfy.gguf.orig_shape.x is [-2, -2], but",
    ),
    "override type": (
        with_data(head(1, 1) + key(ORIG, 4, u32(4)) + info(b"x", (4,))),
        "comfy.gguf.orig_shape.x is not a list of up to 8 integers",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_clear_error(what: str, tmp_path: Path) -> None:
    raw, message = BROKEN[what]
    path = tmp_path / "broken.gguf"
    path.write_bytes(raw)
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith("broken.gguf")
    assert caught.value.hint, "says what to do"


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"none\.gguf cannot be opened: No such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="cannot be opened: Is a directory"):
        GGUFFile(tmp_path)


def test_a_bad_string_in_an_array_is_reported_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head(0, 1) + key(b"a", 9, u32(8) + u64(2) + text(b"ok") + text(b"\xff")))
    with GGUFFile(path) as file, pytest.raises(GGUFError, match="byte 67: string 1 of 'a' is not UTF-8"):
        file.metadata["a"]


def test_counts_that_a_huge_file_could_hold_are_refused_at_once(tmp_path: Path) -> None:
    """A sparse file of 3 GB: the size check alone would let these through."""
    hostile = {
        "key": (head(0, 1) + u64(2**31), f"a header may have {MAX_HEADER_BYTES} at most"),
        "text": (head(0, 1) + key(b"a", 8, u64(2**31)), f"a header may have {MAX_HEADER_BYTES} at most"),
        "numbers": (head(0, 1) + key(b"a", 9, u32(0) + u64(2**31)), "a header may have"),
        "strings": (head(0, 1) + key(b"a", 9, u32(8) + u64(2**28)), f"has {2**28} strings"),
        "tensors": (head(2**16), "tensor name has 0 characters"),
    }
    for what, (raw, message) in hostile.items():
        path = tmp_path / f"{what}.gguf"
        with path.open("wb") as stream:
            stream.write(raw)
            stream.truncate(3 << 30)
        start = time.perf_counter()
        with pytest.raises(GGUFError) as caught:
            GGUFFile(path)
        assert message in str(caught.value)
        assert time.perf_counter() - start < 1, what


# ---------------------------------------------------------------- both directions against gguf-py


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_what_we_write_gguf_py_reads(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    rng = np.random.default_rng(0)
    tensors = {
        "patch.weight": ((6, 4, 1, 2, 2), GGMLType.F32),
        "bias": ((3,), GGMLType.F16),
        **{f"t.{t.name}": ((3, 512), t) for t in GGMLType},
    }
    data = {name: rng.integers(0, 256, nbytes(t, shape), np.uint8) for name, (shape, t) in tensors.items()}
    writer = GGUFWriter(path, METADATA, alignment)
    for name, (shape, type_id) in tensors.items():
        writer.add(name, shape, type_id, data[name] if name == "bias" else lambda name=name: data[name])
    writer.write()

    theirs = gguf.GGUFReader(path)
    assert theirs.alignment == alignment
    for name, value in METADATA.items():
        got = theirs.fields[name].contents() if name != "an.empty" else []
        assert got == plain(value), name
    assert [t.name for t in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        shape, type_id = tensors[tensor.name]
        assert tensor.tensor_type == type_id
        assert tuple(tensor.shape.tolist()) == shape[::-1]
        np.testing.assert_array_equal(tensor.data.reshape(-1).view(np.uint8), data[tensor.name])

    with GGUFFile(path) as ours:
        assert {
            name: plain(value) for name, value in ours.metadata.items() if name != "general.alignment"
        } == {name: plain(value) for name, value in METADATA.items()}
        assert ours.alignment == alignment
        for name, (shape, type_id) in tensors.items():
            assert (ours.tensors[name].shape, ours.tensors[name].type_id) == (shape, type_id)
            np.testing.assert_array_equal(ours.data(name), data[name])


def test_what_gguf_py_writes_we_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    rng = np.random.default_rng(1)
    tokens = [f"▁{i}" for i in range(300)]
    weight = rng.standard_normal((5, 64), np.float32)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(300)])
    writer.add_token_types([1] * 300)
    writer.add_array("tokenizer.ggml.precompiled_charsmap", bytes(range(256)))
    writer.add_uint64("big", 2**60)
    writer.add_float64("double", 1e-300)
    writer.add_int8("small", -3)
    writer.add_bool("flag", False)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm", weight[0])
    writer.add_tensor("half", weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile(path) as file:
        meta = file.metadata
        assert (meta["general.architecture"], meta["big"], meta["small"]) == ("t5encoder", 2**60, -3)
        assert (meta["double"], meta["flag"]) == (1e-300, False)
        assert meta["tokenizer.ggml.tokens"] == tokens
        assert plain(meta["tokenizer.ggml.scores"]) == [float(-i) for i in range(300)]
        assert plain(meta["tokenizer.ggml.precompiled_charsmap"]) == list(range(256))
        assert file.tensors["token_embd.weight"].shape == (5, 64)
        assert file.tensors["token_embd.weight"].type_name == "Q8_0"
        np.testing.assert_array_equal(file.data("token_embd.weight"), packed.reshape(-1))
        np.testing.assert_array_equal(file.data("norm").view("<f4"), weight[0])
        assert file.tensors["half"].nbytes == 640


def test_the_block_table_is_gguf_pys() -> None:
    for type_id, block in BLOCKS.items():
        assert tuple(block) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    for theirs in gguf.GGMLQuantizationType:
        assert type_name(theirs) in (theirs.name, "unknown")


# ---------------------------------------------------------------- reader


def test_views_share_the_map_and_outlive_close(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, {"ids": [1, 2, 3]})
    writer.add("x", (1 << 16,), GGMLType.F32, np.arange(1 << 16, dtype=np.float32))
    writer.write()
    file = GGUFFile(path)
    view, again = file.data("x"), file.data("x")
    assert np.shares_memory(view, again)
    assert not view.flags.writeable
    assert not file.metadata["ids"].flags.writeable
    assert file.tensors["x"].offset % 32 == 0
    assert file.size_bytes == path.stat().st_size
    file.close()
    assert view.view("<f4")[-1] == 65535
    del view, again
    file.close()
    with pytest.raises(GGUFError, match=r"x\.gguf: read of 'x' from a closed file"):
        file.data("x")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(one())
    with GGUFFile(path) as file, pytest.raises(GGUFError, match=r"x\.gguf: no tensor 'y' among 1"):
        file.data("y")


def test_version_2_scalars_and_the_original_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shape = key(ORIG, 9, u32(5) + u64(3) + u32(1, 8, 4))
    path.write_bytes(
        with_data(head(2, 1, version=2) + shape + info(b"x", (32,), 8) + info(b"s", (), 0, 64), 68)
    )
    with GGUFFile(path) as file:
        assert file.version == 2
        assert file.tensors["x"].shape == (1, 8, 4)
        assert (file.tensors["x"].nbytes, file.tensors["x"].numel) == (34, 32)
        assert (file.tensors["s"].shape, file.tensors["s"].nbytes) == ((), 4)


def test_a_large_tokenizer_opens_and_decodes_quickly(tmp_path: Path) -> None:
    """256,384 strings as in umt5. Measured 0.04 s and 0.09 s; gguf-py needs 9 s."""
    tokens = [f"▁token{i}" for i in range(256_384)]
    GGUFWriter(path := tmp_path / "x.gguf", {"tokens": tokens}).write()
    start = time.process_time()
    with GGUFFile(path) as file:
        opened = time.process_time()
        assert file.metadata["tokens"] == tokens
        assert file.metadata["tokens"] is file.metadata["tokens"]
    assert opened - start < 0.4
    assert time.process_time() - opened < 0.9


def test_a_12_gb_file_with_1331_tensors_opens_quickly(tmp_path: Path) -> None:
    n, size = 1331, 9_000_000
    infos = b"".join(info(b"vace_blocks.%d.weight" % i, (size,), 24, i * size) for i in range(n))
    path = tmp_path / "x.gguf"
    with path.open("wb") as stream:
        stream.write(head(n) + infos)
        stream.truncate(n * size + (1 << 20))
    start = time.process_time()
    with GGUFFile(path) as file:
        assert len(file.tensors) == n
        assert file.size_bytes > 11.9e9
    assert time.process_time() - start < 0.4


# ---------------------------------------------------------------- writer


def test_metadata_copies_without_decoding(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    GGUFWriter(first, METADATA).write()
    with GGUFFile(first) as file:
        GGUFWriter(second, {name: file.metadata.encoded(name) for name in file.metadata}).write()
        assert file.metadata.encoded("a.u8") == Encoded(0, b"\x07")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "value", [None, [], [1, "a"], [[1]], {}, 2**64, [True, 1], b"raw", np.zeros((2, 2)), 1j]
)
def test_metadata_that_gguf_cannot_hold_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="metadata 'k' is "):
        GGUFWriter(tmp_path / "x.gguf", {"k": value}).write()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    writer = GGUFWriter(path, {})
    writer.add("good", (4,), GGMLType.F32, np.zeros(4, np.float32))
    writer.add("bad", (4,), GGMLType.F32, bytes(15))
    with pytest.raises(ValueError, match=r"tensor 'bad' F32 \[4\] got 15 bytes, expected 16"):
        writer.write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_writer_refuses_what_no_reader_takes(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", {})
    writer.add("x", (32,), GGMLType.Q8_0, bytes(34))
    with pytest.raises(ValueError, match="'x' was added twice"):
        writer.add("x", (32,), GGMLType.Q8_0, bytes(34))
    with pytest.raises(ValueError, match=r"shape \[2, 0\]"):
        writer.add("y", (2, 0), GGMLType.F32, b"")
    with pytest.raises(GGUFError, match="last dimension 31 of shape"):
        writer.add("y", (31,), GGMLType.Q8_0, b"")
    with pytest.raises(ValueError, match="alignment 48, expected a power of two"):
        GGUFWriter(tmp_path / "x.gguf", {}, alignment=48)


def test_data_is_made_one_tensor_at_a_time_and_progress_is_told(tmp_path: Path) -> None:
    events: list[object] = []

    def make(i: int) -> Callable[[], np.ndarray]:
        def data() -> np.ndarray:
            events.append(i)
            return np.full(8, i, np.float32)

        return data

    writer = GGUFWriter(tmp_path / "x.gguf", {})
    for i in range(3):
        writer.add(f"{i}", (8,), GGMLType.F32, make(i))
    assert events == []
    writer.write(lambda done, of: events.append((done, of)))
    assert events == [0, (32, 96), 1, (64, 96), 2, (96, 96)]


# ---------------------------------------------------------------- fuzzing


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "fuzz_gguf.py"
    spec = importlib.util.spec_from_file_location("fuzz_gguf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_gguf"] = module
    spec.loader.exec_module(module)
    return module


def test_every_seed_of_the_fuzzer_is_a_good_file(fuzz: ModuleType, tmp_path: Path) -> None:
    for seed in fuzz.SEEDS:
        assert fuzz.check(b"".join(seed), tmp_path / "seed.gguf") == "accepted"


def test_mutated_files_are_read_or_refused(fuzz: ModuleType, tmp_path: Path) -> None:
    tally = fuzz.run(3000, seed=0, folder=tmp_path)
    assert tally["findings"] == []
    assert tally["refused"] > 1500, "mutations that are always accepted test nothing"
    assert tally["accepted"] > 100, "mutations that are always refused stop at the first check"


def test_the_fuzzer_notices_a_reader_that_checks_nothing(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GGUFFile, "_refuse_overlap", lambda self, cursor: None)
    assert fuzz.run(3000, seed=0, folder=tmp_path)["findings"]
