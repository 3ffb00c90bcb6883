"""Step caches: steps whose answer can be told from the last ones are not computed.

    cache = make_cache("easy=0.05", steps, ...)
    for i in range(steps):
        cond, uncond = cache.velocities(x, i, (COND, UNCOND), run)

`run(x, i, branches, around)` computes the velocities of some branches: with the prompt (COND) and without (UNCOND). A
cache decides once a step, answers what it can, and has the rest computed; a branch that it knows nothing of is always
computed (guidance may begin in the middle), and so are the first steps and the last.

    none    every step is computed
    easy    EasyCache (arXiv 2507.02860): watches latents and velocities, needs no numbers of the model. The answer is
            the last difference of velocity and latents, added to the latents of now. Both branches follow what the
            one with the prompt does
    tea     TeaCache (arXiv 2411.19108): a polynomial of the change of the time embedding, published for the model
    mag     MagCache (arXiv 2506.09045): ratios by which the blocks' change shrinks from step to step, measured once

The last two keep what the blocks added to the tokens, so that the head still sees the time of now. They decide from the
schedule alone: `tea_plan` and `mag_plan` are functions of numbers.

Sources: H-EmbodVis/EasyCache 5127804, the others in `cache_tables.py`. Differs: the last step is always computed, and
EasyCache's ten first steps of fifty are a fifth of any number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mutoscope.engine.cache_tables import MagNumbers, TeaNumbers, published
from mutoscope.engine.memory import n_tokens
from mutoscope.engine.wan import TimeModulation, WanConfig
from mutoscope.errors import FileError
from mutoscope.request import GenerationRequest

COND, UNCOND = 0, 1
Branches = tuple[int, ...]
Blocks = Callable[[Tensor], Tensor]
Around = Callable[[Branches, Tensor, Blocks], Tensor]
"""Stands in the place of the blocks for these branches, [B, L, D]; may call them."""
Run = Callable[[Tensor, int, Branches, Around | None], list[Tensor]]

FIRST_SHARE = 0.2
"""Of all steps, that are computed before the first may be left out."""
EASY_THRESHOLD = 0.05
"""As published."""


class StepCache(Protocol):
    def velocities(self, x: Tensor, i: int, branches: Branches, run: Run) -> list[Tensor]:
        """The velocity of each branch at step i. Steps come in order, from 0."""


class NoCache:
    """Every step is computed."""

    def velocities(self, x: Tensor, i: int, branches: Branches, run: Run) -> list[Tensor]:
        return run(x, i, branches, None)


@dataclass
class EasyCache:
    """threshold: of the summed relative change of the velocity, as predicted; 0 leaves out nothing."""

    threshold: float
    n_steps: int
    rate: float | None = None
    """How much the velocity changed for a change of the latents, between the last two computed steps."""
    error: float = 0.0
    previous: Tensor | None = None
    """Latents of the step before."""
    start: Tensor | None = None
    """Latents of the last computed step."""
    velocity: Tensor | None = None
    """Its velocity, with the prompt."""
    differences: dict[int, Tensor] = field(default_factory=dict)

    def velocities(self, x: Tensor, i: int, branches: Branches, run: Run) -> list[Tensor]:
        compute = self._must(x, i)
        self.previous = x
        missing = branches if compute else tuple(b for b in branches if b not in self.differences)
        fresh = dict(zip(missing, run(x, i, missing, None), strict=True)) if missing else {}
        for branch, v in fresh.items():
            self.differences[branch] = v - x
        if COND in fresh:
            self._learn(x, fresh[COND])
        return [fresh[b] if b in fresh else x + self.differences[b] for b in branches]

    def _must(self, x: Tensor, i: int) -> bool:
        """Whether step i has to be computed; counts the change since the step before."""
        first = max(1, round(FIRST_SHARE * self.n_steps))
        if i < first or i == self.n_steps - 1:
            self.error = 0.0
            return True
        if self.rate is None or self.previous is None or self.velocity is None:
            return True
        self.error += self.rate * _distance(x, self.previous) / max(_size(self.velocity), 1e-30)
        if self.error < self.threshold:
            return False
        self.error = 0.0
        return True

    def _learn(self, x: Tensor, velocity: Tensor) -> None:
        if self.start is not None and self.velocity is not None:
            moved = _distance(x, self.start)
            self.rate = _distance(velocity, self.velocity) / moved if moved else None
        self.start, self.velocity = x, velocity


@dataclass
class BlockCache:
    """Keeps what the blocks added to the tokens. `skips` says for each branch which steps may go without them."""

    skips: tuple[Sequence[bool], Sequence[bool]]
    added: dict[int, Tensor] = field(default_factory=dict)

    def velocities(self, x: Tensor, i: int, branches: Branches, run: Run) -> list[Tensor]:
        without = tuple(b for b in branches if self.skips[b][i] and b in self.added)
        computed = tuple(b for b in branches if b not in without)
        found: dict[int, Tensor] = {}
        for part, around in ((computed, self._remember), (without, self._repeat)):
            if part:
                found |= zip(part, run(x, i, part, around), strict=True)
        return [found[b] for b in branches]

    def _remember(self, branches: Branches, x_BLD: Tensor, blocks: Blocks) -> Tensor:
        before = x_BLD.clone()
        after = blocks(x_BLD)
        added = torch.sub(after, before, out=before)
        for row, branch in enumerate(branches):
            self.added[branch] = added[row : row + 1]
        return after

    def _repeat(self, branches: Branches, x_BLD: Tensor, blocks: Blocks) -> Tensor:
        return x_BLD + torch.cat([self.added[b] for b in branches])


@dataclass
class MagnitudeRecorder:
    """Computes every step and notes MagCache's ratios of it, [steps] for each branch; the first is 1.

    generate(models, request, step_cache=recorder); recorder.save(path)
    """

    ratios: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    _lengths: dict[int, Tensor] = field(default_factory=dict)

    def velocities(self, x: Tensor, i: int, branches: Branches, run: Run) -> list[Tensor]:
        return run(x, i, branches, self._measure)

    def _measure(self, branches: Branches, x_BLD: Tensor, blocks: Blocks) -> Tensor:
        before = x_BLD.clone()
        after = blocks(x_BLD)
        lengths_BL = torch.linalg.vector_norm(after - before, dim=-1)
        for row, branch in enumerate(branches):
            old = self._lengths.get(branch)
            self.ratios[branch].append(1.0 if old is None else float((lengths_BL[row] / old).mean()))
            self._lengths[branch] = lengths_BL[row]
        return after


def mean_magnitudes(records: Sequence[MagnitudeRecorder]) -> dict[str, list[float]]:
    """What `magnitudes` of a model.toml holds: ratios averaged over clips of as many steps each."""
    out = {}
    for branch, name in ((COND, "cond"), (UNCOND, "uncond")):
        rows = [record.ratios[branch] for record in records]
        out[name] = [round(sum(column) / len(column), 5) for column in zip(*rows, strict=True)]
    return out


def read_magnitudes(path: Path) -> MagNumbers:
    """A model's own ratios: JSON with `cond`, `uncond` and, optional, `threshold` and `most`."""
    try:
        found = json.loads(path.read_text("utf-8"))
        cond, uncond = (tuple(map(float, found[name])) for name in ("cond", "uncond"))
        numbers = MagNumbers(cond, uncond, float(found.get("threshold", 0.06)), int(found.get("most", 2)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: cannot be read as magnitudes ({error!r}).",
                        hint="Write them with scripts/measure_magnitudes.py.") from error  # fmt: skip
    if not cond or not uncond:
        raise FileError(f"{path}: holds no ratios.", hint="Write them with scripts/measure_magnitudes.py.")
    return numbers


def tea_plan(signal: Sequence[Tensor], numbers: TeaNumbers, threshold: float) -> list[bool]:
    """Which steps are left out, from the (time embedding or modulation of) each step."""
    changes = [0.0] + [_distance(b, a) / max(_size(a), 1e-30) for a, b in pairwise(signal)]
    plan, error = [], 0.0
    for i, change in enumerate(changes):
        if i < numbers.first_steps or i == len(changes) - 1:
            error = 0.0
            plan.append(False)
            continue
        error += math.fsum(c * change**power for power, c in enumerate(reversed(numbers.coefficients)))
        skip = error < threshold and threshold > 0
        error = error if skip else 0.0
        plan.append(skip)
    return plan


def mag_plan(ratios: Sequence[float], n_steps: int, threshold: float, most: int) -> list[bool]:
    """Which of n steps are left out, at most `most` in a row; ratios of another number of steps are spread over it."""
    plan, product, error, row = [], 1.0, 0.0, 0
    for i, ratio in enumerate(_spread(ratios, n_steps)):
        if i < max(1, int(FIRST_SHARE * n_steps)) or i == n_steps - 1:
            plan.append(False)
            continue
        product, row = product * ratio, row + 1
        error += abs(1 - product)
        skip = error < threshold and row <= most
        if not skip:
            product, error, row = 1.0, 0.0, 0
        plan.append(skip)
    return plan


def _spread(ratios: Sequence[float], n: int) -> list[float]:
    """Nearest of the published ones, as their authors do."""
    if n == 1:
        return [ratios[-1]]
    return [ratios[round(i * (len(ratios) - 1) / (n - 1))] for i in range(n)]


Numbers = TeaNumbers | MagNumbers | None


def find_numbers(wanted: str, config: WanConfig, own: Path | None = None) -> Numbers:
    """What the cache of a planned request has to know of the model; `own`: the model's own magnitudes.

    Raises:
        RequestError: there are no numbers for this model.
    """
    kind = wanted.partition("=")[0]
    if kind == "mag" and own is not None:
        return read_magnitudes(own)
    return published(kind, config.dim, config.n_layers, vace=bool(config.vace_layers))


def make_cache(wanted: str, steps: int, numbers: Numbers, modulation: TimeModulation) -> StepCache:
    """The cache that a planned request names: "none", or a kind, or a kind and a threshold ("easy=0.05").

    modulation: of all steps.
    """
    kind, _, text = wanted.partition("=")
    threshold = float(text) if text else None
    if kind == "easy":
        return EasyCache(EASY_THRESHOLD if threshold is None else threshold, steps)
    if isinstance(numbers, TeaNumbers):
        signal = list(modulation.e0 if numbers.per_block else modulation.e)
        plan = tea_plan(signal, numbers, numbers.threshold if threshold is None else threshold)
        return BlockCache((plan, plan))
    if isinstance(numbers, MagNumbers):
        limit = numbers.threshold if threshold is None else threshold
        cond, uncond = (mag_plan(r, steps, limit, numbers.most) for r in (numbers.cond, numbers.uncond))
        return BlockCache((cond, uncond))
    assert kind == "none"
    return NoCache()


def kept_bytes(config: WanConfig, request: GenerationRequest) -> int:
    """What a `BlockCache` keeps of both branches, and the copy that it compares with; float32."""
    n_references = request.conditioning.n_references
    tokens = n_tokens(request.width or 0, request.height or 0, request.frames or 0, n_references)
    return 3 * 4 * tokens * config.dim


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def _size(a: Tensor) -> float:
    return float(a.abs().mean())
