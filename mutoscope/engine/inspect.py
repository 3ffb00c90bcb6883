"""What is in a weight file, and what this machine can do with it.

    inspect_file(path) -> dict      plain values, ready for JSON
    render(report) -> str           the same for people

Only headers are read: no tensor data, whatever the size of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from mutoscope.engine import memory, umt5, vae, wan
from mutoscope.engine.gguf import type_name
from mutoscope.engine.int8 import Int8
from mutoscope.engine.linear import Packed
from mutoscope.engine.precision import chooser, read_sidecar
from mutoscope.engine.weights import Stored, WeightSource, open_weights
from mutoscope.errors import WeightError

SIZES = ((480, 256), (832, 480), (1280, 720))
"""Frame sizes, in pixels, for which the longest clip is estimated."""
TRAINED_FRAMES = 81
"""Wan 2.1 saw clips of up to this length; longer ones are not suggested."""
SHOWN_ITEMS = 8
SHOWN_CHARACTERS = 200

# Architecture, the tensor that gives it away under our names, the translation, how the configuration is read.
_ARCHITECTURES: tuple[tuple[str, str, Callable[..., dict[str, str]], Callable[..., Any] | None], ...] = (
    ("wan_vae", "decoder.middle.0.residual.0.gamma", vae.our_names, vae.VAEConfig.from_tensors),
    ("umt5", "enc.blk.0.attn_rel_b.weight", umt5.our_names, umt5.UMT5Config.from_tensors),
    ("wan_t2v", "blocks.0.modulation", wan.our_names, wan.WanConfig.from_tensors),
    ("wan_vace_modules", "vace_blocks.0.modulation", wan.our_names, None),
)


def inspect_file(path: str | Path) -> dict[str, Any]:
    """Describe a GGUF, safetensors or PyTorch weight file.

    `problem` appears if the tensors do not make up the model that they seem to belong to.

    Raises:
        FileError: the file is missing, damaged or of another kind.
    """
    source = open_weights(path)
    report: dict[str, Any] = {
        "path": str(source.path),
        "kind": source.kind,
        "size_bytes": source.path.stat().st_size,
        "architecture": "unknown",
        "n_tensors": len(source.tensors),
        "n_parameters": sum(tensor.numel for tensor in source.tensors.values()),
    }
    names = {name: name for name in source.tensors}
    config = None
    for architecture, key, our_names, from_tensors in _ARCHITECTURES:
        translated = our_names(source.tensors)
        if key in translated.values():
            report["architecture"], names = architecture, translated
            if from_tensors is not None:
                shapes = {ours: source.tensors[theirs].shape for theirs, ours in names.items()}
                try:
                    config = from_tensors(shapes, source.metadata)
                except WeightError as error:
                    report["problem"] = str(error)
            break
    if config is not None:
        if isinstance(config, wan.WanConfig) and config.vace_layers:
            report["architecture"] = "wan_vace"
        shown = (f.name for f in fields(config) if f.repr)  # without the statistics of the latents
        report["config"] = {name: _plain(getattr(config, name)) for name in shown}
    report["types"] = _histogram((tensor, "all") for tensor in source.tensors.values())["all"]
    report["groups"] = _histogram((source.tensors[theirs], _group(ours)) for theirs, ours in names.items())
    report["metadata"] = {key: _plain(value) for key, value in source.metadata.items()}
    report["memory"] = _memory(source, config)
    if isinstance(config, wan.WanConfig):
        report["precision"] = _precision(source, names)
    return report


def _precision(source: WeightSource, names: Mapping[str, str]) -> dict[str, Any]:
    """What --precision auto makes of a transformer on this machine, and what its sidecar says."""
    calibration = read_sidecar(source.path)
    device = torch.device("cpu")
    choose = chooser("auto", device, calibration["bf16"] if calibration else ())
    counts: dict[str, int] = {}
    for theirs, ours in names.items():
        tensor = source.tensors[theirs]
        if ours.endswith(".weight") and len(tensor.shape) == 2:
            way = choose(ours.removesuffix(".weight"), Packed(torch.empty(0), tensor.type_id, tensor.shape))
            name = "int8" if isinstance(way, Int8) else str(way.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + 1
    return {"auto": counts, "calibration": calibration}


def _group(name: str) -> str:
    """`blocks.7.self_attn.q.weight` to `blocks.self_attn`: the part of the network, whatever the layer."""
    parts = re.sub(r"\.\d+(?=\.)", "", name.removesuffix(".weight").removesuffix(".bias")).split(".")
    if parts[0] in ("blocks", "vace_blocks"):
        return ".".join(parts[:2])
    if parts[0] == "enc" and len(parts) > 2:
        return f"enc.{parts[2].split('_')[0]}"
    return parts[0]


def _histogram(tensors: Iterable[tuple[Stored, str]]) -> dict[str, dict[str, dict[str, int]]]:
    """Per group and stored type: number of tensors, parameters and bytes."""
    groups: dict[str, dict[str, dict[str, int]]] = {}
    for tensor, group in tensors:
        types = groups.setdefault(group, {})
        row = types.setdefault(type_name(tensor.type_id), {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += tensor.numel
        row["bytes"] += tensor.nbytes
    return groups


def _plain(value: Any) -> Any:
    """A metadata value for JSON; long arrays and texts are cut to their beginning and length."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | list | tuple):
        items = [_plain(item) for item in value[:SHOWN_ITEMS]]
        return items if len(value) <= SHOWN_ITEMS else {"first": items, "length": len(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return {"first": value[:SHOWN_CHARACTERS], "length": len(value)}
    return value


def _memory(source: WeightSource, config: Any) -> dict[str, Any]:
    """Bytes of weights against bytes of this machine; for transformers the longest clip that fits beside.

    A token table is left out: only the rows of a prompt are ever read. See `memory.estimate` for the rest.
    """
    machine = psutil.virtual_memory()
    table = {"token_embd.weight", "shared.weight", "token_embedding.weight", "encoder.embed_tokens.weight"}
    weights = sum(tensor.nbytes for name, tensor in source.tensors.items() if name not in table)
    report: dict[str, Any] = {
        "machine_bytes": machine.total,
        "available_bytes": machine.available,
        "weights_bytes": weights,
        "fits": weights + memory.RUNTIME_BYTES <= machine.available,
    }
    if isinstance(config, wan.WanConfig):
        left = machine.available - weights
        report["longest_clips"] = [
            {"width": width, "height": height, "frames": _longest(config, width, height, left)}
            for width, height in SIZES
        ]
    return report


def _longest(config: wan.WanConfig, width: int, height: int, left_bytes: int) -> int:
    """The most frames, 4n + 1 up to `TRAINED_FRAMES`, that can be made in `left_bytes`; 0 if not even one."""
    lengths = range(TRAINED_FRAMES, 0, -4)
    fitting = (n for n in lengths if memory.estimate(config, width, height, n).peak <= left_bytes)
    return next(fitting, 0)


def render(report: Mapping[str, Any]) -> str:
    """The report of `inspect_file` as text."""
    name = Path(report["path"]).name
    lines = [
        f"{name}: {report['architecture']}, {report['kind']}, {_size(report['size_bytes'])}, "
        f"{report['n_parameters'] / 1e9:.3g} B parameters in {report['n_tensors']} tensors"
    ]
    if "problem" in report:
        lines += ["", f"Problem: {report['problem']}"]
    for title in ("config", "metadata"):
        if report.get(title):
            lines += ["", title.capitalize()]
            lines += [f"  {key:<32} {_text(value)}" for key, value in report[title].items()]
    lines += ["", "Types by part"]
    for group, types in {**report["groups"], "all": report["types"]}.items():
        counts = ", ".join(f"{row['tensors']} {name}" for name, row in types.items())
        lines.append(f"  {group:<24} {_size(sum(row['bytes'] for row in types.values())):>9}  {counts}")
    if "precision" in report:
        auto = ", ".join(f"{n} {name}" for name, n in report["precision"]["auto"].items())
        lines += ["", f"Precision auto on this machine: {auto} layers"]
        calibration = report["precision"]["calibration"]
        lines += (
            render_precision(calibration) if calibration else ["  not calibrated: see mutoscope calibrate"]
        )
    need = report["memory"]
    verdict = "fits" if need["fits"] else "does not fit: it will run from disk, slowly"
    lines += [
        "",
        "Memory",
        f"  weights {_size(need['weights_bytes'])}, free {_size(need['available_bytes'])} of "
        f"{_size(need['machine_bytes'])}: {verdict}",
    ]
    for clip in need.get("longest_clips", ()):
        frames = f"up to {clip['frames']} frames" if clip["frames"] else "too large"
        lines.append(f"  {clip['width']}x{clip['height']}: {frames}")
    return "\n".join(lines)


def render_precision(calibration: Mapping[str, Any]) -> list[str]:
    """What a calibration found, as lines."""
    errors, kept = calibration["layers"], calibration["bf16"]
    if not errors:
        return ["  no layer is large enough for 8-bit integers on this machine"]
    ordered = sorted(errors, key=lambda path: errors[path], reverse=True)
    shown = ", ".join(f"{path} {errors[path]:.3f}" for path in ordered[:3])
    return [
        f"  calibrated: {len(kept)} of {len(errors)} layers stay in bfloat16; error of the velocity "
        f"{calibration['velocity_error']:.4f}, all in integers {calibration['velocity_error_int8']:.4f}",
        f"  most sensitive: {shown}",
    ]


def _size(n_bytes: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return f"{n_bytes} B"


def _text(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"first", "length"}:
        first = value["first"] if isinstance(value["first"], str) else ", ".join(map(str, value["first"]))
        return f"{first} ... ({value['length']} in all)"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
