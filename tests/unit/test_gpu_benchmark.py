"""The benchmark for GPUs runs, on the processor and tiny: what it measures there means nothing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    report = gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--exact"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert report["tiny"]
    dit, vae = report["dit"], report["vae"]
    assert dit["tokens"] == 16
    assert set(dit["contenders"]) == {"auto", "travelling", "diffusers"}
    assert set(vae["contenders"]) == {"ours", "diffusers"}
    for row in (*dit["contenders"].values(), *vae["contenders"].values()):
        assert 0 < row["min_s"] <= row["max_s"]
        assert row["relative_error"] < 0.05, "all compute the same"
    assert dit["contenders"]["auto"]["relative_error"] == dit["contenders"]["travelling"]["relative_error"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main([])
