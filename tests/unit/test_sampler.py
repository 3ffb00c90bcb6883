"""The sampler's arithmetic: grids, limits, refusals and a state that survives being saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mutoscope.engine.sampler import (
    DEFAULT,
    MAX_STEPS,
    SAMPLERS,
    State,
    guide,
    make_solver,
    noise,
    schedule,
    timestep,
)
from mutoscope.errors import RequestError

SHAPE = (4, 2, 3, 3)


def steps_for(sampler: str) -> int:
    """A number of steps the sampler takes."""
    return SAMPLERS[sampler].fixed_steps or 7


def velocity(x: Tensor, sigma: float) -> Tensor:
    """A smooth made-up model."""
    return torch.sin(2 * x) + 0.3 * x * sigma


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 16.0])
def test_a_schedule_falls_from_noise_to_zero(sampler: str, shift: float) -> None:
    sigmas = schedule(sampler, steps_for(sampler), shift)
    assert len(sigmas) == steps_for(sampler) + 1
    assert all(isinstance(sigma, float) for sigma in sigmas)
    assert sigmas == sorted(set(sigmas), reverse=True)
    assert 0.99 < sigmas[0] <= 1.0
    assert sigmas[-1] == 0.0


def test_the_default_exists() -> None:
    assert DEFAULT in SAMPLERS


def test_shift_moves_steps_to_high_noise() -> None:
    assert all(
        a > b for a, b in zip(schedule("euler", 8, 5.0)[1:-1], schedule("euler", 8, 1.0)[1:-1], strict=True)
    )


def test_the_distilled_schedule_has_the_published_sigmas() -> None:
    assert schedule("distill4", 4, 5.0) == pytest.approx([1.0, 0.9375, 5 / 6, 0.625, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("sampler", "steps", "shift", "expected"),
    [
        # Read off the official schedulers (Wan2.1 9737cba).
        ("unipc", 10, 5.0, [999, 978, 952, 920, 882, 833, 768, 681, 555, 356]),
        ("dpm++", 10, 5.0, [1000, 978, 952, 921, 882, 833, 769, 681, 555, 357]),
        ("unipc", 6, 16.0, [999, 987, 969, 941, 888, 761]),
        ("dpm++", 5, 1.0, [1000, 800, 600, 399, 199]),
    ],
)
def test_time_steps_are_the_official_whole_numbers(
    sampler: str, steps: int, shift: float, expected: list[float]
) -> None:
    assert [timestep(sampler, sigma) for sigma in schedule(sampler, steps, shift)[:-1]] == expected


def test_euler_and_distilled_time_steps_keep_their_fraction() -> None:
    assert timestep("euler", 0.1234567) == pytest.approx(123.4567)
    assert timestep("distill4", 0.9375) == 937.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_that_knows_the_answer_gets_there(sampler: str) -> None:
    """Every prediction of x0 is the same, so that every formula must end on it."""
    target = noise(SHAPE, seed=3)
    sigmas = schedule(sampler, steps_for(sampler), 5.0)
    solver = make_solver(sampler, sigmas)
    x, state = noise(SHAPE, seed=4), solver.start()
    for i, sigma in enumerate(solver.sigmas[:-1]):
        x, state = solver.step(x, (x - target) / sigma, i, state)
    torch.testing.assert_close(x, target, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_can_stop_and_go_on_from_saved_tensors(sampler: str) -> None:
    sigmas = schedule(sampler, steps_for(sampler), 5.0)

    def run(x: Tensor, state: State, first: int, last: int) -> tuple[Tensor, State]:
        solver = make_solver(sampler, sigmas)
        for i in range(first, last):
            x, state = solver.step(x, velocity(x, sigmas[i]), i, state)
        return x, state

    start = noise(SHAPE, seed=0)
    whole, _ = run(start, State(), 0, len(sigmas) - 1)
    x, state = run(start, State(), 0, 3)
    saved = {name: value.numpy().copy() for name, value in state._asdict().items() if value is not None}
    restored = State(**{name: torch.from_numpy(value) for name, value in saved.items()})
    resumed, _ = run(x, restored, 3, len(sigmas) - 1)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_changes_none_of_its_inputs(sampler: str) -> None:
    sigmas = schedule(sampler, steps_for(sampler), 3.0)
    solver = make_solver(sampler, sigmas)
    x, state = noise(SHAPE, seed=0), solver.start()
    for i in range(3):
        v = velocity(x, sigmas[i])
        before = [t.clone() for t in (x, v, *(t for t in state if t is not None))]
        after_x, after_state = solver.step(x, v, i, state)
        again_x, _ = solver.step(x, v, i, state)
        now = [x, v, *(t for t in state if t is not None)]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert torch.equal(after_x, again_x)
        x, state = after_x, after_state


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_answers_are_computed_in_float32(sampler: str) -> None:
    sigmas = schedule(sampler, steps_for(sampler), 5.0)
    solver = make_solver(sampler, sigmas)
    half, full = noise(SHAPE, seed=0), noise(SHAPE, seed=0)
    half_state = full_state = solver.start()
    for i in range(len(sigmas) - 1):
        v = velocity(full, sigmas[i]).to(torch.bfloat16)
        half, half_state = solver.step(half, v, i, half_state)
        full, full_state = solver.step(full, v.float(), i, full_state)
        assert half.dtype == torch.float32
        assert all(t is None or t.dtype == torch.float32 for t in half_state)
    assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("name", "near"), [("unpic", "unipc"), ("dpmpp", "dpm++"), ("Euler", "euler"), ("?", "unipc")]
)
def test_an_unknown_sampler_is_refused_with_near_names(name: str, near: str) -> None:
    for refuse in (
        lambda: schedule(name, 4, 5.0),
        lambda: timestep(name, 0.5),
        lambda: make_solver(name, [0.5, 0]),
    ):
        with pytest.raises(RequestError) as caught:
            refuse()
        assert repr(name) in caught.value.message
        assert near in caught.value.hint


@pytest.mark.parametrize("steps", [-1, 0, MAX_STEPS + 1])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(RequestError, match=rf"steps: got {steps} but 1 to {MAX_STEPS} expected"):
        schedule("unipc", steps, 5.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, 101.0, float("nan"), float("inf")])
def test_a_shift_out_of_range_is_refused(shift: float) -> None:
    with pytest.raises(RequestError, match="shift: got"):
        schedule("euler", 5, shift)


def test_the_distilled_schedule_takes_four_steps_only() -> None:
    with pytest.raises(RequestError, match="exactly 4 steps, got 8") as caught:
        schedule("distill4", 8, 5.0)
    assert "choose another sampler" in caught.value.hint


@pytest.mark.parametrize("sampler", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3, MAX_STEPS])
@pytest.mark.parametrize("shift", [0.01, 1.0, 100.0])
def test_the_extremes_of_the_allowed_range_stay_finite(sampler: str, steps: int, shift: float) -> None:
    sigmas = schedule(sampler, steps, shift)
    solver = make_solver(sampler, sigmas)
    x, state = noise((2,), seed=0), solver.start()
    for i, sigma in enumerate(sigmas[:-1]):
        x, state = solver.step(x, velocity(x, sigma), i, state)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    "sigmas", [[], [0.0], [0.5], [0.5, 0.5, 0.0], [0.2, 0.5, 0.0], [1.5, 0.0], [0.9, 0.1]]
)
def test_sigmas_that_do_not_fall_to_zero_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must fall strictly"):
        make_solver("euler", sigmas)


def test_unipc_does_not_start_at_one() -> None:
    with pytest.raises(ValueError, match="first sigma below 1"):
        make_solver("unipc", [1.0, 0.5, 0.0])


@pytest.mark.parametrize("sampler", ["unipc", "dpm++"])
def test_steps_out_of_order_are_refused(sampler: str) -> None:
    solver = make_solver(sampler, [0.9, 0.5, 0.0])
    x = noise(SHAPE, seed=0)
    with pytest.raises(ValueError, match="step 1 with the state of the start"):
        solver.step(x, x, 1, solver.start())
    _, state = solver.step(x, x, 0, solver.start())
    with pytest.raises(ValueError, match="step 0 with the state of a later step"):
        solver.step(x, x, 0, state)
    with pytest.raises(ValueError, match="step 2 but 0 to 1 expected"):
        solver.step(x, x, 2, state)
    with pytest.raises(ValueError, match=r"velocity: shape \[1, 4, 2, 3, 3\]"):
        solver.step(x, x[None], 1, state)


def test_noise_is_a_function_of_shape_and_seed() -> None:
    first = noise((16, 5, 8, 8), seed=7)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    assert torch.equal(first, noise([16, 5, 8, 8], seed=7))
    assert not torch.equal(first, noise((16, 5, 8, 8), seed=8))
    assert abs(float(first.mean())) < 0.05
    assert abs(float(first.std()) - 1) < 0.05


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    noise((5,), seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match=f"seed: got {seed}"):
        noise((1,), seed)


def test_guidance() -> None:
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(cond, uncond, 1.0).item() == 3.0
    assert guide(cond, uncond, 5.0).item() == 11.0
    assert guide(cond.bfloat16(), uncond.bfloat16(), 5.0).dtype == torch.float32
