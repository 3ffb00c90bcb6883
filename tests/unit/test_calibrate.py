"""Calibration keeps what does not stand integers, and the loader follows its sidecar."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mutoscope.engine import calibrate, int8, precision
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.inspect import inspect_file, render
from mutoscope.engine.int8 import Int8
from mutoscope.engine.linear import QuantLinear
from mutoscope.engine.quants import workers
from mutoscope.engine.weights import load_wan, open_weights
from mutoscope.errors import FileError
from scripts.make_random_model import write_random_model
from tests.tiny import TEXT_ONLY_DIT

CONFIG = replace(TEXT_ONLY_DIT, dim=256, ffn_dim=320, n_heads=2)
SENSITIVE = "blocks.1.ffn.0"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny transformer, all of whose layers count as large."""
    monkeypatch.setattr(precision, "MIN_INT8_NUMEL", 1)
    path = tmp_path / "dit.gguf"
    write_random_model(CONFIG, path, "Q8_0")
    return path


def integer_layers(path: Path) -> set[str]:
    modules = load_wan(path).named_modules()
    return {name for name, m in modules if isinstance(m, QuantLinear) and isinstance(m.precision, Int8)}


@pytest.mark.skipif(not int8.int8_is_fast(), reason="no fast 8-bit instructions here")
def test_a_layer_that_does_not_stand_integers_stays_in_bfloat16(path, monkeypatch):
    before = integer_layers(path)
    assert len(before) == 2 * 8
    plain = int8.prepare

    def worse(weight):
        """The weight of one layer comes out wrong by a tenth."""
        made = plain(weight)
        return int8.Weight(
            made.packed, made.step_N * 1.1, *(getattr(made, k) for k in ("sum_N", "zero_N", "nbytes"))
        )

    broken = load_wan(path).get_submodule(SENSITIVE).weight.values(torch.float32)
    monkeypatch.setattr(
        int8, "prepare", lambda w: worse(w) if torch.equal(w.values(torch.float32), broken) else plain(w)
    )
    report = calibrate.calibrate([path])
    assert report["bf16"] == [SENSITIVE]
    assert 0.09 < report["layers"][SENSITIVE] < 0.11
    assert max(e for name, e in report["layers"].items() if name != SENSITIVE) < calibrate.MAX_LAYER_ERROR
    assert report["velocity_error"] <= calibrate.MAX_VELOCITY_ERROR
    calibrate.write_sidecar(path, report)
    assert integer_layers(path) == before - {SENSITIVE}
    shown = inspect_file(path)["precision"]
    assert shown["auto"]["int8"] == len(before) - 1
    assert "1 of 16 layers stay in bfloat16" in render(inspect_file(path))


@pytest.mark.skipif(not int8.int8_is_fast(), reason="no fast 8-bit instructions here")
def test_layers_are_kept_until_the_whole_is_close_enough(path, monkeypatch):
    monkeypatch.setattr(calibrate, "MAX_LAYER_ERROR", 1.0)
    everything = calibrate.calibrate([path])
    assert everything["bf16"] == []
    assert everything["velocity_error"] == everything["velocity_error_int8"]
    monkeypatch.setattr(calibrate, "MAX_VELOCITY_ERROR", 0.8 * everything["velocity_error"])
    part = calibrate.calibrate([path])
    assert 0 < len(part["bf16"]) < 16
    assert part["velocity_error"] <= 0.8 * everything["velocity_error"]
    assert calibrate.calibrate([path]) == part
    least = min(part["layers"][name] for name in part["bf16"])
    assert all(e <= least for name, e in part["layers"].items() if name not in part["bf16"])


def test_a_sidecar_of_another_file_is_refused(path):
    sidecar = precision.sidecar_of(path)
    assert precision.read_sidecar(path) is None
    for text in ("{", "{}", json.dumps({"version": 1, "size_bytes": 5, "bf16": []})):
        sidecar.write_text(text)
        with pytest.raises(FileError, match=r"calibration|another file"):
            load_wan(path)


def test_weights_are_packed_anew_while_they_are_loaded(path, monkeypatch):
    weight = open_weights(path).tensors["blocks.0.ffn.2.weight"].packed()
    assert weight.shape == (256, 320)
    threads = torch.get_num_threads()
    with workers() as pool:
        smaller = precision.repacked(weight, GGMLType.Q4_0, pool)
        assert precision.repacked(smaller, GGMLType.Q8_0, pool) is smaller  # never larger
        assert (
            precision.repacked(weight, GGMLType.Q4_K, pool) is weight
        )  # rows of 320 are no whole blocks of 256
    assert torch.get_num_threads() == threads
    assert smaller.data.nbytes == 256 * 10 * 18 < weight.data.nbytes
    exact = weight.values(torch.float32)
    assert 0.01 < ((smaller.values(torch.float32) - exact).norm() / exact.norm()).item() < 0.15
    monkeypatch.setitem(precision.REPACKED, "q4", GGMLType.Q4_0)
    types = {
        name: m.type_id
        for name, m in load_wan(path, precision="q4").named_modules()
        if isinstance(m, QuantLinear)
    }
    assert types["blocks.0.ffn.2"] == GGMLType.Q4_0
    assert types["head.head"] != GGMLType.Q4_0
