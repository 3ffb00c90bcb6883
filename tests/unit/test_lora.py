"""LoRA: every way of naming keys, the side path against merged weights, and no trace afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mutoscope.engine import jit, lora, lora_files
from mutoscope.engine.int8 import int8_is_fast
from mutoscope.engine.linear import QuantLinear
from mutoscope.engine.lora import Attached, SidePath
from mutoscope.engine.lora_files import read_lora
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import generate
from mutoscope.engine.wan import WanModel, diffusers_name, our_names, rope_table
from mutoscope.engine.weights import load_wan
from mutoscope.errors import FileError, WeightError
from mutoscope.events import Frames, Result, Step
from mutoscope.manifest import read_manifest
from mutoscope.request import GenerationRequest
from tests.tiny import DIT

RANK, ALPHA = 3, 1.5
LAYERS = {  # ours: diffusers
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.0.cross_attn.v": "blocks.0.attn2.to_v",
    "blocks.1.cross_attn.q": "blocks.1.attn2.to_q",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
    "vace_blocks.0.before_proj": "vace_blocks.0.proj_in",
    "vace_blocks.0.after_proj": "vace_blocks.0.proj_out",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
REQUEST = GenerationRequest(prompt="a red ball falls", seed=1, frames=5, steps=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bare(tiny_model: Path, dtype: torch.dtype = torch.float32) -> WanModel:
    return load_wan(tiny_model / "dit.gguf", compute_dtype=dtype)


def pairs_of(model: WanModel, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A random pair for each of `LAYERS` that changes the layer about as much as it is."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        n, k = layer.out_features, layer.in_features
        out[name] = (
            torch.randn(RANK, k, generator=rng) / k**0.5,
            torch.randn(n, RANK, generator=rng) / RANK**0.5,
        )
    return out


@torch.inference_mode()
def answer(model: WanModel) -> Tensor:
    """Everything a LoRA can change takes part: text, time, the side branch."""
    rng = torch.Generator().manual_seed(7)
    text = model.text_context(torch.randn(1, 5, DIT.text_dim, generator=rng), [4])
    vace = model.vace_tokens(torch.randn(1, DIT.vace_in_dim, 2, 4, 4, generator=rng))
    x = torch.randn(1, DIT.in_dim, 2, 4, 4, generator=rng)
    time = model.time_modulation(torch.tensor([500.0]))
    return model(x, time, text, rope_table((2, 2, 2), DIT.head_dim), vace)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def merged(tiny_model: Path, deltas: Mapping[str, Tensor]) -> Tensor:
    """The answer of the model whose weights have been changed, computed by nn.Linear."""
    model = bare(tiny_model)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.weight.data = layer.weight.values(torch.float32) + delta
        plain.bias.data = layer.bias.clone()
        model.set_submodule(name, plain)
    return answer(model)


def attached(model: WanModel, *files: tuple[Path, float]) -> Attached:
    state = Attached()
    state.attach(model, state.open(model, files))
    return state


# -- names ---------------------------------------------------------------------------------------------------

Form = Callable[[str, str], dict[str, str]]


def _form(name: Callable[[str, str], str], down: str, up: str, alpha: str = "") -> Form:
    def form(ours: str, theirs: str) -> dict[str, str]:
        stem = name(ours, theirs)
        return {"down": stem + down, "up": stem + up} | ({"alpha": stem + alpha} if alpha else {})

    return form


A, B = ".lora_A.weight", ".lora_B.weight"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
FORMS: dict[str, Form] = {
    "diffusers": _form(lambda o, t: f"transformer.{t}", A, B),
    "old diffusers": _form(lambda o, t: t, ".lora.down.weight", ".lora.up.weight"),
    "peft": _form(lambda o, t: f"base_model.model.{o}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft of diffusers": _form(lambda o, t: f"base_model.model.transformer.{t}", A, B),
    "kohya": _form(lambda o, t: "lora_unet_" + o.replace(".", "_"), DOWN, UP, ".alpha"),
    "kohya, two underscores": _form(lambda o, t: "lora_unet__" + o.replace(".", "_"), DOWN, UP, ".alpha"),
    "kohya of diffusers": _form(lambda o, t: "lora_unet_" + t.replace(".", "_"), DOWN, UP, ".alpha"),
    "lycoris": _form(lambda o, t: "lycoris_" + t.replace(".", "_"), DOWN, UP, ".alpha"),
    "comfy": _form(lambda o, t: f"diffusion_model.{o}", DOWN, UP, ".alpha"),
    "comfy, A and B": _form(lambda o, t: f"diffusion_model.{o}", A, B),
    "lightx2v": _form(lambda o, t: f"diffusion_model.{o}", ".lora_down", ".lora_up"),
    "diffsynth": _form(lambda o, t: f"pipe.dit.{o}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "no prefix": _form(lambda o, t: o, ".lora_A", ".lora_B"),
}


def write(path: Path, form: Form, pairs: Mapping[str, tuple[Tensor, Tensor]], **more: Tensor) -> float:
    """The factor of the pairs in the file."""
    tensors: dict[str, Tensor] = {}
    scale = 1.0
    for name, (down, up) in pairs.items():
        keys = form(name, LAYERS[name])
        tensors |= {keys["down"]: down, keys["up"]: up}
        if "alpha" in keys:
            tensors[keys["alpha"]], scale = torch.tensor(ALPHA), ALPHA / RANK
    save_file(tensors | more, path)
    return scale


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_the_merged_model(form: Form, tiny_model: Path, tmp_path: Path) -> None:
    model = bare(tiny_model)
    pairs = pairs_of(model)
    scale = write(tmp_path / "x.safetensors", form, pairs)
    expected = merged(tiny_model, {n: 0.8 * scale * (up @ down) for n, (down, up) in pairs.items()})
    without = answer(model)
    attached(model, (tmp_path / "x.safetensors", 0.8))
    assert error(answer(model), expected) < 3e-6  # 3 times the measured 1e-6
    assert error(without, expected) > 0.3


def test_a_lora_without_its_alpha_is_another_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test above."""
    model = bare(tiny_model)
    pairs = pairs_of(model)
    scale = write(tmp_path / "x.safetensors", FORMS["comfy"], pairs)
    monkeypatch.setattr(lora_files.LoraFile, "_scale", lambda *_: 1.0)
    attached(model, (tmp_path / "x.safetensors", 1.0))
    expected = merged(tiny_model, {n: scale * (up @ down) for n, (down, up) in pairs.items()})
    assert error(answer(model), expected) > 0.05


