"""Estimates grow with what grows, and what cannot fit is refused with numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mutoscope.engine import memory
from mutoscope.engine.linear import default_compute_dtype
from mutoscope.engine.wan import WanConfig
from mutoscope.errors import RequestError, ResourceError
from mutoscope.planning import size_bytes
from mutoscope.request import Conditioning, GenerationRequest

WAN = dict(in_dim=16, out_dim=16, text_dim=4096, freq_dim=256)
SMALL = WanConfig(dim=1536, ffn_dim=8960, n_heads=12, n_layers=30, **WAN)
VACE = replace(SMALL, vace_layers=tuple(range(0, 30, 2)), vace_in_dim=96)
LARGE = WanConfig(dim=5120, ffn_dim=13824, n_heads=40, n_layers=40, **WAN)
CPU = torch.device("cpu")
PICTURE = np.zeros((8, 8, 3), np.uint8)


def planned(**fields: Any) -> GenerationRequest:
    values = {"prompt": "x", "width": 832, "height": 480, "frames": 81, "guidance": 5.0, **fields}
    return GenerationRequest(**values)


def test_tokens() -> None:
    """Spec 1.4: 832x480 with 81 frames has 32760 tokens, 1280x720 has 75600, a reference 1560 or 3600 more."""
    assert memory.n_tokens(832, 480, 81) == 32760
    assert memory.n_tokens(1280, 720, 81) == 75600
    assert memory.n_tokens(832, 480, 81, 1) - 32760 == 1560
    assert memory.n_tokens(1280, 720, 81, 2) - 75600 == 7200


BIGGER = [
    (SMALL, (832, 480, 81), {}, SMALL, (832, 480, 77), {}),
    (SMALL, (832, 496, 81), {}, SMALL, (832, 480, 81), {}),
    (SMALL, (848, 480, 81), {}, SMALL, (832, 480, 81), {}),
    (LARGE, (832, 480, 81), {}, SMALL, (832, 480, 81), {}),
    (VACE, (832, 480, 81), {}, SMALL, (832, 480, 81), {}),
    (VACE, (832, 480, 81), {"n_references": 1}, VACE, (832, 480, 81), {}),
    (SMALL, (256, 256, 17), {"guided": True}, SMALL, (256, 256, 17), {"guided": False}),
]


@pytest.mark.parametrize("case", BIGGER, ids=range(len(BIGGER)))
def test_more_needs_more(case: tuple[Any, ...]) -> None:
    config, size, options, config_less, size_less, options_less = case
    more, less = (
        memory.estimate(config, *size, **options),
        memory.estimate(config_less, *size_less, **options_less),
    )
    assert more.denoise > less.denoise
    assert more.decode >= less.decode
    assert more.peak >= less.peak
    assert more.peak == max(more.encode, more.denoise, more.decode) > memory.RUNTIME_BYTES


def test_two_passes_need_no_more_than_one() -> None:
    guided, plain = (memory.estimate(SMALL, 832, 480, 81, guided=g) for g in (True, False))
    assert guided == plain


def test_conditioning_needs_memory_only_where_there_is_a_branch() -> None:
    pixels = 832 * 480 * 81
    vace, plain = memory.estimate(VACE, 832, 480, 81), memory.estimate(SMALL, 832, 480, 81)
    assert vace.encode - vace.decode == 7 * pixels
    assert plain.encode == memory.RUNTIME_BYTES


def test_a_smaller_vae_needs_less() -> None:
    full, starter = (memory.estimate(SMALL, 256, 256, 17, vae_base_dim=n).decode for n in (96, 16))
    assert starter - memory.RUNTIME_BYTES == pytest.approx((full - memory.RUNTIME_BYTES) / 6)


def test_above_a_tile_the_vae_needs_only_the_clip_more() -> None:
    tile, two = (memory.estimate(SMALL, w, 256, 1).decode for w in (256, 512))
    assert two - tile == 6 * 512 * 256


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    itemsize = default_compute_dtype(CPU).itemsize
    need = memory.estimate(VACE, 832, 480, 81, n_references=2, itemsize=itemsize).peak - memory.RUNTIME_BYTES
    conditioning = Conditioning(references=(PICTURE,), compose=Conditioning(references=(PICTURE,)))
    request = planned(conditioning=conditioning)
    monkeypatch.setattr(memory, "available", lambda device: need)
    memory.check(VACE, request, CPU)
    monkeypatch.setattr(memory, "available", lambda device: need - 1)
    memory.check(VACE, planned(), CPU)
    with pytest.raises(ResourceError) as caught:
        memory.check(VACE, request, CPU)
    gigabytes = f"{need / 1e9:.1f} GB"
    message = f"832x480 with 81 frames needs about {gigabytes} of memory, {gigabytes} are free on cpu."
    assert caught.value.message == message
    assert "smaller size or fewer frames" in caught.value.hint


def test_available_is_less_than_all_there_is() -> None:
    assert 0 < memory.available(CPU) < 1 << 50


def test_a_promise_counts_everything_and_says_what_would_fit() -> None:
    need = memory.estimate(VACE, 832, 480, 81).peak
    assert memory.check(VACE, planned(), CPU, itemsize=2, promised=need).peak == need
    assert memory.check(VACE, planned(), CPU, itemsize=2, promised=need + 5, resident=5).peak == need + 5
    with pytest.raises(ResourceError) as caught:
        memory.check(VACE, planned(), CPU, itemsize=2, promised=need - 1)
    fewer = int(caught.value.hint.split()[0])
    assert fewer % 4 == 1
    sizes = [memory.estimate(VACE, 832, 480, n).peak for n in (fewer, fewer + 4)]
    assert sizes[0] <= need - 1 < sizes[1]
    with pytest.raises(ResourceError) as caught:
        memory.check(VACE, planned(), CPU, itemsize=2, promised=memory.MIB)
    assert "no clip" in caught.value.hint.lower()


def test_room_is_what_the_stage_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    need = memory.Need(denoise=memory.RUNTIME_BYTES + 40, decode=memory.RUNTIME_BYTES + 30)
    assert memory.room(need, CPU, memory.RUNTIME_BYTES + 100, now=need.decode) == 70
    assert memory.room(need, CPU, memory.RUNTIME_BYTES, now=need.decode) == 0
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    assert memory.room(need, CPU, None, now=need.decode) == 760


@pytest.mark.parametrize(
    ("text", "expected"), [("12GiB", 12 << 30), ("700 mib", 700 << 20), ("1.5GB", 1_500_000_000), ("64", 64)]
)
def test_amounts(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0MiB", "1TiBB", "1e9"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(RequestError, match="no amount of memory"):
        size_bytes(text)


_ONE_CLIP = """
import re, sys
from pathlib import Path
from mutoscope import Engine
Engine("pocket", device="cpu", memory=sys.argv[1]).generate("a red ball falls", seed=1, steps=2)
status = Path("/proc/self/status").read_text()  # ru_maxrss begins with what the parent had when it forked
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) << 10)
"""


def test_the_starter_keeps_the_promise() -> None:
    """Peak of a whole process, imports included: 386 MiB measured."""
    run = subprocess.run(
        [sys.executable, "-c", _ONE_CLIP, "700MiB"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 700 * memory.MIB
    refused = subprocess.run([sys.executable, "-c", _ONE_CLIP, "400MiB"], capture_output=True, text=True)
    assert "0.39 GiB are allowed" in refused.stderr
