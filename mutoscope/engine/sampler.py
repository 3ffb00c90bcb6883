"""Flow-matching samplers: arithmetic on a list of sigmas.

Rectified flow puts a clip at noise level s on the line x = (1 - s) x0 + s noise; the model answers with the
velocity v = noise - x0, so x0 = x - s v. A schedule is a list of floats from high noise down to 0.0. A
solver goes from one to the next and remembers nothing: what a multistep method needs of the past is a
`State` that the caller holds, a few tensors that can be saved with the latents. All is float32, whatever
dtype the model answers in.

    sigmas = schedule("unipc", steps=50, shift=5.0)                    # 51 floats
    solver = make_solver("unipc", sigmas)
    x, state = noise(shape, seed=0), solver.start()
    for i, sigma in enumerate(sigmas[:-1]):
        x, state = solver.step(x, velocity(x, timestep("unipc", sigma)), i, state)

Sources: UniPC (arXiv 2302.04867), DPM-Solver++ (arXiv 2211.01095) and, for grids and time steps, Wan2.1
9737cba, `wan/utils/fm_solvers_unipc.py` and `fm_solvers.py`; for distill4 the 4-step schedule of LightX2V.
Symbols: alpha = 1 - sigma, lambda = log(alpha / sigma), h = the step in lambda, m = a prediction of x0;
indices p (previous), c (current), n (next).

Details that have caused bugs, here or elsewhere:
- The official UniPC starts at 0.999, not at 1, so that lambda stays finite.
- The official time steps are cut to whole numbers after the shift; rounding gives other ones. They are cut
  from float64 sigmas, while the solvers compute with float32 ones.
- The corrector at step i uses the order of the predictor of step i - 1, not that of step i.
- sigma 1 has lambda -inf and sigma 0 has +inf: the limits are finite, the formulas have to get there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mutoscope.errors import RequestError

DEFAULT = "unipc"
TIMESTEPS = 1000
"""Time steps the models were trained with: time = 1000 sigma."""
MAX_STEPS = 1000
MAX_SHIFT = 100.0
DISTILLED = (1.0, 0.75, 0.5, 0.25)
"""Unshifted sigmas of the step-distilled models, their steps 1000, 750, 500, 250."""

_UNIPC_FIRST = float(np.float32(1 - 1 / TIMESTEPS))


class State(NamedTuple):
    """What a multistep solver keeps: float32 tensors of the latents' shape, None until there are any.

    older, newer  x0 predicted two steps ago and at the last step
    start         the (corrected) sample that the last step started from
    """

    older: Tensor | None = None
    newer: Tensor | None = None
    start: Tensor | None = None


StepFunction = Callable[[Tensor, Tensor, int, "State", Sequence[float]], tuple[Tensor, State]]


class Sampler(NamedTuple):
    """One row of `SAMPLERS`.

    grid             number of steps to unshifted sigmas, high to low, without the final 0
    step             the update, from sigma i to sigma i + 1
    multistep        the update needs the state of the step before
    whole_timesteps  the model was run at whole time steps
    fixed_steps      the only number of steps that works, None for any
    """

    grid: Callable[[int], Sequence[float]]
    step: StepFunction
    multistep: bool
    whole_timesteps: bool
    fixed_steps: int | None = None


@dataclass(frozen=True)
class Solver:
    """A sampler bound to its sigmas; stateless, see the module's example."""

    sampler: str
    sigmas: tuple[float, ...]

    def start(self) -> State:
        """The state before step 0."""
        return State()

    def step(self, x: Tensor, velocity: Tensor, i: int, state: State) -> tuple[Tensor, State]:
        """From sigma i to sigma i + 1.

        x, velocity: any one shape and device; velocity is the (guided) answer of the model to x at sigma i.
        Returns float32 latents and the state for step i + 1. Steps must be taken in order, each with the
        state of the one before; a state that cannot belong to step i is refused with ValueError.
        """
        n_steps = len(self.sigmas) - 1
        if not 0 <= i < n_steps:
            raise ValueError(f"step {i} but 0 to {n_steps - 1} expected")
        if x.shape != velocity.shape:
            raise ValueError(
                f"velocity: shape {list(velocity.shape)} but {list(x.shape)} expected, as the latents"
            )
        row = SAMPLERS[self.sampler]
        if row.multistep and (state.newer is None) != (i == 0):
            raise ValueError(f"step {i} with the state of {'the start' if i else 'a later step'}")
        x, velocity = x.to(torch.float32), velocity.to(torch.float32)
        return row.step(x, velocity, i, state, self.sigmas)