@pytest.mark.parametrize(("settings", "scale"), [
    ({"lora_alpha": 6}, 2.0), ({"lora_alpha": 3, "use_rslora": True}, 3**0.5), ({"lora_alpha": None}, 1.0),
    ({"lora_alpha": 3, "alpha_pattern": {"ffn.0": 12}}, {"blocks.0.ffn.0": 4.0}),
])  # fmt: skip
@pytest.mark.parametrize("place", ["metadata", "beside"])
def test_alpha_of_peft(settings: Any, scale: Any, place: str, tiny_model: Path, tmp_path: Path) -> None:
    """From the metadata that diffusers writes, or from the file beside."""
    model = bare(tiny_model)
    tensors = {}
    for name, (down, up) in pairs_of(model).items():
        tensors |= {f"transformer.{name}{A}": down, f"transformer.{name}{B}": up}
    path = tmp_path / "adapter_model.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    save_file(tensors, path, metadata=metadata if place == "metadata" else None)
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    pairs = read_lora(path).changes(model).pairs
    for name in LAYERS:
        expected = scale.get(name, 1.0) if isinstance(scale, dict) else scale
        assert pairs[f"{name}.weight"].scale == pytest.approx(expected)


def test_names_of_diffusers_lead_back() -> None:
    for ours, theirs in LAYERS.items():
        assert diffusers_name(ours) == theirs
        assert our_names([f"{theirs}.weight"]) == {f"{theirs}.weight": f"{ours}.weight"}
    assert diffusers_name("head.modulation") == "scale_shift_table"


# -- differences ---------------------------------------------------------------------------------------------

DIFFERENCES = {
    "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    "diffusion_model.blocks.0.self_attn.norm_k.diff": "blocks.0.self_attn.norm_k.weight",
    "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm3.weight",
    "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
    "diffusion_model.blocks.0.diff_m": "blocks.0.modulation",
    "diffusion_model.head.modulation.diff": "head.modulation",
    "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    "diffusion_model.patch_embedding.diff_b": "patch_embedding.bias",
    "diffusion_model.head.head.diff": "head.head.weight",
    "diffusion_model.blocks.1.ffn.2.diff": "blocks.1.ffn.2.weight",
}


