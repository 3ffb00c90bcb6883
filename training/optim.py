"""Muon for matrices and convolutions, AdamW for the rest; a learning rate that decays over the last part of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices, batched over [N, rows, cols].

    Source: Keller Jordan, "Muon: an optimizer for hidden layers" (2024), quintic coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)


def _orthogonalise_together(updates: Tensor) -> Tensor:
    """`orthogonalise` with the matrices [N, rows, cols] shared out over the processes, whose updates are equal."""
    if not dist.is_initialized() or len(updates) == 1:
        return orthogonalise(updates)
    parts = list(updates.bfloat16().tensor_split(dist.get_world_size()))
    parts[dist.get_rank()] = orthogonalise(parts[dist.get_rank()])
    for rank, part in enumerate(parts):
        dist.broadcast(part, src=rank)
    return torch.cat(parts).to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Weights are taken as [out, rest]; those of equal shape go together."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, cols), params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]).reshape(rows, cols))
                stacked = _orthogonalise_together(torch.stack(updates))
                size = group["lr"] * max(1.0, rows / cols) ** 0.5
                for p, update in zip(params, stacked, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-size)


def split(
    modules: Iterable[nn.Module], *, adam_names: tuple[str, ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters for Muon (hidden matrices and convolutions) and for AdamW (vectors, tables, first and last layers)."""
    muon, adam = [], []
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad:
                (
                    adam if p.dim() < 2 or p.shape[0] == 1 or any(n in name for n in adam_names) else muon
                ).append(p)
    return muon, adam


def load(module: nn.Module, weights: dict[str, Tensor], *, new: str) -> None:
    """Saved weights into a module. Names that begin with `new` may differ: what is missing stays as it is.

    RuntimeError for any other name that is missing or unknown.
    """
    fresh = {k: v for k, v in module.state_dict().items() if k.startswith(new)}
    saved = {k: v for k, v in weights.items() if k in fresh or not k.startswith(new)}
    module.load_state_dict(fresh | saved)


def decayed(progress: float, warm_up: float = 0.02, decay: float = 0.4) -> float:
    """Factor of the learning rate at a share of the run: linear warm-up, constant, linear decay to 1 %."""
    if progress < warm_up:
        return progress / warm_up
    return 1.0 if progress < 1 - decay else max(0.01, (1 - progress) / decay)


class Rates:
    """The learning rates of optimisers as they are made, and those of a moment of the run."""

    def __init__(self, optimisers: Iterable[torch.optim.Optimizer]) -> None:
        self.groups = [(group, group["lr"]) for o in optimisers for group in o.param_groups]

    def at(self, progress: float, decay: float = 0.4) -> None:
        for group, rate in self.groups:
            group["lr"] = rate * decayed(progress, decay=decay)


class EMA:
    """Moving average of a module's weights; the average is what is evaluated and exported."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for k, v in module.state_dict().items():
            self.weights[k].lerp_(v, 1 - decay)
