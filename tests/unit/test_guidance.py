"""Guidance where it matters, and CFG-Zero*."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeZeroStarGuidance

from mutoscope.catalog import find_model
from mutoscope.engine import conditioning, sampler
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import generate
from mutoscope.errors import RequestError
from mutoscope.manifest import read_manifest
from mutoscope.planning import plan
from mutoscope.request import BoxTrack, Conditioning, GenerationRequest, Keyframe
from tests.unit.test_cache import Watched, error

REQUEST = GenerationRequest(prompt="a red ball falls", seed=1, frames=5, steps=10, guidance=4.0)


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> Models:
    return Models(read_manifest(tiny_model / "model.toml"), precision="exact")


def test_zero_star_is_that_of_diffusers() -> None:
    rng = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 3, 4, 5, generator=rng) for _ in range(2))
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=0)
    guider.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(500))
    expected = guider.forward(cond, uncond).pred
    assert torch.allclose(sampler.guide_zero_star(cond, uncond, 4.0), expected, rtol=1e-5, atol=1e-5)
    assert error(sampler.guide(cond, uncond, 4.0), expected) > 0.1, "the mutant: plain guidance"


def test_zero_star_by_hand() -> None:
    """<c, u> / |u|^2 = 11 / 5 = 2.2, so u becomes (2.2, 4.4); c - u is (0.8, -0.4)."""
    cond, uncond = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    assert sampler.guide_zero_star(cond, uncond, 2.0).tolist()[0] == pytest.approx([3.8, 3.6], rel=1e-5)
    assert torch.allclose(sampler.guide_zero_star(cond, uncond, 1.0), cond)
    assert sampler.guide_zero_star(cond, torch.zeros(1, 2), 1.0).isfinite().all()


@pytest.mark.parametrize(
    ("interval", "batches"),
    [
        ((0.0, 1.0), [2] * 10),
        ((0.2, 0.8), [1] * 2 + [2] * 6 + [1] * 2),
        ((0.5, 1.0), [1] * 5 + [2] * 5),
        ((0.25, 0.35), [1] * 3 + [2] + [1] * 6),
        ((0.0, 0.0), [1] * 10),
    ],
)
def test_steps_outside_of_the_interval_take_one_pass(
    interval: tuple[float, float], batches: list[int], models: Models, tmp_path: Path
) -> None:
    got = Watched(models, replace(REQUEST, guidance_interval=interval), tmp_path)
    assert got.batches == batches


def test_an_interval_of_nothing_is_no_guidance(models: Models, tmp_path: Path) -> None:
    nothing = Watched(models, replace(REQUEST, guidance_interval=(0.0, 0.0)), tmp_path)
    without = Watched(models, replace(REQUEST, guidance=1.0), tmp_path)
    assert error(nothing.latents, without.latents) < 1e-6
    inside = Watched(models, replace(REQUEST, guidance_interval=(0.2, 0.8)), tmp_path)
    whole = Watched(models, REQUEST, tmp_path)
    assert error(inside.latents, without.latents) > 1e-3
    assert error(inside.latents, whole.latents) > 1e-3


def test_zero_star_in_the_pipeline(models: Models, tmp_path: Path) -> None:
    """Steps at the start are not computed at all; kinds differ."""
    results = {}
    for kind, passes in (("cfg", 10), ("zero-star=0", 10), ("zero-star", 9), ("zero-star=3", 7)):
        got = Watched(models, replace(REQUEST, guidance_kind=kind), tmp_path)
        assert len(got.batches) == passes
        results[kind] = got.latents
    kinds = list(results)
    for n, kind in enumerate(kinds):
        assert all(error(results[kind], results[other]) > 1e-4 for other in kinds[n + 1 :])


def picture(value: int) -> np.ndarray:
    return np.full((64, 64, 3), value, np.uint8)


def test_cells_of_which_nothing_is_given() -> None:
    """Frames 0 and 9 of 13 are in latent frames 0 and 3; a box of 16 pixels in a clip covers 2 x 2 cells."""
    frames = conditioning.prepare(
        Conditioning(keyframes=(Keyframe(image=picture(9)), Keyframe(image=picture(99), index=9))), 64, 64, 13
    )
    free = conditioning.generated(frames)
    assert free.shape == (1, 1, 4, 8, 8)
    assert free.mean((0, 1, 3, 4)).tolist() == [0, 1, 1, 0]

    boxed = Conditioning(
        video=np.zeros((5, 64, 64, 3), np.uint8), boxes=((0.25, 0, 0.5, 0.26),), references=(picture(1),)
    )
    free = conditioning.generated(conditioning.prepare(boxed, 64, 64, 5))
    assert free.shape == (1, 1, 3, 8, 8)
    assert free.sum((0, 1, 3, 4)).tolist() == [0, 4, 4], (
        "the third row of cells is repainted in one pixel of eight"
    )
    assert (free[0, 0, 1:, :2, 2:4] == 1).all()


@pytest.mark.parametrize("kind", ["cfg", "zero-star=0"])
def test_what_is_given_has_a_guidance_of_its_own(kind: str, models: Models, tmp_path: Path) -> None:
    shown = Conditioning(keyframes=(Keyframe(image=picture(200), index=-1),))
    request = replace(REQUEST, conditioning=shown, steps=1, sampler="euler", guidance_kind=kind)
    three, five, mixed = (
        Watched(models, replace(request, **options), tmp_path).latents
        for options in ({"guidance": 3.0}, {"guidance": 5.0}, {"guidance": 5.0, "guidance_kept": 3.0})
    )
    assert torch.equal(mixed[:, :, 0], five[:, :, 0])
    assert torch.equal(mixed[:, :, 1], three[:, :, 1])
    assert error(three, five) > 0.01, "the mutant: the same guidance everywhere"


def test_hints_of_no_strength_have_no_guidance_of_their_own(models: Models, tmp_path: Path) -> None:
    shown = Conditioning(keyframes=(Keyframe(image=picture(200)),), strength=0.0)
    request = replace(REQUEST, conditioning=shown)
    plain, kept = (
        Watched(models, replace(request, guidance_kept=kept), tmp_path).latents for kept in (None, 1.0)
    )
    assert torch.equal(plain, kept)


def test_nothing_given_changes_nothing(models: Models, tmp_path: Path) -> None:
    plain, kept = (
        Watched(models, replace(REQUEST, guidance_kept=kept), tmp_path).latents for kept in (None, 1.0)
    )
    assert torch.equal(plain, kept)


def test_plans(models: Models) -> None:
    def planned(**options: object) -> GenerationRequest:
        return plan(replace(REQUEST, **options), models.manifest)  # type: ignore[arg-type]

    assert planned(steps=50, guidance_kind="zero-star").guidance_kind == "zero-star=2"
    assert planned(steps=20, guidance_kind="zero-star").guidance_kind == "zero-star=1"
    assert planned(steps=1, guidance_kind="zero-star").guidance_kind == "zero-star=0"
    assert planned(guidance_interval=[0.25, 1]).guidance_interval == (0.25, 1.0)
    assert planned(cache="easy=0.050").cache == "easy=0.05"
    shown = Conditioning(tracks=(BoxTrack(points=((0, 0, 0, 1, 1),)),))
    assert planned(guidance_kept=2).guidance_kept is None, "nothing is given"
    assert planned(guidance_kept=2, conditioning=shown).guidance_kept == 2
    assert planned(conditioning=shown).guidance_kept is None, "models that say nothing guide all alike"
    starter = find_model("pocket")
    assert plan(replace(REQUEST, conditioning=shown), starter).guidance_kept == 1
    once = planned(guidance_kind="zero-star", cache="mag")
    assert plan(once, models.manifest) == once


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("guidance_kind", "zero_star", "Did you mean zero-star"),
        ("guidance_kind", "cfg=2", "expected one of"),
        ("guidance_kind", "zero-star=10", "expected 0 to 9"),
        ("guidance_kind", "zero-star=1.5", "whole number"),
        ("guidance", -1.0, "expected 0 to 100"),
        ("guidance_kept", 101.0, "guidance_kept = 101.0, expected 0 to 100"),
        ("guidance_interval", (0.5, 0.2), "two fractions"),
        ("guidance_interval", (0.5,), "two fractions"),
        ("guidance_interval", (float("nan"), 1.0), "two fractions"),
        ("cache", "easycache", "Did you mean easy"),
        ("cache", "easy=", "is not a number"),
        ("cache", "easy=-1", "expected 0 to 10"),
        ("cache", "none=1", "expected one of"),
    ],
)
def test_refusals(field: str, value: object, told: str, models: Models) -> None:
    with pytest.raises(RequestError, match=told):
        list(generate(models, replace(REQUEST, **{field: value})))  # type: ignore[arg-type]