def test_differences_of_whole_parameters(tiny_model: Path, tmp_path: Path) -> None:
    """Norms, biases, modulation, matrices; a bias of a layer that has a pair too."""
    rng = torch.Generator().manual_seed(3)
    model = bare(tiny_model)
    shapes = lora_files._shapes(model)
    tensors = {key: 0.1 * torch.randn(shapes[name], generator=rng) for key, name in DIFFERENCES.items()}
    (name, (down, up)), *_ = pairs_of(model).items()
    pair = {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
    save_file(tensors | pair, tmp_path / "x.safetensors")
    expected = bare(tiny_model)
    for key, target in DIFFERENCES.items():
        path, _, kind = target.rpartition(".")
        module = expected.get_submodule(path)
        if isinstance(module, QuantLinear) and kind == "weight":
            continue
        old = getattr(module, kind)
        new = old + 0.5 * tensors[key]
        setattr(
            module, kind, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        )
    for target, delta in {
        name: up @ down,
        "head.head": tensors["diffusion_model.head.head.diff"],
        "blocks.1.ffn.2": tensors["diffusion_model.blocks.1.ffn.2.diff"],
    }.items():
        layer = expected.get_submodule(target)
        assert isinstance(layer, QuantLinear)
        assert layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.weight.data, plain.bias.data = layer.weight.values(torch.float32) + 0.5 * delta, layer.bias
        expected.set_submodule(target, plain)
    state = attached(model, (tmp_path / "x.safetensors", 0.5))
    assert error(answer(model), answer(expected)) < 3e-6
    for key in DIFFERENCES:  # none of them is without effect
        save_file({k: v for k, v in tensors.items() if k != key} | pair, tmp_path / "less.safetensors")
        state.detach()
        state.attach(model, state.open(model, [(tmp_path / "less.safetensors", 0.5)]))
        assert error(answer(model), answer(expected)) > 1e-4, key


def test_pairs_of_the_patch_embedding_and_biases_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    """The one is a convolution; the other counts alpha / rank times, as the pair does."""
    rng = torch.Generator().manual_seed(4)
    model = bare(tiny_model)
    old = model.patch_embedding.weight.clone()
    down = torch.randn(RANK, DIT.in_dim, 1, 2, 2, generator=rng)
    up = torch.randn(DIT.dim, RANK, 1, 1, 1, generator=rng)
    layer, bias = "blocks.0.ffn.0", torch.randn(DIT.ffn_dim, generator=rng)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        f"diffusion_model.{layer}{A}": torch.zeros(RANK, DIT.dim),
        f"diffusion_model.{layer}{B}": torch.zeros(DIT.ffn_dim, RANK),
        f"diffusion_model.{layer}.lora_B.bias": bias,
        f"diffusion_model.{layer}.alpha": torch.tensor(ALPHA),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    attached(model, (tmp_path / "x.safetensors", 1.0))
    delta = (up.flatten(1) @ down.flatten(1)).view_as(old)
    assert torch.allclose(model.patch_embedding.weight, old + delta, atol=1e-6)
    side = model.get_submodule(layer)
    assert isinstance(side, SidePath)
    assert torch.allclose(side.layer.bias, bare(tiny_model).get_submodule(layer).bias + ALPHA / RANK * bias)  # type: ignore[operator, arg-type]


# -- several, and none -----------------------------------------------------------------------------------------


def test_several_are_one_pair_of_products(tiny_model: Path, tmp_path: Path) -> None:
    model = bare(tiny_model)
    files = []
    total = dict.fromkeys(LAYERS, torch.zeros(()))
    for seed, strength in ((1, 0.7), (2, -0.4), (3, 0.2)):
        pairs = pairs_of(model, seed)
        path = tmp_path / f"{seed}.safetensors"
        write(path, FORMS["diffusers"], pairs)
        files.append((path, strength))
        total = {n: total[n] + strength * (up @ down) for n, (down, up) in pairs.items()}
    attached(model, *files)
    side = model.get_submodule("blocks.0.ffn.0")
    assert isinstance(side, SidePath)
    assert (side.down.shape, side.up.shape) == ((3 * RANK, DIT.dim), (DIT.ffn_dim, 3 * RANK))
    assert error(answer(model), merged(tiny_model, total)) < 3e-6


def test_gelu_after_the_addition_in_bfloat16(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass with the addition where there are kernels, and apart."""
    pairs = pairs_of(bare(tiny_model))
    write(tmp_path / "x.safetensors", FORMS["diffusers"], {k: pairs[k] for k in ("blocks.0.ffn.0",)})
    exact = merged(tiny_model, {"blocks.0.ffn.0": pairs["blocks.0.ffn.0"][1] @ pairs["blocks.0.ffn.0"][0]})
    model = bare(tiny_model, torch.bfloat16)
    without = error(answer(model), exact)
    errors = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(jit, "available", lambda: False)
        state = attached(model, (tmp_path / "x.safetensors", 1.0))
        side = model.get_submodule("blocks.0.ffn.0")
        assert isinstance(side, SidePath)
        assert (side.within is not None) == (jit.available() and int8_is_fast())
        errors.append(error(answer(model), exact))
        state.detach()
    assert max(errors) < 0.01 < 0.03 < without, errors  # measured 0.003, 0.003 and 0.044


@pytest.mark.skipif(not int8_is_fast(), reason="needs VNNI or AMX instructions")
def test_beside_integer_products(tiny_model: Path, tmp_path: Path) -> None:
    pairs = pairs_of(bare(tiny_model))
    write(tmp_path / "x.safetensors", FORMS["diffusers"], pairs)
    exact = merged(tiny_model, {name: up @ down for name, (down, up) in pairs.items()})
    model = load_wan(tiny_model / "dit.gguf", precision="int8")
    without = error(answer(model), exact)
    attached(model, (tmp_path / "x.safetensors", 1.0))
    got = error(answer(model), exact)
    assert got < 0.03 < 0.5 < without, (got, without)


def frames_of(models: Models, request: GenerationRequest) -> np.ndarray:
    return np.concatenate([e.frames for e in generate(models, request) if isinstance(e, Frames)])


def test_swapped_between_requests_without_a_trace(tiny_model: Path, tmp_path: Path) -> None:
    models = Models(read_manifest(tiny_model / "model.toml"))
    pairs = pairs_of(models.dit)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    write(one, FORMS["kohya"], pairs)
    bias = {"diffusion_model.blocks.0.norm3.diff": torch.ones(DIT.dim)}
    write(other, FORMS["comfy"], {k: pairs[k] for k in list(pairs)[:2]}, **bias)
    before = dict(models.dit.named_modules())
    parameters = {n: p.data_ptr() for n, p in models.dit.named_parameters()}
    plain = frames_of(models, REQUEST)
    first = frames_of(models, replace(REQUEST, loras=((one, 1.0),)))
    second = frames_of(models, replace(REQUEST, loras=((other, 1.0),)))
    assert np.array_equal(frames_of(models, replace(REQUEST, loras=((one, 1.0),))), first)
    assert np.array_equal(frames_of(models, replace(REQUEST, loras=((one, 0.0),))), plain)
    assert np.array_equal(frames_of(models, REQUEST), plain)
    assert dict(models.dit.named_modules()) == before
    assert {n: p.data_ptr() for n, p in models.dit.named_parameters()} == parameters
    assert not any(np.array_equal(a, b) for a, b in ((plain, first), (plain, second), (first, second)))


def test_requests_in_turns_keep_their_own(tiny_model: Path, tmp_path: Path) -> None:
    models = Models(read_manifest(tiny_model / "model.toml"))
    write(tmp_path / "x.safetensors", FORMS["kohya"], pairs_of(models.dit))
    requests = [REQUEST, replace(REQUEST, loras=((tmp_path / "x.safetensors", 1.0),))]
    alone = [frames_of(models, request) for request in requests]
    seen: list[list[np.ndarray]] = [[], []]
    steps = 0
    for events in zip_longest(*(generate(models, request) for request in requests)):
        steps += sum(isinstance(e, Step) for e in events)
        for frames, event in zip(seen, events, strict=True):
            if isinstance(event, Frames):
                frames.append(event.frames)
    assert steps == 4
    for frames, expected in zip(seen, alone, strict=True):
        assert np.array_equal(np.concatenate(frames), expected)


def test_the_result_names_its_loras(tiny_model: Path, tmp_path: Path) -> None:
    models = Models(read_manifest(tiny_model / "model.toml"))
    path = tmp_path / "x.safetensors"
    write(path, FORMS["kohya"], pairs_of(models.dit))
    *_, result = generate(models, replace(REQUEST, loras=((path, None),)))
    assert isinstance(result, Result)
    assert result.info["request"]["loras"] == [[str(path), 1.0]]


def test_a_file_that_changes_is_read_again(tiny_model: Path, tmp_path: Path) -> None:
    models = Models(read_manifest(tiny_model / "model.toml"))
    path = tmp_path / "x.safetensors"
    request = replace(REQUEST, loras=((path, 1.0),))
    pairs = pairs_of(models.dit)
    write(path, FORMS["kohya"], pairs)
    first = frames_of(models, request)
    path.unlink()
    write(path, FORMS["diffusers"], pairs)
    assert not np.array_equal(frames_of(models, request), first)


# -- refusals ------------------------------------------------------------------------------------------------


def _refused(tiny_model: Path, tmp_path: Path, tensors: Mapping[str, Tensor]) -> str:
    model = bare(tiny_model)
    save_file(dict(tensors), tmp_path / "bad.safetensors")
    modules = dict(model.named_modules())
    with pytest.raises(WeightError) as caught:
        attached(model, (tmp_path / "bad.safetensors", 1.0))
    assert dict(model.named_modules()) == modules
    assert "bad.safetensors" in str(caught.value)
    return str(caught.value)


Q = "diffusion_model.blocks.0.self_attn.q"
GOOD = {f"{Q}{A}": torch.zeros(RANK, DIT.dim), f"{Q}{B}": torch.zeros(DIT.dim, RANK)}


@pytest.mark.parametrize(("more", "told"), [
    ({"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(1)}, "blocks.9.self_attn.q"),
    ({"lora_te_x.lora_down.weight": torch.zeros(1)}, "text encoder"),
    ({"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.zeros(1)}, "image-to-video"),
    ({f"{Q}.dora_scale": torch.zeros(1)}, "DoRA"),
    ({f"{Q}.lokr_w1": torch.zeros(1)}, "LoKr"),
    ({f"{Q}.weight": torch.zeros(1)}, "does not look like a LoRA"),
    ({f"{Q}.alpha": torch.zeros(2)}, "one finite number"),
    ({f"{Q}.alpha": torch.tensor(float("nan"))}, "one finite number"),
    ({f"{Q}.lora_down.weight": torch.zeros(RANK, DIT.dim)}, "say the same"),
    ({f"{Q}.diff_b": torch.zeros(DIT.dim + 1)}, "[33]"),
    ({f"{Q}.diff_m": torch.zeros(DIT.dim)}, "modulation"),
    ({"diffusion_model.blocks.0.self_attn.k.lora_A.weight": torch.zeros(1, DIT.dim)}, "has no 'up' half"),
    ({"diffusion_model.blocks.0.self_attn.k.alpha": torch.zeros(())}, "stands alone"),
    ({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(RANK, DIT.dim),
      "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(DIT.dim, RANK)}, "the same layer"),
    ({f"{Q}{A}": torch.zeros(RANK, DIT.dim + 1)}, "[rank, 32]"),
    ({f"{Q}{B}": torch.zeros(DIT.dim, RANK + 1)}, "of another size"),
])  # fmt: skip
def test_refusals(more: dict[str, Tensor], told: str, tiny_model: Path, tmp_path: Path) -> None:
    assert told in _refused(tiny_model, tmp_path, GOOD | more)


def test_a_model_file_is_no_lora(tiny_model: Path) -> None:
    with pytest.raises(WeightError, match="does not look like a LoRA"):
        read_lora(tiny_model / "dit.gguf")
    with pytest.raises(FileError):
        read_lora(tiny_model / "nothing.safetensors")


def test_a_failure_half_way_leaves_the_model_as_it_was(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bare(tiny_model)
    write(tmp_path / "x.safetensors", FORMS["kohya"], pairs_of(model))
    wrap, calls = lora._wrap, []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return wrap(*args)

    monkeypatch.setattr(lora, "_wrap", fails)
    modules = dict(model.named_modules())
    with pytest.raises(MemoryError):
        attached(model, (tmp_path / "x.safetensors", 1.0))
    assert dict(model.named_modules()) == modules
