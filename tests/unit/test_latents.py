"""Latents on disk: what is saved is loaded, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mutoscope.engine import latents
from mutoscope.errors import FileError
from mutoscope.request import GenerationRequest

Z = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("frames", "references", "expected"), [(1, 0, 1), (5, 0, 2), (81, 0, 21), (81, 3, 24), (1, 1, 2)]
)
def test_shape(frames: int, references: int, expected: int) -> None:
    request = GenerationRequest(prompt="x", width=832, height=480, frames=frames)
    assert latents.shape(16, request, references) == (1, 16, expected, 60, 104)


def test_round_trip(tmp_path: Path) -> None:
    path, info = (
        tmp_path / "new" / "folder" / "x.safetensors",
        {"model": "tiny", "request": {"prompt": "Füße"}},
    )
    latents.save(path, Z, info)
    loaded, got = latents.load(path)
    assert torch.equal(loaded, Z)
    assert got == info
    assert list(path.parent.iterdir()) == [path]


def test_any_view_and_dtype_is_saved_as_float32(tmp_path: Path) -> None:
    latents.save(tmp_path / "x", Z.bfloat16()[:, :, 1:], {})
    loaded, _ = latents.load(tmp_path / "x")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, Z.bfloat16().float()[:, :, 1:])


def test_the_old_file_stays_if_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    latents.save(path, Z, {"run": 1})

    def full(tensors: object, part: Path, **rest: object) -> None:
        part.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latents, "save_file", full)
    with pytest.raises(FileError, match=r"cannot be written.*No space left"):
        latents.save(path, Z, {"run": 2})
    assert latents.load(path)[1] == {"run": 1}
    assert list(tmp_path.iterdir()) == [path]


WRONG = {
    "missing": (None, "no such file"),
    "text": (b"hello", "not a latents file"),
    "empty": (b"", "not a latents file"),
    "other tensor": ({"weights": Z}, "holds no tensor 'latents'"),
    "a clip": ({"latents": Z[0]}, r"float32 \[4, 3, 2, 2\], float32 \[1, Z, F, H, W\] expected"),
    "a batch": ({"latents": Z.expand(2, -1, -1, -1, -1).contiguous()}, r"\[2, 4, 3, 2, 2\]"),
    "whole numbers": ({"latents": Z.to(torch.int32)}, "int32"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, path)
    with pytest.raises(FileError, match=message) as caught:
        latents.load(path)
    assert "x.safetensors" in str(caught.value)
    assert "mutoscope generate" in caught.value.hint


@pytest.mark.parametrize("metadata", [None, {"mutoscope": json.dumps([1])}])
def test_latents_without_info(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"latents": Z}, tmp_path / "x", metadata=metadata)
    assert latents.load(tmp_path / "x")[1] == {}


def test_damaged_info(tmp_path: Path) -> None:
    save_file({"latents": Z}, tmp_path / "x", metadata={"mutoscope": "{"})
    with pytest.raises(FileError, match="not a latents file"):
        latents.load(tmp_path / "x")


def test_preview_is_linear_in_the_channels() -> None:
    rgb = ((1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, -1.0))
    z = torch.tensor([[[[[0.0, 1.0, -9.0]]], [[[1.0, 0.0, 1.0]]]]])  # 2 channels, 1 frame, 1 row, 3 columns
    expected = [[[[128, 191, 0], [255, 128, 0], [0, 191, 0]]]]
    picture = latents.preview(z, rgb)
    assert picture.dtype == np.uint8
    assert picture.tolist() == expected
