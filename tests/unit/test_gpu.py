"""The engine on a device with memory of its own, without one: on a CUDA that computes nothing (tests/fake_cuda.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mutoscope import Engine
from mutoscope.engine import memory, pipeline
from mutoscope.engine.devices import open_device
from mutoscope.engine.linear import Packed, QuantLinear, Unpacked
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import generate
from mutoscope.engine.precision import chooser
from mutoscope.engine.wan import WanModel
from mutoscope.errors import RequestError, ResourceError
from mutoscope.events import Frames, Preview, Step
from mutoscope.manifest import read_manifest
from mutoscope.request import Conditioning, GenerationRequest, Keyframe
from mutoscope.runner import WanRunner
from mutoscope.settings import Settings
from tests.fake_cuda import CUDA, TOTAL_BYTES, fake_cuda

GIB = 1 << 30
PICTURE = np.zeros((32, 32, 3), np.uint8)
SHOWN = Conditioning(keyframes=(Keyframe(image=PICTURE),), references=(PICTURE,))
REQUEST = GenerationRequest(
    prompt="a red ball falls", seed=1, frames=1, steps=2, conditioning=Conditioning(strength=0.0)
)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def models_of(folder: Path, **options: Any) -> Models:
    return Models(read_manifest(folder / "model.toml"), "cuda:0", **options)


def lora_file(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    names = ("blocks.0.ffn.0", "blocks.1.self_attn.q", "vace_blocks.0.after_proj")
    tensors = {}
    for name in names:
        n, k = (64, 32) if "ffn" in name else (32, 32)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
            torch.ones(2, k),
            torch.ones(n, 2),
        )
    save_file(tensors, path)
    return path


# -- one device ----------------------------------------------------------------------------------------------


TILED = replace(
    REQUEST,
    frames=5,
    steps=3,
    width=288,
    height=32,
    conditioning=SHOWN,
    cache="easy=0.05",
    guidance_interval=(0.3, 1.0),
)


@pytest.mark.parametrize(
    ("request_", "with_lora", "precision", "products"),
    [
        (TILED, False, "auto", {F32, BF16}),
        (REQUEST, True, "exact", {F32}),
        (
            replace(REQUEST, sampler="euler", guidance_kind="zero-star=1"),
            True,
            "int8",
            {F32, BF16, torch.int8},
        ),
    ],
    ids=["shown", "lora", "int8"],
)
def test_no_two_devices_meet(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: GenerationRequest,
    with_lora: bool, precision: str, products: set[torch.dtype],
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "PREVIEW_STEPS", 1)
    loras = ((lora_file(tmp_path), 0.5),) if with_lora else ()
    with fake_cuda(monkeypatch) as seen:
        events = list(generate(models_of(tiny_model, precision=precision), replace(request_, loras=loras)))
    assert seen.products == products
    frames = [e.frames.shape for e in events if isinstance(e, Frames)]
    assert sum(shape[0] for shape in frames) == request_.frames
    assert any(isinstance(e, Preview) for e in events)


def test_two_devices_would_be_noticed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pipeline.rope_table
    monkeypatch.setattr(pipeline, "rope_table", lambda *args, device: table(*args))
    with fake_cuda(monkeypatch), pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        list(generate(models_of(tiny_model), REQUEST))


def test_noise_is_drawn_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        assert pipeline.sampler.noise((1, 2), 7).device.type == "cpu"


# -- memory --------------------------------------------------------------------------------------------------


def on_device(model: torch.nn.Module) -> set[str]:
    layers = ((path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear))
    return {path for path, m in layers if m.packed.device == CUDA}


def precisions(model: torch.nn.Module) -> set[Unpacked]:
    found = {m.precision for m in model.modules() if isinstance(m, QuantLinear)}
    return {p for p in found if isinstance(p, Unpacked)}


def test_the_text_encoder_is_never_there_as_a_whole(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda(monkeypatch):
        models = models_of(tiny_model)
        events = generate(models, REQUEST)
        next(e for e in events if getattr(e, "name", "") == "denoise")
        assert on_device(models.text[0]) == set()
        assert not any(p._buffers or p._held for p in precisions(models.text[0]))
        assert on_device(models.dit) == {"head.head", "vace_blocks.0.before_proj"}
        list(events)
        assert not any(p._buffers or p._held for p in precisions(models.dit)), "nothing is left for decoding"


def test_blocks_stay_if_they_fit_and_else_travel(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        roomy, tight = models_of(tiny_model), models_of(tiny_model)
        need = pipeline._check_models(tight, tight_request := pipeline.plan(REQUEST, tight.manifest), ())
        tight.memory_bytes = need.denoise
        for models, travelling in ((roomy, 0), (tight, 3)):
            events = generate(models, tight_request)
            next(e for e in events if isinstance(e, Step))
            assert models.stream is not None
            assert len(models.stream.travelling) == travelling
            events.close()  # type: ignore[attr-defined]
        tight.memory_bytes = need.denoise - 1
        with pytest.raises(ResourceError, match=r"allowed on cuda:0"):
            list(generate(tight, tight_request))


def test_what_may_be_used_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch, free_bytes=10 * GIB):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
        assert memory.available(CUDA) == 11 * GIB
        context = memory.RUNTIME_BYTES
        assert memory.allowed(CUDA, None) == context + int(0.9 * 13 * GIB)
        assert memory.allowed(CUDA, 4 * GIB) == 4 * GIB
        assert memory.allowed(CUDA, 99 * GIB) == context + 13 * GIB, "no more than it has"


def test_the_allocator_is_held_to_the_promise(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        shares: list[float] = []
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda s, device: shares.append(s))
        models_of(tiny_model, vram_bytes=8 * GIB)
        models_of(tiny_model)
        assert shares == [(8 * GIB - memory.RUNTIME_BYTES) / TOTAL_BYTES, 1.0]
        with pytest.raises(ResourceError, match=r"20\.0 GiB are allowed, cuda:0 has 16\.0 GiB"):
            models_of(tiny_model, vram_bytes=20 * GIB)


def test_a_full_device_says_what_may_help(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with fake_cuda(monkeypatch):
        models = models_of(tiny_model, vram_bytes=5 * GIB)
        monkeypatch.setattr(WanModel, "forward", full)
        with pytest.raises(ResourceError) as caught:
            list(generate(models, replace(REQUEST, frames=33)))
    assert caught.value.message.startswith("cuda:0 ran out of memory, though by the estimate 5.0 GiB")
    assert "--vram 4.0GiB" in caught.value.hint
    assert "21 frames" in caught.value.hint


# -- asking for it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["abacus", "cuda:0", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    if torch.cuda.is_available() and name == "cuda:0":
        pytest.skip("there is one")
    with pytest.raises(RequestError, match=f"--device {name}: cannot be used here") as caught:
        open_device(name)
    assert "There is cpu" in caught.value.hint


def test_a_promise_is_about_where_it_computes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="not for cpu"):
        Engine(tiny_model, device="cpu", vram="8GiB")
    with pytest.raises(RequestError, match="--compile is for GPUs"):
        Engine(tiny_model, device="cpu", compiled=True)
    with fake_cuda(monkeypatch), pytest.raises(RequestError, match="not on cuda:0"):
        models_of(tiny_model, memory_bytes=8 * GIB)


def test_workers_follow_the_settings(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(precision="exact", memory=3 * GIB, vram=5 * GIB, compile=True)
    manifest = read_manifest(tiny_model / "model.toml")
    runner = WanRunner("cpu", settings)
    runner.load(manifest)
    assert runner._models is not None
    assert (runner._models.precision, runner._models.memory_bytes) == ("exact", 3 * GIB)
    assert not runner._models.compiled
    with fake_cuda(monkeypatch):
        monkeypatch.setattr("mutoscope.engine.models.compiling.compile_blocks", lambda model: None)
        runner = WanRunner("cuda:0", settings)
        runner.load(manifest)
        assert runner._models is not None
        assert (runner._models.device, runner._models.memory_bytes) == (CUDA, 5 * GIB)
        assert runner._models.compiled
        runner.release()
    assert WanRunner("cpu", Settings())._settings.memory == 0


def test_precisions_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Packed(torch.empty(0), 0, (4096, 4096))

    def chosen(name: Any, path: str = "blocks.0.ffn.0") -> Any:
        return chooser(name, CUDA)(path, large)

    with fake_cuda(monkeypatch):
        assert type(chosen("auto")) is Unpacked, "not what the processor's library does in integers"
        assert chosen("auto").dtype == BF16
        assert chosen("int8").kind == torch.int8
        assert chosen("fp8").kind == torch.float8_e4m3fn
        assert chosen("fp8", "head.head").dtype == F32
        assert type(chosen("int8", "blocks.0.cross_attn.k")) is Unpacked
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        for name in ("int8", "fp8"):
            with pytest.raises(RequestError, match="compute capability"):
                chosen(name)
    with fake_cuda(monkeypatch, bf16=False):
        assert chosen("auto").dtype == F16
        assert chosen("bf16").dtype == BF16, "as it was asked for"
    with pytest.raises(RequestError, match="--precision fp8 needs an NVIDIA GPU"):
        chooser("fp8", torch.device("cpu"))


def test_the_text_encoder_has_no_float16(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch, bf16=False):
        models = models_of(tiny_model)
        assert models.dtype == F16
        layers = [m for m in models.text[0].modules() if isinstance(m, QuantLinear)]
        assert {layer.compute_dtype for layer in layers} == {F32}
