"""LoRA files by name, and whether a model can take them, told by headers as the engine tells it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mutoscope import cli
from mutoscope.catalog import find_model
from mutoscope.digests import sha256_of
from mutoscope.engine.headers import read_header
from mutoscope.engine.lora_files import read_lora
from mutoscope.engine.weights import load_wan
from mutoscope.errors import FileError, RequestError, WeightError
from mutoscope.loras import Shelf, check_cache, check_lora
from mutoscope.manifest import ModelManifest, read_manifest
from mutoscope.planning import describe, plan
from mutoscope.request import GenerationRequest
from tests.making_loras import make_lora


@pytest.fixture
def manifest(tiny_model: Path) -> ModelManifest:
    return read_manifest(tiny_model / "model.toml")


@pytest.fixture
def lora(tiny_model: Path, tmp_path: Path) -> Path:
    told = {"modelspec.title": "Ink", "modelspec.trigger_phrase": "in ink"}
    return make_lora(tmp_path / "loras" / "ink.safetensors", tiny_model / "dit.gguf", metadata=told)


WRONG = {
    "another size": lambda t: {
        k: np.zeros((2, 7), np.float32) if "ffn.0.lora_A" in k else v for k, v in t.items()
    },
    "a layer too many": lambda t: {
        **t,
        "diffusion_model.blocks.77.ffn.0.lora_A.weight": np.zeros((2, 2), np.float32),
    },
    "half a pair": lambda t: {k: v for k, v in t.items() if "ffn.2.lora_B" not in k},
    "an image model's": lambda t: {
        **t,
        "diffusion_model.blocks.0.cross_attn.k_img.diff": np.zeros(3, np.float32),
    },
    "a bias of another length": lambda t: {
        **t,
        "diffusion_model.blocks.0.ffn.0.diff_b": np.zeros(3, np.float32),
    },
}


def test_what_fits_the_engine_fits_the_headers(tiny_model: Path, manifest: ModelManifest, lora: Path) -> None:
    """Every kind of parameter that the loaded model has is there in the file's header, in the same shape."""
    model = load_wan(tiny_model / "dit.gguf")
    tensors = load_file(lora) | {
        f"diffusion_model.{key}": np.zeros([int(n) for n in shape], np.float32)
        for key, shape in (
            ("patch_embedding.diff", model.patch_embedding.weight.shape),
            ("blocks.0.diff_m", model.blocks[0].modulation.shape),
            ("head.modulation.diff", model.head.modulation.shape),
            ("vace_blocks.0.norm3.diff_b", model.vace_blocks[0].norm3.bias.shape),
        )
    }
    save_file(tensors, lora)
    assert len(read_lora(lora).changes(model).pairs) == 4
    check_lora(lora, manifest)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_what_the_engine_refuses_is_refused_by_headers_in_its_words(
    change: object, tiny_model: Path, manifest: ModelManifest, lora: Path
) -> None:
    save_file(change(load_file(lora)), lora)  # type: ignore[operator]
    with pytest.raises(WeightError) as theirs:
        read_lora(lora).changes(load_wan(tiny_model / "dit.gguf"))
    with pytest.raises(WeightError) as ours:
        check_lora(lora, manifest)
    assert theirs.value.message.rstrip(".") in ours.value.message
    assert manifest.name in ours.value.message
    assert ours.value.hint == theirs.value.hint


def test_a_lora_of_one_model_is_refused_by_another(lora: Path) -> None:
    with pytest.raises(WeightError, match=r"do not fit .* expected \(model pocket\)"):
        check_lora(lora, find_model("pocket"))


def test_what_a_file_becomes_counts(tiny_model: Path, manifest: ModelManifest, lora: Path) -> None:
    check_lora(lora, manifest)
    save_file(WRONG["half a pair"](load_file(lora)), lora)
    with pytest.raises(WeightError, match="has no 'up' half"):
        check_lora(lora, manifest)


def test_a_shelf(lora: Path) -> None:
    folder = lora.parent
    (folder / "broken.safetensors").write_bytes(b"\x00" * 20)
    (folder / "old.pt").write_bytes(b"PK")
    (folder / "notes.txt").write_text("not a LoRA")
    (folder / ".hidden.safetensors").write_bytes(lora.read_bytes())
    (folder / "ink.gguf").write_bytes(b"GGUF")
    shelf = Shelf(folder)
    assert [found.name for found in shelf.all()] == ["broken", "ink.gguf", "ink.safetensors", "old"]
    ink = shelf.get("ink.safetensors")
    assert (ink.rank, ink.layers, ink.title, ink.trigger) == (2, 4, "Ink", "in ink")
    (folder / "ink.gguf").unlink()
    assert shelf.get("ink").path == lora == shelf.get("ink.safetensors").path
    with pytest.raises(FileError, match="neither GGUF nor safetensors"):
        shelf.get("old")
    with pytest.raises(RequestError, match=r"LoRA '../ink' is unknown; known: broken, ink, old"):
        shelf.get("../ink")
    with pytest.raises(RequestError, match="there are none"):
        Shelf(folder / "nothing").get("ink")


def test_caches_need_numbers(manifest: ModelManifest, tiny_model: Path) -> None:
    check_cache("easy=0.1", manifest)
    for cache in ("tea", "mag=0.2"):
        with pytest.raises(RequestError, match="none for one of width"):
            check_cache(cache, manifest)
    own = replace(manifest, files=replace(manifest.files, magnitudes=manifest.files.vae))
    check_cache("mag=0.2", own)


def test_what_is_embedded_names_the_file_and_its_content(manifest: ModelManifest, lora: Path) -> None:
    request = plan(GenerationRequest(prompt="a ball", seed=1, loras=((lora, 0.5),)), manifest)
    info = describe(request, manifest)
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert info["lora_sha256"] == {str(lora): digest}
    assert sha256_of(lora) == digest
    lora.write_bytes(lora.read_bytes() + b"x")
    assert sha256_of(lora) != digest
    assert "lora_sha256" not in describe(replace(request, loras=()), manifest)


def test_the_command_line_knows_the_shelf(
    tiny_model: Path,
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path))
    assert cli.run(["loras", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["loras"]
    assert (row["name"], row["rank"], row["models"], row["sha256"]) == ("ink", 2, [], sha256_of(lora))
    out = tmp_path / "x.mp4"
    words = ["generate", "a ball", "--model", str(tiny_model), "--steps", "1", "--frames", "5", "--seed", "1"]
    assert cli.run([*words, "--lora", "ink=0.5", "-o", str(out)]) == 0
    capsys.readouterr()
    assert cli.run(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"ink.safetensors 0.5 (sha256 {sha256_of(lora)[:12]})" in text
    assert f"--lora={lora}=0.5" in text


def test_headers_of_both_kinds_agree_with_the_engines_reader(tiny_model: Path, lora: Path) -> None:
    from mutoscope.engine.weights import open_weights

    for path in (tiny_model / "dit.gguf", lora):
        header, source = read_header(path), open_weights(path)
        assert {n: (t.shape, t.type_id, t.nbytes) for n, t in header.tensors.items()} == {
            n: (t.shape, t.type_id, t.nbytes) for n, t in source.tensors.items()
        }