def make_solver(sampler: str, sigmas: Sequence[float]) -> Solver:
    """Bind a sampler to sigmas, which must fall strictly from at most 1 to exactly 0.

    They are rounded to float32 as in the official schedulers. Raises RequestError for an unknown sampler and
    ValueError for sigmas it cannot use.
    """
    step = _find(sampler).step
    rounded = tuple(float(np.float32(sigma)) for sigma in sigmas)
    falling = all(a > b for a, b in pairwise(rounded))
    if len(rounded) < 2 or not falling or rounded[0] > 1 or rounded[-1] != 0:
        raise ValueError(f"sigmas must fall strictly from at most 1 to 0, got {list(sigmas)}")
    if step is _unipc and rounded[0] == 1:
        raise ValueError("unipc needs a first sigma below 1: its corrector has no limit there")
    return Solver(sampler, rounded)


def schedule(sampler: str, steps: int, shift: float) -> list[float]:
    """steps + 1 sigmas, falling to 0.0; shift > 1 spends more of the steps at high noise.

    Raises RequestError for an unknown sampler, or steps or shift out of range.
    """
    row = _find(sampler)
    if row.fixed_steps is not None and steps != row.fixed_steps:
        raise RequestError(
            f"Sampler {sampler!r} takes exactly {row.fixed_steps} steps, got {steps}.",
            hint="It is for step-distilled models; choose another sampler for more steps.",
        )
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"steps: got {steps} but 1 to {MAX_STEPS} expected.")
    if not 0 < shift <= MAX_SHIFT:
        raise RequestError(f"shift: got {shift} but more than 0 and at most {MAX_SHIFT:g} expected.")
    return [shift * s / (1 + (shift - 1) * s) for s in map(float, row.grid(steps))] + [0.0]


def timestep(sampler: str, sigma: float) -> float:
    """The time the model is told, 0 to 1000.

    unipc and dpm++: cut to a whole number, as the official schedulers do (int64). euler and distill4: as it
    is.
    """
    time = sigma * TIMESTEPS
    return float(int(time)) if _find(sampler).whole_timesteps else time


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 of `shape`, drawn on the CPU: a seed means the same start on every device."""
    if not 0 <= seed < 2**64:
        raise RequestError(f"seed: got {seed} but 0 to 2**64 - 1 expected.")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance in float32: away from `uncond`, through `cond`; scale 1.0 is `cond`.

    A scale for each place is a tensor that broadcasts to theirs.
    """
    cond, uncond = cond.to(torch.float32), uncond.to(torch.float32)
    return uncond + scale * (cond - uncond)


