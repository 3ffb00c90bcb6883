"""Step caches: what is left out and what never is, both branches, and how far off the result may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mutoscope.engine import cache, latents
from mutoscope.engine.cache import (
    COND,
    UNCOND,
    BlockCache,
    EasyCache,
    MagnitudeRecorder,
    find_numbers,
    mag_plan,
    make_cache,
    mean_magnitudes,
    read_magnitudes,
    tea_plan,
)
from mutoscope.engine.cache_tables import MAG, SMALL, TEA, TeaNumbers
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import generate
from mutoscope.engine.wan import Block, TimeModulation, WanConfig, WanModel
from mutoscope.errors import FileError, RequestError
from mutoscope.manifest import ModelFile, read_manifest
from mutoscope.request import GenerationRequest
from tests.tiny import DIT

REQUEST = GenerationRequest(prompt="a red ball falls", seed=1, frames=5, steps=20, sampler="euler")
ALWAYS = TeaNumbers((1.0, 0.0), 1.0, first_steps=1, per_block=False)
"""The change itself."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Models:
    return Models(read_manifest(tiny_model / "model.toml"), precision="exact")


@pytest.fixture
def models(shared: Models, tmp_path: Path) -> Models:
    """With magnitudes of its own that hardly change."""
    path = tmp_path / "magnitudes.json"
    path.write_text(json.dumps({"cond": [1, 0.99], "uncond": [1, 0.99], "threshold": 0.1, "most": 3}))
    manifest = replace(shared.manifest, files=replace(shared.manifest.files, magnitudes=ModelFile(path=path)))
    copy = Models(manifest, precision="exact")
    copy.text, copy.dit, copy.vae = shared.text, shared.dit, shared.vae  # type: ignore[misc]
    return copy


