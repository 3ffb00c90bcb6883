"""LoRAs and doing less: what a request asks of it, on a model. Headers of files are read, nothing else.

LoRAs are named, never placed: a name is the model's own (its model.toml) or that of a file on the shelf, which is the
folder that the operator allows. Prices do not depend on any of this; the time that a run takes does, so what has an
influence is in `Resolved.passes` and `Resolved.switches`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mutoscope.errors import FileError, RequestError, WeightError
from mutoscope.jobs.errors import InvalidRequest, Unsupported
from mutoscope.jobs.registry import Model
from mutoscope.jobs.spec import JobSpec
from mutoscope.loras import check_cache, check_lora
from mutoscope.request import GenerationRequest, Lora

LISTED = "GET /api/v1/loras lists them, and the models that take them."


def taken(spec: JobSpec, model: Model) -> tuple[Lora, ...]:
    """The LoRAs of a request as the engine wants them: names of the model's own, or files.

    Raises:
        InvalidRequest: a name that is unknown or given twice, or a file that cannot be used.
        Unsupported: the model cannot take a LoRA, or there are no numbers for a cache.
    """
    own = model.manifest.loras
    found: list[Lora] = []
    for i, lora in enumerate(spec.loras):
        field = f"loras[{i}].name"
        if lora.name in (before.name for before in spec.loras[:i]):
            raise InvalidRequest(f"{field}: {lora.name!r} is there already.", field=field,
                                 hint="Give it once, with the strength that it shall have.")  # fmt: skip
        try:
            path = _path(lora.name, model)
        except (RequestError, FileError) as e:
            raise InvalidRequest(
                f"{field}: {e.message}", field=field, hint=f"{e.hint} {LISTED}".strip()
            ) from e
        try:
            check_lora(path, model.manifest)
        except WeightError as e:
            raise Unsupported(f"{field}: {e.message}", field=field, hint=f"{e.hint} {LISTED}".strip()) from e
        except FileError as e:
            raise _unreadable(model) from e
        found.append((lora.name if lora.name in own else path, lora.strength))
    try:
        check_cache(spec.cache, model.manifest)
    except RequestError as e:
        raise Unsupported(f"cache = {spec.cache!r}: {e.message}", field="cache", hint=e.hint) from e
    except FileError as e:
        raise _unreadable(model) from e
    return tuple(found)


def _path(name: str, model: Model) -> Path:
    own = model.manifest.loras
    return own[name].file.path if name in own else model.shelf.get(name, also=tuple(own)).path


def _unreadable(model: Model) -> InvalidRequest:
    """Without the place of the file, which is nobody's business."""
    return InvalidRequest(f"A file of model {model.name} is missing or cannot be read.", field="model",
                          hint="Whoever runs the server has to pull the model again.")  # fmt: skip


def names(spec: JobSpec, loras: tuple[Lora, ...]) -> dict[str, str]:
    """Files of the shelf, by the names that they were asked for: for whatever leaves this machine."""
    pairs = zip(spec.loras, loras, strict=True)
    return {str(file): lora.name for lora, (file, _) in pairs if isinstance(file, Path)}


def named(value: Any, known: dict[str, str]) -> Any:
    """A description of a request, with names in the place of files."""
    if isinstance(value, dict):
        return {known.get(k, k): named(v, known) for k, v in value.items()}
    if isinstance(value, list):
        return [named(v, known) for v in value]
    return known.get(value, value) if isinstance(value, str) else value


def passes(request: GenerationRequest) -> float:
    """Passes through the model for each step of a planned request, on the average: 2 with guidance, less with less."""
    steps, (start, stop) = request.steps or 1, request.guidance_interval
    if request.guidance == 1.0:
        return 1
    kind, _, number = request.guidance_kind.partition("=")
    left_out = int(number) if kind == "zero-star" else 0
    guided = [i for i in range(steps) if start <= i / steps < stop]
    total = steps + len(guided) - 2 * sum(i < left_out for i in guided)
    return total // steps if total % steps == 0 else round(total / steps, 4)


def label(request: GenerationRequest) -> str:
    """What else has an influence on the time of a step; empty if nothing has."""
    loras = any(strength for _, strength in request.loras)
    parts = [request.cache] if request.cache != "none" else []
    return "+".join([*parts, "lora"] if loras else parts)