def guide_zero_star(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): guidance from where `uncond` is nearest to `cond`, a multiple of it.

    The multiple is <cond, uncond> / |uncond|^2 of each sample. Tensors [B, ...], float32 out.
    """
    cond, uncond = cond.to(torch.float32), uncond.to(torch.float32)
    c, u = cond.flatten(1), uncond.flatten(1)
    multiple = (c * u).sum(1) / (u.square().sum(1) + 1e-8)
    return guide(cond, uncond * multiple.view(-1, *(1,) * (cond.ndim - 1)), scale)


def is_guided(i: int, steps: int, interval: tuple[float, float]) -> bool:
    """Whether step i lies in an interval of fractions of the steps (limited guidance: arXiv 2404.07724)."""
    return interval[0] <= i / steps < interval[1]


def _find(sampler: str) -> Sampler:
    """The row of a sampler, or RequestError with the nearest names."""
    if sampler in SAMPLERS:
        return SAMPLERS[sampler]
    near = get_close_matches(sampler.lower(), SAMPLERS, n=2, cutoff=0.4) or list(SAMPLERS)
    raise RequestError(
        f"Unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}.",
        hint=f"Did you mean {' or '.join(near)}?",
    )


def _lambda(sigma: float) -> float:
    """Half the log signal-to-noise ratio: -inf at pure noise, +inf at the clean end."""
    if sigma <= 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf


def _euler(
    x: Tensor, velocity: Tensor, i: int, state: State, sigmas: Sequence[float]
) -> tuple[Tensor, State]:
    """A straight step along the velocity."""
    return x + (sigmas[i + 1] - sigmas[i]) * velocity, state


def _dpmpp(
    x: Tensor, velocity: Tensor, i: int, state: State, sigmas: Sequence[float]
) -> tuple[Tensor, State]:
    """DPM-Solver++ 2M, midpoint; first order at both ends."""
    m_c = x - sigmas[i] * velocity
    return _predict(x, m_c, i, state.newer, sigmas), State(newer=m_c)


def _unipc(
    x: Tensor, velocity: Tensor, i: int, state: State, sigmas: Sequence[float]
) -> tuple[Tensor, State]:
    """UniPC of order 2, B(h) = e^-h - 1 ("bh2"): correct the sample just reached, then predict the next."""
    m_c = x - sigmas[i] * velocity
    if state.newer is not None and state.start is not None:
        x = _unipc_correct(m_c, i, state, sigmas)
    after = State(older=state.newer, newer=m_c, start=x)
    return _predict(x, m_c, i, state.newer, sigmas), after


def _predict(x: Tensor, m_c: Tensor, i: int, m_p: Tensor | None, sigmas: Sequence[float]) -> Tensor:
    """The next sample from the clean guesses of this step and the one before, if there was one.

    UniPC's predictor and the multistep of DPM-Solver++ are the same formula at this order.
    """
    s_c, s_n = sigmas[i], sigmas[i + 1]
    if s_n == 0:
        return m_c
    h = _lambda(s_n) - _lambda(s_c)
    gain = -(1 - s_n) * math.expm1(-h)
    x_n = (s_n / s_c) * x + gain * m_c
    if m_p is None:
        return x_n
    r = (_lambda(s_c) - _lambda(sigmas[i - 1])) / h
    return x_n + (gain * 0.5 / r) * (m_c - m_p)


def _unipc_correct(m_c: Tensor, i: int, state: State, sigmas: Sequence[float]) -> Tensor:
    """Sample i again, now that the model has been asked there, at the order of the step that reached it."""
    assert state.newer is not None
    assert state.start is not None
    s_p, s_c = sigmas[i - 1], sigmas[i]
    h = _lambda(s_c) - _lambda(s_p)
    gain = -(1 - s_c) * math.expm1(-h)
    x = (s_c / s_p) * state.start + gain * state.newer
    if state.older is None:
        return x + (gain * 0.5) * (m_c - state.newer)
    # The weights w solve [[1, 1], [r, 1]] w = b with b_k the moments of the exponential over the step.
    r = (_lambda(sigmas[i - 2]) - _lambda(s_p)) / h
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    w_older = (b_1 - b_2) / (1 - r)
    w_newest = b_1 - w_older
    return x + (gain * w_older / r) * (state.older - state.newer) + (gain * w_newest) * (m_c - state.newer)


def _linear(first: float) -> Callable[[int], Sequence[float]]:
    """Equal steps from `first` down to 0, the 0 left out."""
    return lambda steps: np.linspace(first, 0.0, steps + 1)[:-1].tolist()


SAMPLERS: dict[str, Sampler] = {
    "unipc": Sampler(_linear(_UNIPC_FIRST), _unipc, multistep=True, whole_timesteps=True),
    "dpm++": Sampler(_linear(1.0), _dpmpp, multistep=True, whole_timesteps=True),
    "euler": Sampler(_linear(1.0), _euler, multistep=False, whole_timesteps=False),
    "distill4": Sampler(
        lambda steps: DISTILLED, _euler, multistep=False, whole_timesteps=False, fixed_steps=len(DISTILLED)
    ),
}
