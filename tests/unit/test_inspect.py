"""The report on a weight file: what it is, what it holds, what the machine makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mutoscope.engine import inspect, memory
from mutoscope.engine.gguf import GGMLType, nbytes
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.inspect import inspect_file, render
from mutoscope.engine.umt5 import UMT5Config, UMT5Encoder
from mutoscope.engine.vae import VAEConfig, WanVAE
from mutoscope.engine.wan import WanConfig, WanModel
from mutoscope.errors import FileError

T2V = WanConfig(256, 512, n_heads=2, n_layers=2, in_dim=16, out_dim=16, text_dim=32, freq_dim=32)
VACE = WanConfig(**{**vars(T2V), "vace_layers": (0, 1), "vace_in_dim": 96})
T5 = UMT5Config(vocab_size=50, dim=32, ffn_dim=64, n_layers=2, n_heads=2, head_dim=16, n_buckets=32)
VAE = VAEConfig(8, 16, (8, 8), 1, (True,))


def shapes_of(model: type[torch.nn.Module], config: object) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in model(config).named_parameters()}


def write(
    path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, object] | None = None
) -> Path:
    """Zeros: Q8_0 for the matrices of blocks, F32 for the rest."""
    writer = GGUFWriter(path, {"general.architecture": "wan", **(metadata or {})})
    for name, shape in shapes.items():
        quantised = len(shape) == 2 and "blocks." in name and shape[1] % 32 == 0
        type_id = GGMLType.Q8_0 if quantised else GGMLType.F32
        writer.add(name, tuple(shape), type_id, np.zeros(nbytes(type_id, tuple(shape)), np.uint8))
    writer.write()
    return path


@pytest.mark.parametrize(
    ("model", "config", "architecture"),
    [
        (WanModel, T2V, "wan_t2v"),
        (WanModel, VACE, "wan_vace"),
        (WanVAE, VAE, "wan_vae"),
        (UMT5Encoder, T5, "umt5"),
    ],
)
def test_architectures_and_configurations(tmp_path, model, config, architecture):
    shapes = shapes_of(model, config)
    report = inspect_file(write(tmp_path / "a.gguf", shapes))
    assert report["architecture"] == architecture
    assert report["n_tensors"] == len(shapes)
    assert report["n_parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    shown = {f.name: getattr(config, f.name) for f in fields(config) if f.repr}
    assert report["config"] == {k: list(v) if isinstance(v, tuple) else v for k, v in shown.items()}
    assert "problem" not in report
    assert architecture in render(report)


def test_vace_modules_alone(tmp_path):
    shapes = {name: shape for name, shape in shapes_of(WanModel, VACE).items() if name.startswith("vace_")}
    report = inspect_file(write(tmp_path / "a.gguf", shapes))
    assert report["architecture"] == "wan_vace_modules"
    assert "config" not in report


def test_diffusers_names(tmp_path):
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes = {bias: (32, 2), "shared.weight": (9, 8)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    report = inspect_file(tmp_path / "a.safetensors")
    assert (report["architecture"], report["kind"]) == ("umt5", "safetensors")
    assert "enc.blk.0.attn_q.weight" in report["problem"]
    assert "Problem: " in render(report)


def test_unknown_tensors(tmp_path):
    report = inspect_file(write(tmp_path / "a.gguf", {"some.weight": (4, 4)}))
    assert report["architecture"] == "unknown"
    assert report["groups"] == {"some": {"F32": {"tensors": 1, "parameters": 16, "bytes": 64}}}


def test_types_by_part(tmp_path):
    report = inspect_file(write(tmp_path / "a.gguf", shapes_of(WanModel, VACE)))
    assert report["groups"]["blocks.self_attn"]["Q8_0"] == {
        "tensors": 8, "parameters": 8 * 256 * 256, "bytes": 8 * 256 * 256 // 32 * 34,
    }  # fmt: skip
    assert report["groups"]["vace_blocks.before_proj"] == {
        "Q8_0": {"tensors": 1, "parameters": 1 << 16, "bytes": (1 << 16) // 32 * 34},
        "F32": {"tensors": 1, "parameters": 256, "bytes": 1024},
    }
    assert set(report["groups"]) > {"blocks.modulation", "blocks.ffn", "head", "patch_embedding"}
    parts = [row["bytes"] for types in report["groups"].values() for row in types.values()]
    assert sum(parts) == sum(row["bytes"] for row in report["types"].values()) <= report["size_bytes"]
    assert "8 Q8_0" in render(report)


def test_long_metadata_is_cut_and_all_is_json(tmp_path):
    metadata = {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(1000)],
        "tokenizer.ggml.scores": np.zeros(1000, np.float32),
        "note": "x" * 1000,
        "wan.attention.head_count": 2,
    }
    report = inspect_file(write(tmp_path / "a.gguf", shapes_of(WanModel, T2V), metadata))
    assert json.loads(json.dumps(report)) == report
    first = [f"t{i}" for i in range(8)]
    assert report["metadata"]["tokenizer.ggml.tokens"] == {"first": first, "length": 1000}
    assert report["metadata"]["note"]["length"] == 1000
    assert report["metadata"]["wan.attention.head_count"] == 2
    assert max(len(line) for line in render(report).splitlines()) < 300


@pytest.mark.parametrize(("free_bytes", "frames"), [(1 << 20, [0, 0, 0]), (1 << 40, [81, 81, 81])])
def test_longest_clips_of_extreme_machines(tmp_path, monkeypatch, free_bytes, frames):
    machine = SimpleNamespace(total=free_bytes, available=free_bytes)
    monkeypatch.setattr(inspect.psutil, "virtual_memory", lambda: machine)
    report = inspect_file(write(tmp_path / "a.gguf", shapes_of(WanModel, VACE)))["memory"]
    assert [clip["frames"] for clip in report["longest_clips"]] == frames
    assert report["fits"] == (frames[0] > 0)


def test_longest_clip_is_the_longest_that_fits(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", shapes_of(WanModel, VACE))
    weights = inspect_file(path)["memory"]["weights_bytes"]

    def estimate(config: WanConfig, width: int, height: int, frames: int) -> memory.Need:
        return memory.Need(denoise=width * frames, decode=0)

    monkeypatch.setattr(inspect.memory, "estimate", estimate)
    for frames in (5, 41):
        free = weights + 1280 * frames
        for slack, longest in ((0, frames), (-1, frames - 4)):
            machine = SimpleNamespace(total=free, available=free + slack)
            monkeypatch.setattr(inspect.psutil, "virtual_memory", lambda machine=machine: machine)
            clips = inspect_file(path)["memory"]["longest_clips"]
            assert clips[-1] == {"width": 1280, "height": 720, "frames": longest}


def test_the_token_table_needs_no_memory(tmp_path):
    report = inspect_file(write(tmp_path / "a.gguf", shapes_of(UMT5Encoder, T5)))
    table_bytes = T5.vocab_size * T5.dim * 4
    assert report["memory"]["weights_bytes"] == report["types"]["F32"]["bytes"] - table_bytes
    assert "longest_clips" not in report["memory"]


def test_missing_file(tmp_path):
    with pytest.raises(FileError, match="cannot be opened"):
        inspect_file(tmp_path / "nothing.gguf")
