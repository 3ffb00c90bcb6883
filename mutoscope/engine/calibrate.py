"""Which layers stand 8-bit integers, measured: the error of each on what the model itself feeds it.

    report = calibrate(path)            # runs a few small forwards
    write_sidecar(path, report)         # FILE.precision.json, which `auto` then follows

One forward of seeded noise, in bfloat16, shows every layer its real activations (outliers included); each layer's
integer product is compared with the float32 product of the same activations. Layers beyond MAX_LAYER_ERROR stay in
bfloat16, and then the worst of the rest, until the velocity of the whole is within MAX_VELOCITY_ERROR of float32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.engine import int8, pages
from mutoscope.engine.int8 import Int8
from mutoscope.engine.linear import QuantLinear, Shared, Unpacked
from mutoscope.engine.precision import sidecar_of
from mutoscope.engine.wan import WanModel, rope_table
from mutoscope.engine.weights import load_wan

MAX_LAYER_ERROR = 0.03
"""Relative L2 of one product. Gaussian numbers give 0.012, so this is for outliers."""
MAX_VELOCITY_ERROR = 0.025
"""Relative L2 of the velocity against float32. What is promised is 0.03."""
LEVELS = (900.0, 500.0)
"""Noise levels that are looked at."""
GRID = (2, 8, 8)
"""Frames, rows and columns of tokens."""
TEXT_ROWS = 40


def calibrate(paths: Sequence[Path], *, rows: Tensor | None = None) -> dict[str, Any]:
    """Errors per layer, the layers to keep in bfloat16, and the error of the whole before and after.

    rows: the text encoder's of some prompt, float [1, S, E]; seeded noise without.
    """
    with torch.inference_mode():
        pages.reuse_freed()
        model = load_wan(paths, precision="auto", sidecar=False)
        layers = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, QuantLinear) and isinstance(layer.precision, Int8)
        }
        report: dict[str, Any] = {"version": 1, "size_bytes": paths[0].stat().st_size, "bf16": []}
        if not layers:
            return {**report, "layers": {}, "velocity_error": None}
        run = _Run(model, rows)
        main = Unpacked(torch.bfloat16)
        integer = next(iter(layers.values())).precision
        with _all(model, Unpacked(torch.float32)):
            expected = run()
        errors = dict.fromkeys(layers, 0.0)
        with _all(model, main), _measured(layers, errors):
            run()
        kept = {path for path, error in errors.items() if error > MAX_LAYER_ERROR}
        worst = sorted(errors, key=lambda path: errors[path], reverse=True)
        step = max(1, len(worst) // 10)
        while True:
            for path, layer in layers.items():
                layer.precision = main if path in kept else integer
                layer.precision.admit(layer.weight)
            found = _distance(run(), expected)
            report.setdefault("velocity_error_int8", found)
            if found <= MAX_VELOCITY_ERROR or len(kept) == len(layers):
                break
            kept.update([path for path in worst if path not in kept][:step])
        return {
            **report,
            "velocity_error": found,
            "bf16": sorted(kept),
            "layers": {path: round(error, 5) for path, error in errors.items()},
        }


def write_sidecar(path: Path, report: dict[str, Any]) -> Path:
    """Beside the file that was looked at. Raises OSError where that cannot be written."""
    target = sidecar_of(path)
    unfinished = target.with_name(target.name + ".part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    os.replace(unfinished, target)
    return target


class _Run:
    """The velocities of one seeded sample at all levels, [2, C, F, H, W]."""

    def __init__(self, model: WanModel, rows: Tensor | None) -> None:
        config = model.config
        rng = torch.Generator().manual_seed(0)
        frames, height, width = GRID
        if rows is None:
            rows = torch.randn(1, TEXT_ROWS, config.text_dim, generator=rng)
        self.model = model
        x = torch.randn(1, config.in_dim, frames, 2 * height, 2 * width, generator=rng)
        self.x = x.expand(len(LEVELS), -1, -1, -1, -1)
        self.rope = rope_table(GRID, config.head_dim)
        self.time = model.time_modulation(torch.tensor(LEVELS))
        rows = rows.expand(len(LEVELS), -1, -1)
        self.text = model.text_context(rows, [rows.shape[1]] * len(LEVELS))

    def __call__(self) -> Tensor:
        return self.model(self.x, self.time, self.text, self.rope).clone()


@contextmanager
def _all(model: nn.Module, precision: Unpacked) -> Iterator[None]:
    """Every layer in that precision."""
    before = {layer: layer.precision for layer in model.modules() if isinstance(layer, QuantLinear)}
    for layer in before:
        if layer.precision.dtype != torch.float32:
            layer.precision = precision
            precision.admit(layer.weight)
    try:
        yield
    finally:
        for layer, own in before.items():
            layer.precision = own


@contextmanager
def _measured(layers: dict[str, QuantLinear], errors: dict[str, float]) -> Iterator[None]:
    """While these layers are used, note the error that the integer product would have had."""

    def hook(path: str) -> Any:
        def look(layer: QuantLinear, given: tuple[Tensor | Shared, ...]) -> None:
            low = given[0].low if isinstance(given[0], Shared) else None
            x = (given[0].x if isinstance(given[0], Shared) else given[0]).float().flatten(0, -2)
            expected = F.linear(x, layer.weight.values(torch.float32))
            got = int8.product(int8.quantize_rows(x, low), int8.prepare(layer.weight), None)
            errors[path] = max(errors[path], _distance(got, expected))

        return look

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