class Watched:
    """Runs a request; `batches` are the sizes of all passes through the transformer, `blocks` those with its blocks."""

    def __init__(self, models: Models, request: GenerationRequest, folder: Path, **options: Any) -> None:
        self.batches: list[int] = []
        self.blocks: list[int] = []
        first = models.dit.blocks[0]
        forward, block = WanModel.forward, Block.forward

        def watched(model: WanModel, x: Tensor, *args: Any, **more: Any) -> Tensor:
            self.batches.append(len(x))
            return forward(model, x, *args, **more)

        def watched_block(module: Block, x: Tensor, *args: Any) -> Tensor:
            if module is first:
                self.blocks.append(len(x))
            return block(module, x, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WanModel, "forward", watched)
            patch.setattr(Block, "forward", watched_block)
            for _ in generate(models, request, keep_latents=folder / "x", **options):
                pass
        self.latents = latents.load(folder / "x")[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# -- in the pipeline -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["easy", "mag"])
def test_threshold_zero_leaves_out_nothing(kind: str, models: Models, tmp_path: Path) -> None:
    plain = Watched(models, REQUEST, tmp_path)
    got = Watched(models, replace(REQUEST, cache=f"{kind}=0"), tmp_path)
    assert torch.equal(got.latents, plain.latents)
    assert got.blocks == plain.blocks == [2] * 20


@pytest.mark.parametrize(("kind", "most_error"), [("easy=0.8", 0.2), ("mag=0.1", 0.06)])
def test_steps_are_left_out_and_the_error_is_small(
    kind: str, most_error: float, models: Models, tmp_path: Path
) -> None:
    plain = Watched(models, REQUEST, tmp_path)
    got = Watched(models, replace(REQUEST, cache=kind), tmp_path)
    assert 6 <= len(got.blocks) <= 14
    assert 0 < error(got.latents, plain.latents) < most_error
    less = {"easy=0.8": "easy=0.4", "mag=0.1": "mag=0.02"}[kind]
    longer = Watched(models, replace(REQUEST, cache=less), tmp_path)
    assert len(longer.blocks) > len(got.blocks)
    assert error(longer.latents, plain.latents) < error(got.latents, plain.latents)


def test_tea_in_the_pipeline(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no published numbers for the tiny model; with some, its blocks are left out (measured error 0.026)."""
    with pytest.raises(RequestError, match="none for one of width 32 with 2 layers"):
        list(generate(models, replace(REQUEST, cache="tea")))
    monkeypatch.setitem(TEA, (DIT.dim, DIT.n_layers), ALWAYS)
    plain = Watched(models, REQUEST, tmp_path)
    got = Watched(models, replace(REQUEST, cache="tea=1"), tmp_path)
    assert len(got.batches) == 20
    assert len(got.blocks) < 15
    assert 0 < error(got.latents, plain.latents) < 0.08


def test_branches_in_passes_of_their_own_give_the_same(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, cache="mag=0.1")
    together = Watched(models, request, tmp_path)
    monkeypatch.setattr(cache.BlockCache, "_repeat", lambda *_: pytest.fail("not reached"))
    with pytest.raises(pytest.fail.Exception):
        Watched(models, request, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("mutoscope.engine.memory.BATCHED_GUIDANCE_TOKENS", 0)
    apart = Watched(models, request, tmp_path)
    assert apart.blocks == [1] * 2 * len(together.blocks)
    assert error(apart.latents, together.latents) < 1e-5


@pytest.mark.parametrize("kind", ["none", "easy=0.8", "mag=0.1"])
def test_guidance_that_begins_in_the_middle_computes_what_is_not_known(
    kind: str, models: Models, tmp_path: Path
) -> None:
    request = replace(REQUEST, cache=kind, guidance_interval=(0.5, 0.8))
    got = Watched(models, request, tmp_path)
    if kind == "none":
        assert got.batches == [1] * 10 + [2] * 6 + [1] * 4
    else:
        assert sum(got.blocks) < 20 + 6
        unguided = Watched(models, replace(request, guidance_interval=(0, 0)), tmp_path)
        assert error(got.latents, unguided.latents) > 1e-3
        assert sum(got.blocks) > sum(unguided.blocks)


def test_a_recorded_model_can_be_cached(models: Models, tmp_path: Path) -> None:
    record = MagnitudeRecorder()
    Watched(models, REQUEST, tmp_path, step_cache=record)
    assert [len(r) for r in record.ratios] == [20, 20]
    assert record.ratios[COND][0] == 1.0
    assert all(0.3 < r < 3 for r in record.ratios[UNCOND])
    path = tmp_path / "own.json"
    path.write_text(json.dumps(mean_magnitudes([record, record])))
    known = read_magnitudes(path)
    assert known.cond == pytest.approx(record.ratios[COND], abs=1e-5)
    assert known.uncond == pytest.approx(record.ratios[UNCOND], abs=1e-5)


# -- EasyCache ------------------------------------------------------------------------------------------------


def easy_run(
    threshold: float, n: int = 20, velocity: Any = lambda x, b: 0.5 * x + b
) -> list[tuple[int, ...]]:
    """The branches computed at each step of a slow Euler walk."""
    seen: list[tuple[int, ...]] = []

    def run(x: Tensor, i: int, branches: tuple[int, ...], around: Any) -> list[Tensor]:
        assert around is None
        seen[i] = branches
        return [velocity(x, b) for b in branches]

    state, x = EasyCache(threshold, n), torch.ones(1, 4)
    for i in range(n):
        seen.append(())
        cond, _ = state.velocities(x, i, (COND, UNCOND), run)
        x = x - cond / n
    return seen


def test_easy_computes_the_first_fifth_and_the_last() -> None:
    seen = easy_run(1e9)
    assert seen == [(COND, UNCOND)] * 4 + [()] * 15 + [(COND, UNCOND)]
    assert easy_run(0) == [(COND, UNCOND)] * 20


def test_easy_by_hand() -> None:
    """v = x / 2, so the rate is 1/2 and each step of size d adds (d / 2) / |v| to the error."""
    n, threshold, x, error, v = 20, 0.06, 1.0, 0.0, 0.0
    computed = []
    previous = difference = 0.0
    for i in range(n):
        must = i < 4 or i == n - 1
        if not must:
            error += 0.5 * abs(x - previous) / abs(v)
            must = error >= threshold
        previous = x
        if must:
            error, v = 0.0, 0.5 * x
            difference = v - x
            computed.append(i)
        x -= (x + difference if not must else v) / n
    seen = easy_run(threshold, velocity=lambda x, b: 0.5 * x)
    assert [i for i, branches in enumerate(seen) if branches] == computed
    assert 6 < len(computed) < 14


def test_easy_adds_the_last_difference_to_the_latents() -> None:
    state = EasyCache(1e9, 10)

    def run(x: Tensor, i: int, branches: tuple[int, ...], around: Any) -> list[Tensor]:
        return [3 * x + b for b in branches]

    for i in range(3):
        state.velocities(torch.full((1, 2), float(i + 1)), i, (COND, UNCOND), run)
    cond, uncond = state.velocities(
        torch.full((1, 2), 10.0), 3, (COND, UNCOND), lambda *_: pytest.fail("computed")
    )
    assert cond.tolist() == [[10 + 4, 10 + 4]]  # the difference at step 1: 3 * 2 - 2
    assert uncond.tolist() == [[10 + 5, 10 + 5]]


# -- plans ----------------------------------------------------------------------------------------------------


def test_tea_plan_by_hand() -> None:
    signal = [torch.tensor([value]) for value in (1.0, 1.1, 1.1, 1.21, 1.331, 1.331)]
    # relative changes: 0.1, 0, 0.1, 0.1, 0; summed 0.1, 0.1, 0.2 (computed), 0.1, and the last is computed
    assert tea_plan(signal, ALWAYS, 0.15) == [False, True, True, False, True, False]
    assert tea_plan(signal, replace(ALWAYS, first_steps=3), 0.15) == [False, False, False, True, False, False]
    assert not any(tea_plan(signal, ALWAYS, 0.0))
    negative = replace(ALWAYS, coefficients=(-5.0, 0.0))
    assert not any(tea_plan(signal, negative, 0.0))


def test_mag_plan_by_hand() -> None:
    ratios = [1.0] + 9 * [0.9]
    # from step 2 on (a fifth): 0.1, then 0.1 + (1 - 0.81) = 0.29, then 0.29 + 0.271 is too much
    plan = [False, False, True, True, False, True, True, False, True, False]
    assert mag_plan(ratios, 10, 0.3, 9) == plan
    assert mag_plan(ratios, 10, 0.3, 1) == [False, False, True, False, True, False, True, False, True, False]
    assert not any(mag_plan(ratios, 10, 0.0, 9))
    assert mag_plan([1.0] * 50, 5, 1.0, 9) == [False, True, True, True, False]


@pytest.mark.parametrize(("key", "published", "left_out"), [
    ((*SMALL, False), 189 / 68, 0.45), ((5120, 40, False), 60.1 / 21.7, 0.5), ((*SMALL, True), None, 0.2),
])  # fmt: skip
def test_published_magnitudes_leave_out_about_as_much_as_published(
    key: Any, published: float | None, left_out: float
) -> None:
    """The authors' times for 50 steps, without what is not a step."""
    numbers = MAG[key]
    assert len(numbers.cond) == len(numbers.uncond) == 50
    plans = [mag_plan(r, 50, numbers.threshold, numbers.most) for r in (numbers.cond, numbers.uncond)]
    assert not any(plan[i] for plan in plans for i in (*range(10), 49))
    share = sum(map(sum, plans)) / 100
    assert share > left_out
    if published is not None:
        assert 1 / (1 - share) == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize(("skips", "expected"), [
    (([0, 1, 0], [0, 1, 0]), ["cu", "+", "cu"]), (([0, 1, 1], [0, 0, 1]), ["cu", "u+c", "+"]),
])  # fmt: skip
def test_branches_may_be_left_out_apart(skips: Any, expected: list[str]) -> None:
    state, seen = BlockCache(skips), []

    def run(x: Tensor, i: int, branches: tuple[int, ...], around: Any) -> list[Tensor]:
        called = []
        out = around(
            branches, torch.full((len(branches), 1, 1), 10.0 * i), lambda t: called.append(1) or t + 1 + i
        )
        seen[i] += ("" if called else "+") + (
            "".join("cu"[b] for b in branches) if called or len(branches) < 2 else ""
        )
        return list(out.split(1))

    for i in range(3):
        seen.append("")
        cond, uncond = state.velocities(torch.zeros(1), i, (COND, UNCOND), run)
    assert seen == expected
    last = 0 if skips[0][1] and skips[0][2] else 2
    assert cond.item() == 20 + 1 + last
    assert uncond.item() == 20 + 1 + (1 if skips[1] == [0, 0, 1] else 2)


# -- numbers of models ----------------------------------------------------------------------------------------


def config(dim: int, layers: int, vace: bool) -> WanConfig:
    return replace(DIT, dim=dim, n_layers=layers, vace_layers=(0,) if vace else ())


def test_numbers_of_models(tmp_path: Path) -> None:
    assert find_numbers("mag=0.1", config(1536, 30, True)) is MAG[1536, 30, True]
    assert find_numbers("tea", config(1536, 30, True)) is find_numbers("tea", config(1536, 30, False))
    assert find_numbers("easy", config(7, 7, False)) is None
    with pytest.raises(RequestError, match=r"measure_magnitudes\.py"):
        find_numbers("mag", config(7, 7, False))
    (tmp_path / "x.json").write_text('{"cond": [1], "uncond": []}')
    with pytest.raises(FileError, match="holds no ratios"):
        find_numbers("mag", config(1536, 30, True), tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(FileError, match="cannot be read as magnitudes"):
        find_numbers("mag", config(1536, 30, True), tmp_path / "x.json")


def test_kinds() -> None:
    times = TimeModulation(torch.ones(4, 2), torch.ones(4, 6, 2))
    assert isinstance(make_cache("none", 4, None, times), cache.NoCache)
    easy = make_cache("easy", 4, None, times)
    assert isinstance(easy, EasyCache)
    assert easy.threshold == 0.05
    assert isinstance(make_cache("tea=0.1", 4, TEA[SMALL], times), BlockCache)
