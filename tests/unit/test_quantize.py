"""Mixtures against published counts and sizes; whole files through safetensors, GGUF and gguf-py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mutoscope.engine.gguf import BLOCKS, GGMLType, GGUFFile, nbytes
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.quantize import BASE, FILE_TYPE, mixture, quantize_file
from mutoscope.engine.quants import as_tensor, dequantize
from mutoscope.errors import FileError, RequestError, WeightError

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: threads would only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def block(prefix: str, d: int, f: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.modulation": (1, 6, d)}
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            shapes[f"{prefix}.{attention}.{part}.weight"] = (d, d)
            shapes[f"{prefix}.{attention}.{part}.bias"] = (d,)
        shapes[f"{prefix}.{attention}.norm_q.weight"] = (d,)
        shapes[f"{prefix}.{attention}.norm_k.weight"] = (d,)
    shapes |= {f"{prefix}.norm3.weight": (d,), f"{prefix}.norm3.bias": (d,)}
    shapes |= {f"{prefix}.ffn.0.weight": (f, d), f"{prefix}.ffn.0.bias": (f,)}
    shapes |= {f"{prefix}.ffn.2.weight": (d, f), f"{prefix}.ffn.2.bias": (d,)}
    return shapes


def wan(d: int, f: int, n_layers: int, n_vace: int = 0, text: int = 4096) -> Shapes:
    shapes: Shapes = {"patch_embedding.weight": (d, 16, 1, 2, 2), "patch_embedding.bias": (d,)}
    for name, n_in, n_out in (
        ("text_embedding.0", text, d),
        ("text_embedding.2", d, d),
        ("time_embedding.0", 256, d),
        ("time_embedding.2", d, d),
        ("time_projection.1", d, 6 * d),
        ("head.head", d, 64),
    ):
        shapes |= {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
    shapes["head.modulation"] = (1, 2, d)
    for i in range(n_layers):
        shapes |= block(f"blocks.{i}", d, f)
    if n_vace:
        shapes |= {"vace_patch_embedding.weight": (d, 96, 1, 2, 2), "vace_patch_embedding.bias": (d,)}
    for i in range(n_vace):
        shapes |= block(f"vace_blocks.{i}", d, f)
        for part in ("before_proj", "after_proj") if i == 0 else ("after_proj",):
            shapes |= {f"vace_blocks.{i}.{part}.weight": (d, d), f"vace_blocks.{i}.{part}.bias": (d,)}
    return shapes


def umt5(d: int = 4096, f: int = 10240, n_layers: int = 24, vocab: int = 256_384) -> Shapes:
    shapes: Shapes = {"token_embd.weight": (vocab, d), "enc.output_norm.weight": (d,)}
    for i in range(n_layers):
        shapes |= {f"enc.blk.{i}.{norm}.weight": (d,) for norm in ("attn_norm", "ffn_norm")}
        shapes[f"enc.blk.{i}.attn_rel_b.weight"] = (32, 64)
        shapes |= {f"enc.blk.{i}.attn_{part}.weight": (d, d) for part in "qkvo"}
        shapes |= {f"enc.blk.{i}.ffn_{part}.weight": (f, d) for part in ("gate", "up")}
        shapes[f"enc.blk.{i}.ffn_down.weight"] = (d, f)
    return shapes


MODELS = {
    "T2V-1.3B": wan(1536, 8960, 30),
    "T2V-14B": wan(5120, 13824, 40),
    "VACE-1.3B": wan(1536, 8960, 30, 15),
    "VACE-14B": wan(5120, 13824, 40, 8),
    "UMT5": umt5(),
}


def counts(model: str, type_name: str) -> dict[str, int]:
    return dict(Counter(t.name for t in mixture(type_name, MODELS[model]).values()))


def size_gb(model: str, type_name: str) -> float:
    shapes = MODELS[model]
    return sum(nbytes(t, shapes[name]) for name, t in mixture(type_name, shapes).items()) / 1e9


def test_the_models_of_this_test_have_the_tensors_of_the_real_ones() -> None:
    n_tensors = {"T2V-1.3B": 825, "T2V-14B": 1095, "VACE-1.3B": 1264, "VACE-14B": 1331, "UMT5": 242}
    assert {model: len(shapes) for model, shapes in MODELS.items()} == n_tensors


@pytest.mark.parametrize(
    ("model", "type_name", "expected"),
    [
        ("T2V-14B", "Q4_K_M", {"Q4_K": 280, "Q6_K": 120, "F32": 695}),
        ("T2V-14B", "Q4_0", {"Q4_0": 360, "Q4_1": 40, "F32": 695}),
        ("T2V-14B", "Q8_0", {"Q8_0": 400, "F32": 695}),
        ("T2V-14B", "Q2_K", {"Q2_K": 320, "Q3_K": 80, "F32": 695}),
        ("VACE-14B", "Q4_K_M", {"Q4_K": 345, "Q6_K": 144, "F32": 842}),
        ("VACE-14B", "Q3_K_M", {"Q3_K": 345, "Q4_K": 142, "Q5_K": 2, "F32": 842}),
        ("VACE-14B", "Q4_K_S", {"Q4_K": 437, "Q5_K": 52, "F32": 842}),
        ("VACE-1.3B", "Q6_K", {"Q6_K": 466, "F32": 798}),
        ("T2V-1.3B", "BF16", {"BF16": 300, "F32": 525}),
        ("UMT5", "Q4_K_M", {"Q4_K": 144, "Q6_K": 25, "F32": 73}),
        ("UMT5", "Q8_0", {"Q8_0": 169, "F32": 73}),
    ],
)
def test_counts_of_known_files(model: str, type_name: str, expected: dict[str, int]) -> None:
    assert counts(model, type_name) == expected


# Sizes in GB as the authors publish them (city96/Wan2.1-T2V-14B-gguf, city96/umt5-xxl-encoder-gguf).
PUBLISHED = {
    "T2V-14B": {
        "Q3_K_S": "6.99", "Q3_K_M": "7.65", "Q4_0": "9.03", "Q4_K_S": "9.22", "Q4_1": "9.73",
        "Q4_K_M": "10.1", "Q5_0": "10.8", "Q5_K_M": "11.3", "Q5_1": "11.5",
        "Q6_K": "12.5", "Q8_0": "15.9", "F16": "29.1",
    },
    "UMT5": {
        "Q3_K_S": "2.86", "Q3_K_M": "3.06", "Q4_K_S": "3.50", "Q4_K_M": "3.66", "Q5_K_S": "4.05",
        "Q5_K_M": "4.15", "Q6_K": "4.67", "Q8_0": "6.04", "F16": "11.4",
    },
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_sizes_are_those_of_published_files(model: str) -> None:
    """To the three digits published: one wrongly mixed kind of tensor would show."""
    metadata_gb = {"T2V-14B": 0.0, "UMT5": 0.01}[model]  # the tokenizer
    for type_name, published in PUBLISHED[model].items():
        unit = 10.0 ** -len(published.partition(".")[2])
        assert abs(size_gb(model, type_name) + metadata_gb - float(published)) <= unit, type_name


def test_positions_count_in_file_order() -> None:
    types = mixture("Q3_K_M", MODELS["VACE-14B"])
    assert [n for n, t in types.items() if t == GGMLType.Q5_K] == [
        "blocks.0.self_attn.v.weight",
        "blocks.0.cross_attn.v.weight",
    ]
    better = [n for n, t in mixture("Q5_K_M", MODELS["UMT5"]).items() if t == GGMLType.Q6_K]
    layers = [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert better[0] == "token_embd.weight"
    assert sorted(better[1:]) == sorted(
        f"enc.blk.{i}.{part}.weight" for i in layers for part in ("attn_v", "ffn_down")
    )


@pytest.mark.parametrize("type_name", BASE)
def test_every_type_leaves_the_sensitive_parts_alone(type_name: str) -> None:
    types = mixture(type_name, MODELS["VACE-1.3B"])
    kept = ("patch_embedding", "text_embedding", "time_", "head.", ".bias", "norm", "modulation")
    for name, type_id in types.items():
        if any(part in name for part in kept):
            assert type_id == GGMLType.F32, name
        else:
            assert type_id != GGMLType.F32, name
    assert type_name in FILE_TYPE


def test_file_types_are_llama_cpps() -> None:
    for name, number in FILE_TYPE.items():
        assert gguf.LlamaFileType[f"MOSTLY_{name}"] == number


def test_rows_that_do_not_divide_become_f16() -> None:
    types = mixture("Q4_K_M", wan(96, 192, 1))
    assert {types["blocks.0.self_attn.q.weight"], types["blocks.0.ffn.2.weight"]} == {GGMLType.F16}
    assert mixture("Q8_0", wan(96, 192, 1))["blocks.0.self_attn.q.weight"] == GGMLType.Q8_0


def test_vae_convolutions_become_16_bit() -> None:
    shapes = {
        "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
        "decoder.middle.0.residual.2.weight": (384, 384, 3, 3, 3),
        "decoder.middle.0.residual.2.bias": (384,),
        "decoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
    }
    f32, f16, bf16 = GGMLType.F32, GGMLType.F16, GGMLType.BF16
    assert list(mixture("Q4_K_M", shapes).values()) == [f32, f16, f32, f16]
    assert list(mixture("BF16", shapes).values()) == [f32, bf16, f32, bf16]


def test_unknown_types_and_models_are_named() -> None:
    with pytest.raises(RequestError, match=r"Unknown type 'Q4_K'\. Choose one of Q2_K, Q3_K_S, .*, BF16\."):
        mixture("Q4_K", MODELS["T2V-1.3B"])
    with pytest.raises(WeightError, match=r"not a model that can be quantised.*Give a Wan 2\.1 model"):
        mixture("Q8_0", {"model.layers.0.weight": (32, 32)})


# ---------------------------------------------------------------- files


def random(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def error_of(file: GGUFFile, name: str, expected: torch.Tensor) -> float:
    info = file.tensors[name]
    got = dequantize(info.type_id, as_tensor(file.data(name))).view(info.shape)
    assert info.shape == tuple(expected.shape)
    return float((got - expected.float()).norm() / expected.float().norm())


def test_a_prefixed_safetensors_file_becomes_a_community_file(tmp_path: Path) -> None:
    tensors = random(wan(256, 512, 2, 1, text=64))
    src, dst = tmp_path / "in.safetensors", tmp_path / "out.gguf"
    extra = {"format": "pt", "wan.attention.head_count": "4", "vae.latent_mean": "[1, 0.5]"}
    save_file({f"model.diffusion_model.{name}": t for name, t in tensors.items()}, src, metadata=extra)
    progress: list[tuple[int, int]] = []
    quantize_file(src, dst, "Q4_K_M", lambda done, of: progress.append((done, of)))

    theirs = gguf.GGUFReader(dst)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "wan",
        "format": "pt",
        "wan.attention.head_count": 4,
        "vae.latent_mean": [1.0, 0.5],
        "general.quantization_version": 2,
        "general.file_type": 15,
    }
    assert {t.name for t in theirs.tensors} == set(tensors)
    limits = {"F32": 0.0, "Q4_K": 0.08, "Q6_K": 0.02}
    with GGUFFile(dst) as file:
        for name, tensor in tensors.items():
            assert error_of(file, name, tensor) <= limits[file.tensors[name].type_name], name
        assert file.tensors["blocks.1.ffn.2.weight"].type_name == "Q6_K"
        assert file.tensors["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)
        total = sum(info.nbytes for info in file.tensors.values())
    assert progress[-1] == (total, total)
    assert len(progress) == len(tensors)


def test_gguf_to_gguf_keeps_the_tokenizer_and_every_value_type(tmp_path: Path) -> None:
    src, dst = tmp_path / "in.gguf", tmp_path / "out.gguf"
    tensors = random(umt5(256, 512, 4, 300))
    tokens = [f"▁{i}" for i in range(300)]
    metadata = {
        "general.architecture": "t5encoder",
        "general.file_type": 0,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.arange(300, dtype=np.float32),
        "tokenizer.ggml.precompiled_charsmap": np.arange(200, dtype=np.uint8),
        "t5encoder.block_count": np.uint64(4),
    }
    writer = GGUFWriter(src, metadata, alignment=64)
    for name, tensor in tensors.items():
        writer.add(name, tuple(tensor.shape), GGMLType.F32, tensor.numpy())
    writer.write()
    quantize_file(src, dst, "Q5_K_M")

    with GGUFFile(src) as old, GGUFFile(dst) as new:
        for key in metadata:
            if key != "general.file_type":
                assert new.metadata.encoded(key) == old.metadata.encoded(key)
        assert new.metadata["general.file_type"] == 17
        assert new.alignment == 32
        assert new.tensors["token_embd.weight"].type_name == "Q6_K"
        assert error_of(new, "token_embd.weight", tensors["token_embd.weight"]) < 0.02
        assert error_of(new, "enc.blk.0.attn_rel_b.weight", tensors["enc.blk.0.attn_rel_b.weight"]) == 0


def test_a_16_bit_source_keeps_its_unquantised_matrices(tmp_path: Path) -> None:
    tensors = random(wan(256, 256, 1, text=64), torch.bfloat16)
    src, dst = tmp_path / "in.safetensors", tmp_path / "out.gguf"
    save_file(tensors, src)
    quantize_file(src, dst, "Q8_0")
    with GGUFFile(dst) as file:
        types = {name: info.type_name for name, info in file.tensors.items()}
        assert types["text_embedding.0.weight"] == types["time_projection.1.weight"] == "BF16"
        assert types["text_embedding.0.bias"] == types["patch_embedding.weight"] == "F32"
        assert types["head.modulation"] == "F32"
        assert types["blocks.0.ffn.0.weight"] == "Q8_0"
        for name in ("text_embedding.0.weight", "patch_embedding.weight"):
            assert error_of(file, name, tensors[name]) == 0


@pytest.mark.parametrize("type_name", BASE)
def test_every_type_writes_a_file_both_readers_take(type_name: str, tmp_path: Path) -> None:
    src, dst = tmp_path / "in.safetensors", tmp_path / "out.gguf"
    shapes = wan(256, 256, 1, text=64)
    save_file(random(shapes), src)
    quantize_file(src, dst, type_name)
    expected = mixture(type_name, shapes)
    theirs = gguf.GGUFReader(dst)
    assert {t.name: t.tensor_type for t in theirs.tensors} == expected
    assert theirs.fields["general.file_type"].contents() == FILE_TYPE[type_name]
    with GGUFFile(dst) as file:
        assert {name: info.type_id for name, info in file.tensors.items()} == expected


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "in.safetensors"
    save_file(random(wan(256, 512, 1, text=64)), src)
    quantize_file(src, tmp_path / "whole.gguf", "Q4_K_M")
    monkeypatch.setattr("mutoscope.engine.quantize._CHUNK", 48 * 256)
    quantize_file(src, tmp_path / "parts.gguf", "Q4_K_M")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()
    quantize_file(tmp_path / "whole.gguf", tmp_path / "again.gguf", "Q8_0")
    with GGUFFile(tmp_path / "again.gguf") as file:
        assert file.tensors["blocks.0.self_attn.v.weight"].type_name == "Q8_0"


def test_what_cannot_be_quantised_is_one_error_and_no_file(tmp_path: Path) -> None:
    src, dst = tmp_path / "in.safetensors", tmp_path / "out.gguf"
    tensors = random(wan(256, 256, 1, text=64))
    tensors["blocks.0.ffn.0.weight"][3, 7] = torch.nan
    save_file(tensors, src)
    with pytest.raises(WeightError, match=r"in\.safetensors: tensor 'blocks\.0\.ffn\.0\.weight': .*got nan"):
        quantize_file(src, dst, "Q4_K_M")
    with pytest.raises(RequestError, match="Unknown type 'q8'"):
        quantize_file(src, dst, "q8")
    with pytest.raises(RequestError, match="would be written over itself"):
        quantize_file(src, src, "Q8_0")
    with pytest.raises(FileError, match=r"none\.gguf"):
        quantize_file(tmp_path / "none.gguf", dst, "Q8_0")
    save_file({"a.weight": torch.zeros(4, 4)}, src)
    with pytest.raises(WeightError, match=r"in\.safetensors: not a model that can be quantised"):
        quantize_file(src, dst, "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_chunk_is_whole_blocks_of_every_type() -> None:
    from mutoscope.engine import quantize

    assert all(quantize._CHUNK % block.elements == 0 for block in BLOCKS.values())
