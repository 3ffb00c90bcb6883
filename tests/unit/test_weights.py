"""Weight files to models: every layout that circulates gives the same numbers, every wrong file says why."""

from __future__ import annotations

import copy
import gc
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.gguf_writer import GGUFWriter
from mutoscope.engine.linear import Packed, QuantEmbedding, QuantLinear, Unpacked
from mutoscope.engine.umt5 import UMT5Config, UMT5Encoder
from mutoscope.engine.vae import VAEConfig, WanVAE
from mutoscope.engine.wan import WanConfig, WanModel, rope_table
from mutoscope.engine.weights import check_vae, load_umt5, load_vae, load_wan, open_weights
from mutoscope.errors import FileError, WeightError

CONFIG = WanConfig(
    dim=64, ffn_dim=96, n_heads=2, n_layers=4, in_dim=16, out_dim=16, text_dim=32, freq_dim=32,
    vace_layers=(0, 2), vace_in_dim=96,
)  # fmt: skip
HEADS = {"wan.attention.head_count": 2}
Q8_0, F16, BF16, F32 = GGMLType.Q8_0, GGMLType.F16, GGMLType.BF16, GGMLType.F32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The weights of a tiny VACE model whose numbers are exact in bfloat16."""
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    return {name: p.detach().bfloat16().float() for name, p in model.state_dict().items()}


def encode(values: Tensor, type_id: int) -> np.ndarray:
    """float32 to packed bytes; Q8_0 as scale = max/127 per 32."""
    if type_id == F32:
        return values.contiguous().numpy().view(np.uint8).reshape(-1)
    if type_id in (F16, BF16):
        halves = values.contiguous().to(torch.float16 if type_id == F16 else torch.bfloat16)
        return halves.view(torch.uint8).numpy().reshape(-1)
    blocks = values.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    q = (blocks / scale.float()).round().to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), dim=1).numpy().reshape(-1)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    type_of: Callable[[str, Tensor], int] = lambda name, values: F32,
    metadata: Mapping[str, object] = HEADS,
    shape_of: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape,
) -> Path:
    writer = GGUFWriter(path, {"general.architecture": "wan", **metadata})
    for name, values in tensors.items():
        type_id = type_of(name, values)
        writer.add(name, shape_of(name, tuple(values.shape)), type_id, encode(values, type_id))
    writer.write()
    return path


def forward(model: WanModel) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    x, context = (torch.randn(1, c, 2, 4, 4, generator=rng) for c in (16, 96))
    rows = torch.randn(1, 6, 32, generator=rng)
    time, text = model.time_modulation(torch.tensor([600.0])), model.text_context(rows, [6])
    tokens = model.vace_tokens(context)
    return model(x, time, text, rope_table((2, 2, 2), 32), tokens)


@pytest.fixture(scope="module")
def expected(tensors: dict[str, Tensor]) -> Tensor:
    model = WanModel(CONFIG)
    model.load_state_dict(tensors)
    with torch.no_grad():
        return forward(model)


def check(model: WanModel, expected: Tensor, rtol: float = 1e-5) -> None:
    assert ((forward(model) - expected).norm() / expected.norm()).item() < rtol


# ---------------------------------------------------------------- what circulates


@pytest.mark.parametrize("type_id", [F32, F16, BF16])
def test_every_float_type(tmp_path, tensors, expected, type_id):
    path = write_gguf(tmp_path / "a.gguf", tensors, lambda name, values: type_id)
    check(load_wan(path, compute_dtype=torch.float32), expected, 1e-3 if type_id == F16 else 1e-5)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes(tmp_path, tensors, expected, prefix):
    path = write_gguf(tmp_path / "a.gguf", {prefix + name: values for name, values in tensors.items()})
    check(load_wan(path, compute_dtype=torch.float32), expected)


def test_flat_modulation_and_folded_patches(tmp_path, tensors, expected):
    """As written by tools that stop at 4 dimensions or drop the leading 1."""

    def shape_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name.endswith("modulation"):
            return shape[1:]
        if name == "patch_embedding.weight":
            return (shape[0] * shape[1], *shape[2:])
        if name == "vace_patch_embedding.weight":
            return (*shape[:2], *shape[3:])
        return shape

    path = write_gguf(tmp_path / "a.gguf", tensors, shape_of=shape_of)
    check(load_wan(path, compute_dtype=torch.float32), expected)


def test_original_shape_in_metadata(tmp_path, tensors, expected):
    name = "blocks.0.ffn.0.weight"
    path = write_gguf(
        tmp_path / "a.gguf", tensors, metadata=HEADS | {f"comfy.gguf.orig_shape.{name}": [96, 64]},
        shape_of=lambda n, shape: (24, 256) if n == name else shape,
    )  # fmt: skip
    check(load_wan(path, compute_dtype=torch.float32), expected)


def test_safetensors_and_checkpoints(tmp_path, tensors, expected):
    path = tmp_path / "named.gguf"  # content decides
    save_file(dict(tensors), path, {key: str(value) for key, value in HEADS.items()})
    assert open_weights(path).kind == "safetensors"
    check(load_wan(path, compute_dtype=torch.float32), expected)
    narrow = {name: values.bfloat16() for name, values in tensors.items()}
    torch.save(narrow, tmp_path / "model.pth")
    source = open_weights(tmp_path / "model.pth")
    assert source.kind == "pytorch"
    read = source.tensors["blocks.1.cross_attn.v.weight"].packed()
    torch.testing.assert_close(read.values(torch.float32), tensors["blocks.1.cross_attn.v.weight"])


def test_vace_modules_on_top_of_a_base(tmp_path, tensors, expected):
    base = {name: values for name, values in tensors.items() if not name.startswith("vace_")}
    modules = {name: values for name, values in tensors.items() if name.startswith("vace_")}
    paths = [write_gguf(tmp_path / "base.gguf", base), write_gguf(tmp_path / "vace.gguf", modules)]
    check(load_wan(paths, compute_dtype=torch.float32), expected)
    assert load_wan(paths[0]).config.vace_layers == ()
    with pytest.raises(WeightError, match=r"VACE modules without the model.*text-to-video file"):
        load_wan(paths[1])
    with pytest.raises(WeightError, match=r"given twice: .* in base\.gguf and .* in base\.gguf"):
        load_wan([paths[0], paths[0]])


def test_quantised_weights_serve_a_batch(tmp_path, tensors, expected):
    def quantised(name: str, values: Tensor) -> int:
        return Q8_0 if values.ndim == 2 and "blocks" in name and values.shape[1] % 32 == 0 else F32

    path = write_gguf(tmp_path / "a.gguf", tensors, quantised)
    model = load_wan(path, compute_dtype=torch.float32)
    layer = model.blocks[0].ffn["0"]
    assert isinstance(layer, QuantLinear)
    assert layer.type_id == Q8_0
    check(model, expected, 0.02)
    with pytest.raises(AssertionError):  # the quantisation shows: the packed bytes were used
        check(model, expected, 1e-5)


# ---------------------------------------------------------------- memory and precision


def test_float32_parts_stay_float32(tmp_path, tensors, expected):
    model = load_wan(write_gguf(tmp_path / "a.gguf", tensors, lambda n, v: F16), compute_dtype=torch.bfloat16)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            exact = path.split(".")[0] in WanModel.FLOAT32
            assert layer.precision.dtype == (torch.float32 if exact else torch.bfloat16), path
            assert layer.bias.dtype == torch.float32
    assert model.blocks[0].modulation.dtype == torch.float32
    check(model, expected, 0.03)


def test_weights_of_the_compute_dtype_are_used_where_they_lie(tmp_path, tensors):
    path = write_gguf(tmp_path / "a.gguf", tensors, lambda n, v: BF16)
    model = load_wan(path, compute_dtype=torch.bfloat16)
    layer = model.blocks[3].self_attn.q
    assert layer.weight.values(torch.bfloat16).data_ptr() == layer.packed.data_ptr()
    assert layer.precision.buffer_numel == 0


def test_one_buffer_serves_all_layers(tmp_path, tensors):
    model = load_wan(write_gguf(tmp_path / "a.gguf", tensors, lambda n, v: F16), compute_dtype=torch.bfloat16)
    precisions = {layer.precision for layer in model.modules() if isinstance(layer, QuantLinear)}
    assert len(precisions) == 2
    with torch.inference_mode():
        forward(model)
    forward(model)  # a buffer made in inference mode could not be written to here
    main = model.blocks[0].ffn["0"].precision
    assert main.buffer(torch.device("cpu")).numel() == 64 * 96


def test_loading_does_not_read_the_file(tmp_path):
    """96 MiB of token table and one layer: loading touches next to nothing, using it only the rows."""
    config = UMT5Config(1 << 15, dim=1536, ffn_dim=32, n_layers=1, n_heads=1, head_dim=32, n_buckets=32)
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in UMT5Encoder(config).state_dict().items()}
    writer = GGUFWriter(tmp_path / "a.gguf", config.metadata)
    for name, shape in names.items():
        writer.add(name, shape, F16, lambda shape=shape: np.full(shape, 0.01, np.float16))
    writer.write()
    assert (tmp_path / "a.gguf").stat().st_size > 96 << 20
    gc.collect()
    before = psutil.Process().memory_info().rss
    model, _ = load_umt5(tmp_path / "a.gguf", compute_dtype=torch.float32)
    rows = model(torch.tensor([[1, 30_000, 5]]))
    assert psutil.Process().memory_info().rss - before < 24 << 20
    assert rows.shape == (1, 3, 1536)
    assert rows.isfinite().all()


def resident_kb(at: int) -> int:
    """Of the mapping that holds an address: kilobytes in memory (`Rss` of smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= at < int(match[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no smaps")
def test_pages_are_dropped_and_read_again(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", {})
    values = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    writer.add("w", (1024, 1024), F16, lambda: values.astype(np.float16))
    writer.write()
    weight = open_weights(tmp_path / "a.gguf").tensors["w"].packed()
    layer = QuantLinear(weight, None, Unpacked(torch.float32, drop=False))
    x = torch.randn(2, 1024)
    first = layer(x)
    assert resident_kb(weight.mapped_at) > 1900
    layer.precision.drop = True
    assert torch.equal(layer(x), first)
    assert resident_kb(weight.mapped_at) < 200
    assert torch.equal(layer(x), first)
    copied = copy.deepcopy(layer)  # on the heap, where dropping would lose it
    assert copied.packed.data_ptr() != weight.mapped_at
    for _ in range(2):
        assert torch.equal(copied(x), first)


def test_packed_bytes_move_and_stay_bytes(tensors):
    values = tensors["blocks.0.ffn.0.weight"]
    packed = Packed(torch.from_numpy(encode(values, Q8_0)), Q8_0, tuple(values.shape))
    layer = QuantLinear(packed, torch.zeros(96), Unpacked(torch.float32))
    x = torch.randn(3, 5, 64)
    before = layer(x)
    assert layer.to("cpu").packed.dtype == torch.uint8
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(before, x @ packed.values(torch.float32).T)
    assert "64 -> 96, Q8_0" in repr(layer)


def test_embedding_rows(tensors):
    values = tensors["text_embedding.2.weight"]
    table = QuantEmbedding(Packed(torch.from_numpy(encode(values, F16)), F16, tuple(values.shape)))
    ids = torch.tensor([[3, 63], [3, 0]])
    torch.testing.assert_close(table(ids), values[ids], rtol=1e-3, atol=1e-4)


def test_umt5_in_float16_file(tmp_path):
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=50, dim=32, ffn_dim=64, n_layers=2, n_heads=2, head_dim=16, n_buckets=32)
    plain = UMT5Encoder(config).eval()
    path = write_gguf(tmp_path / "t5.gguf", plain.state_dict(), lambda n, v: F16, config.metadata)
    model, metadata = load_umt5(path, compute_dtype=torch.float32)
    assert replace(model.config, eps=config.eps) == config
    assert metadata["general.architecture"] == "t5encoder"
    ids = torch.tensor([[4, 9, 1]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-2, atol=1e-2)


VAE_CONFIG = VAEConfig(8, 16, (8, 8), 1, (True,))


def vae_tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in WanVAE(VAE_CONFIG).named_parameters()}
    return {name: torch.randn(shape, generator=rng) * 0.1 for name, shape in shapes.items()}


def check_bf16(path):
    return check_vae(path, compute_dtype=torch.bfloat16)


def test_vae_convolutions_in_compute_dtype_norms_in_float32(tmp_path):
    model = load_vae(write_gguf(tmp_path / "vae.gguf", vae_tensors()), compute_dtype=torch.bfloat16)
    assert model.config == VAE_CONFIG
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {d for n, d in dtypes.items() if n.endswith("gamma")} == {torch.float32}
    assert {d for n, d in dtypes.items() if not n.endswith("gamma")} == {torch.bfloat16}


def test_what_a_vae_takes_is_told_without_reading_it(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "vae.gguf", vae_tensors())
    model = load_vae(path, compute_dtype=torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(Packed, "values", lambda *_: pytest.fail("numbers were read"))
    assert check_bf16(path) == (VAE_CONFIG, size)
    rest = dict(list(vae_tensors().items())[:-1])
    with pytest.raises(WeightError, match="missing"):
        check_bf16(write_gguf(tmp_path / "short.gguf", rest))


def test_vae_without_temporal_taps_is_read_as_stored(tmp_path):
    padded, short = vae_tensors(), {}
    for name, values in padded.items():
        if "samples" in name and values.shape[2:] == (3, 3, 3):
            values[:, :, :2] = 0
            values = values[:, :, 2:]
        short[name] = values
    paths = write_gguf(tmp_path / "padded.gguf", padded), write_gguf(tmp_path / "short.gguf", short)
    models = [load_vae(path, compute_dtype=torch.float32) for path in paths]
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    z = torch.randn(1, 16, 2, 2, 2)
    torch.testing.assert_close(models[0].decode(z), models[1].decode(z), rtol=0, atol=0)


# ---------------------------------------------------------------- what is wrong is said


def test_missing_tensor_is_named(tmp_path, tensors):
    rest = {name: values for name, values in tensors.items() if name != "blocks.2.self_attn.norm_q.weight"}
    with pytest.raises(WeightError, match=r"norm_q\.weight missing \(file a\.gguf, arch wan_vace\)"):
        load_wan(write_gguf(tmp_path / "a.gguf", rest))


def test_left_over_tensors_are_named(tmp_path, tensors):
    more = {**tensors, **{f"extra.{i}": torch.zeros(2) for i in range(6)}}
    with pytest.raises(WeightError, match=r"6 tensors: extra\.0, .* extra\.3 and 2 more unknown"):
        load_wan(write_gguf(tmp_path / "a.gguf", more))


def test_image_to_video_checkpoint_is_recognised(tmp_path, tensors):
    more = {**tensors, "img_emb.proj.0.weight": torch.zeros(4)}
    with pytest.raises(WeightError, match="image-to-video checkpoint"):
        load_wan(write_gguf(tmp_path / "a.gguf", more))


def test_wrong_shape_says_got_expected_where(tmp_path, tensors):
    wrong = {**tensors, "blocks.1.norm3.bias": torch.zeros(63)}
    message = r"norm3\.bias: shape \[63\] but \[64\] expected \(file a\.gguf, arch wan_vace\)"
    with pytest.raises(WeightError, match=message):
        load_wan(write_gguf(tmp_path / "a.gguf", wrong))


def test_transposed_weight_is_refused(tmp_path, tensors):
    wrong = {**tensors, "blocks.1.ffn.2.weight": tensors["blocks.1.ffn.2.weight"].t().contiguous()}
    with pytest.raises(WeightError, match=r"ffn\.2\.weight: shape \[96, 64\] but \[64, 96\]"):
        load_wan(write_gguf(tmp_path / "a.gguf", wrong))


def test_unfinished_conversion_is_explained(tmp_path, tensors):
    rest = {name: values for name, values in tensors.items() if values.ndim != 5}
    with pytest.raises(WeightError, match=r"patch_embedding\.weight' is missing.*was not finished"):
        load_wan(write_gguf(tmp_path / "a.gguf", rest))


@pytest.mark.parametrize("load", [load_wan, load_vae, check_bf16, load_umt5])
def test_another_model_is_refused(tmp_path, load):
    with pytest.raises(WeightError, match="not a"):
        load(write_gguf(tmp_path / "a.gguf", {"some.weight": torch.zeros(4, 4)}))


def test_wan22_vae_is_refused(tmp_path):
    name = "decoder.upsamples.0.upsamples.0.residual.0.gamma"
    path = write_gguf(tmp_path / "a.gguf", {name: torch.zeros(4)})
    with pytest.raises(WeightError, match=r"Wan 2\.2 VAE"):
        load_vae(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileError, match="cannot be opened"):
        open_weights(tmp_path / "nothing.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(WeightError, match="neither GGUF, safetensors nor"):
        open_weights(tmp_path / "page.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(WeightError, match="neither GGUF"):
        open_weights(tmp_path / "empty.gguf")


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _entry(dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    """A file of four data bytes with one tensor."""
    header = {"a": dict(dtype=dtype, shape=shape, data_offsets=offsets)}
    return _safetensors(json.dumps(header).encode(), b"1234")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "header of 1099511627776 bytes"),
        (_safetensors(b'{"a": '), "not JSON"),
        (_safetensors(b'{"a": 1}'), "malformed"),
        (_safetensors(b'{"__metadata__": 3}'), "malformed"),
        (_entry("F32", [2], [0, 8]), "has bytes"),
        (_entry("F32", [2], [0, 4]), "has bytes"),
        (_entry("F32", [-1, -1], [0, 4]), "has bytes"),
        (_entry("F8_E4M3", [4], [0, 4]), "GGUF version"),
    ],
)
def test_damaged_safetensors(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WeightError, match=message):
        open_weights(tmp_path / "a.safetensors")


def test_checkpoints_of_other_things(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(WeightError, match="expected a dictionary of tensors"):
        open_weights(tmp_path / "a.pth")
    torch.save({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / "b.pth")
    with pytest.raises(WeightError, match=r"torch\.int64"):
        open_weights(tmp_path / "b.pth")


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(WeightError, match="cannot be read as a PyTorch checkpoint"):
        open_weights(tmp_path / "a.pth")


def test_loading_does_not_import_the_compiler(tmp_path, tensors):
    """Arithmetic on meta tensors does, for 1.5 s: initial values must not need it."""
    path = write_gguf(tmp_path / "a.gguf", tensors)
    code = "import sys; from mutoscope.engine.weights import *; load_wan(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, str(path)]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert "torch._dynamo" not in modules
