"""Samplers against diffusers, whole trajectories, and against the exact solution of a flow that has one.

The grids of diffusers (0.42) differ from the official Wan code: before the shift its UniPC runs from
1 - 1e-6 down towards 0.001, its DPM++ from 0.999 down towards 0 (the official one from 1), its Euler from 1
to 0.001. The schedulers are therefore given our sigmas; tests/unit/test_sampler.py pins the grids to numbers
of the official code.

Measured in float32: relative difference at most 4.2e-7 (50 steps), 0 for euler; the bound is 3e-6.
By hand, against the schedulers of Wan2.1 9737cba, 1 to 100 steps, shift 1 to 16: sigmas and time steps equal,
latents within 6.6e-7 (unipc) and 4.5e-7 (dpm++).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from mutoscope.engine import sampler as sampler_module
from mutoscope.engine.sampler import State, make_solver, noise, schedule

pytestmark = pytest.mark.filterwarnings(
    # diffusers' DPMSolverMultistepScheduler hands a tensor to np.array
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

TOLERANCE = 3e-6
SHAPE = (1, 8, 3, 6, 6)

REFERENCES: dict[str, Callable[[], Any]] = {
    "unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
    ),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
    ),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "distill4": lambda: FlowMatchEulerDiscreteScheduler(),
}
RUNS = [(name, steps) for name in ("unipc", "dpm++", "euler") for steps in (1, 2, 3, 10, 50)] + [
    ("distill4", 4)
]


def model(x: Tensor, sigma: float) -> Tensor:
    """A nonlinear stand-in for the network that mixes channels and depends on time."""
    mix = torch.randn(SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(5)) / math.sqrt(SHAPE[1])
    guess = 1.5 * torch.tanh(torch.einsum("ij,bjfhw->bifhw", mix, x)) + 0.3 * torch.sin(2 * x + 5 * sigma)
    return 0.6 * x - guess


def difference(name: str, steps: int, shift: float) -> float:
    """Largest relative difference between our trajectory and diffusers', over all steps."""
    sigmas = schedule(name, steps, shift)
    reference = REFERENCES[name]()
    if name in ("euler", "distill4"):
        reference.set_timesteps(sigmas=sigmas[:-1])
    else:
        reference.set_timesteps(steps)
        reference.sigmas = torch.tensor(sigmas)
    reference.set_begin_index(0)
    solver = make_solver(name, sigmas)
    state = solver.start()
    theirs = ours = noise(SHAPE, seed=1)
    worst = 0.0
    for i, time in enumerate(reference.timesteps):
        theirs = reference.step(model(theirs, sigmas[i]), time, theirs, return_dict=False)[0]
        ours, state = solver.step(ours, model(ours, sigmas[i]), i, state)
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_trajectories_equal_those_of_diffusers(name: str, steps: int, shift: float) -> None:
    assert difference(name, steps, shift) < TOLERANCE


def _without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded fault: the corrector stays at order 1."""
    correct = sampler_module._unipc_correct
    monkeypatch.setattr(
        sampler_module,
        "_unipc_correct",
        lambda m_c, i, state, sigmas: correct(m_c, i, state._replace(older=None), sigmas),
    )


def _half_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded fault: lambda = log(alpha / sigma) taken for the log of the squares' ratio."""
    full = sampler_module._lambda
    monkeypatch.setattr(sampler_module, "_lambda", lambda sigma: full(sigma) / 2)


def _late_sigma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded fault: the step starts from the sigma it should end on."""
    row = sampler_module.SAMPLERS["euler"]
    late = row._replace(step=lambda x, v, i, state, s: (x + (s[i + 1] - s[max(i - 1, 0)]) * v, state))
    monkeypatch.setitem(sampler_module.SAMPLERS, "euler", late)
    monkeypatch.setitem(sampler_module.SAMPLERS, "distill4", late._replace(**_grid("distill4")))


def _grid(name: str) -> dict[str, Any]:
    """The schedule half of a sampler's row."""
    row = sampler_module.SAMPLERS[name]
    return {"grid": row.grid, "fixed_steps": row.fixed_steps}


@pytest.mark.parametrize(
    ("name", "steps", "fault"),
    [
        ("unipc", 10, _without_history),
        ("unipc", 10, _half_lambda),
        ("dpm++", 10, _half_lambda),
        ("euler", 10, _late_sigma),
        ("distill4", 4, _late_sigma),
    ],
)
def test_a_wrong_formula_would_be_noticed(
    name: str, steps: int, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert difference(name, steps, 5.0) > 100 * TOLERANCE


def error(name: str, sigmas: list[float], n_steps: int) -> float:
    """Distance after n_steps from the exact flow of noise into the normal distribution N(mean, spread^2).

    There the best prediction of x0 is linear in x, and along the flow x - (1 - s) mean stays proportional to
    sqrt((1 - s)^2 spread^2 + s^2).
    """
    mean, spread = 0.7, 0.8

    def deviation(sigma: float) -> float:
        return math.hypot((1 - sigma) * spread, sigma)

    solver = make_solver(name, sigmas)
    x, state = noise(SHAPE, seed=2), solver.start()
    first, last = solver.sigmas[0], solver.sigmas[n_steps]
    exact = (1 - last) * mean + deviation(last) / deviation(first) * (x - (1 - first) * mean)
    for i, sigma in enumerate(solver.sigmas[:n_steps]):
        x0 = mean + (1 - sigma) * (spread / deviation(sigma)) ** 2 * (x - (1 - sigma) * mean)
        x, state = solver.step(x, (x - x0) / sigma, i, state)
    return float((x - exact).norm() / exact.norm())


def order(name: str) -> float:
    """Measured order between 32 and 64 steps, away from both ends, where lambda is infinite."""

    def inner(n_steps: int) -> float:
        return error(name, [*np.linspace(0.9, 0.1, n_steps + 1).tolist(), 0.0], n_steps)

    return math.log2(inner(32) / inner(64))


@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_the_error_falls_with_the_order_of_the_method(name: str, expected: int) -> None:
    """Measured: euler 0.99, dpm++ 2.08, unipc 2.95 (the corrector adds one)."""
    assert expected - 0.1 < order(name) < expected + 1.1


def test_a_method_that_forgets_is_of_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    row = sampler_module.SAMPLERS["dpm++"]
    forgetful = row._replace(step=lambda x, v, i, state, s: row.step(x, v, i, State(), s))
    monkeypatch.setitem(sampler_module.SAMPLERS, "dpm++", forgetful)
    assert order("dpm++") < 1.3


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_second_order_is_worth_it_on_the_whole_way(name: str) -> None:
    """Measured at 32 steps: euler 2.9e-2, dpm++ 2.2e-3, unipc 1.4e-3."""
    assert error(name, schedule(name, 32, 1.0), 32) < error("euler", schedule("euler", 32, 1.0), 32) / 10
