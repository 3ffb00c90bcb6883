"""The models that can be asked for: the starter and what is installed, with what the router has to know of each."""

from __future__ import annotations

import threading
import time
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutoscope.catalog import POCKET, default_loras_dir, default_models_dir, find_model, installed_models
from mutoscope.errors import FileError
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.spec import JobSpec
from mutoscope.loras import LoraInfo, Shelf, check_lora
from mutoscope.manifest import TASKS, ModelManifest, suggest

AUTO = "auto"
FRESH_S = 2.0
"""A model that was pulled is seen after this time at the latest."""
WITHOUT_MODEL = ("upscale", "reframe_rate", "hdr")
"""Operations that work on finished files; any worker can do them."""


@dataclass(frozen=True)
class Model:
    """One model set, and the LoRAs that can be named beside its own."""

    manifest: ModelManifest
    shelf: Shelf = field(default_factory=Shelf, compare=False)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it follows; see `manifest.TASKS`."""
        told = self.manifest.service.tasks
        return told or (("text",) if "t2v" in self.name.lower() else TASKS)

    @property
    def quality(self) -> float:
        return self.manifest.service.quality

    @property
    def most_frames(self) -> int:
        """The longest video that it was made for."""
        return max(self.manifest.defaults.frames, self.manifest.limits.max_frames)


@dataclass(frozen=True, kw_only=True)
class OfferedLora:
    """A LoRA that can be asked for: of the shelf, or a model's own (`settings`: what it changes of the defaults)."""

    info: LoraInfo
    models: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0


def tasks_of(spec: JobSpec) -> tuple[str, ...]:
    """What a model has to follow for this spec."""
    if spec.operation in WITHOUT_MODEL:
        return ()
    needed = {
        "text": bool(spec.prompt),
        "keyframes": bool(spec.keyframes),
        "references": bool(spec.references),
        "control": spec.control is not None
        or (spec.source is not None and not (spec.mask or spec.boxes or spec.outpaint or spec.reframe)),
        "repaint": spec.mask is not None or bool(spec.boxes),
        "outpaint": spec.outpaint is not None or bool(spec.reframe),
        "extend": spec.extend_start is not None or spec.extend_end is not None,
        "tracks": bool(spec.tracks),
    }
    return tuple(task for task, is_needed in needed.items() if is_needed)


class Registry:
    """Reads the models folder when asked, at most every FRESH_S. `aliases`: on top of the shipped table."""

    def __init__(
        self,
        models_dir: Path | None = None,
        aliases: Mapping[str, str] | None = None,
        loras_dir: Path | None = None,
    ) -> None:
        self.models_dir = models_dir or default_models_dir()
        self.shelf = Shelf(loras_dir or default_loras_dir())
        self._shipped: dict[str, str] = tomllib.loads(
            (Path(__file__).parent / "aliases.toml").read_text("utf-8")
        )
        self._own = dict(aliases or {})
        self._lock = threading.Lock()
        self._read_at = -FRESH_S
        self._models: tuple[Model, ...] = ()

    @property
    def aliases(self) -> dict[str, str]:
        """Names and what they stand for: the shipped table, then what models say of themselves, then the settings."""
        told = {alias: model.name for model in self.models() for alias in model.manifest.service.aliases}
        return {**self._shipped, **told, **self._own}

    def models(self) -> tuple[Model, ...]:
        """The starter first, then what is installed and whole, by name."""
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_S:
                self._models = self._read()
                self._read_at = time.monotonic()
            return self._models

    def get(self, name: str) -> Model:
        """A model by its own name.

        Raises:
            InvalidRequest: there is none.
        """
        for model in self.models():
            if model.name == name:
                return model
        raise self._unknown(name)

    def loras(self) -> tuple[OfferedLora, ...]:
        """What can be named: the shelf, then what belongs to models. What cannot be used fits no model and says why."""
        models, found = self.models(), []
        for info in self.shelf.all():
            fits = () if info.problem else tuple(m.name for m in models if _fits(info.path, m))
            found.append(OfferedLora(info=info, models=fits))
        for model in models:
            for name, own in model.manifest.loras.items():
                stat = own.file.path.stat()
                info = LoraInfo(
                    name=name, path=own.file.path, size_bytes=stat.st_size, changed_at=stat.st_mtime
                )
                found.append(
                    OfferedLora(info=info, models=(model.name,), settings=own.settings, strength=own.strength)
                )
        return tuple(found)

    def target(self, name: str) -> str:
        """What a name stands for: the name of a model, or "auto". A name without its quant takes the first installed.

        Raises:
            InvalidRequest: neither a model, nor an alias, nor "auto".
        """
        if name == AUTO or any(model.name == name for model in self.models()):
            return name
        meant = self.aliases.get(name)
        if meant is None:
            family = [model.name for model in self.models() if model.name.partition(":")[0] == name]
            if not family:
                raise self._unknown(name)
            return family[0]
        if meant == AUTO or any(model.name == meant for model in self.models()):
            return meant
        raise InvalidRequest(
            f"Model {name!r} stands for {meant!r} here, which is not installed.", field="model",
            hint=f"Run: mutoscope pull {meant}",
        )  # fmt: skip

    def _unknown(self, name: str) -> InvalidRequest:
        own = [model.name for model in self.models()]
        near = suggest(name, [*own, *self.aliases])
        hint = near or f"Installed: {', '.join(own)}. `mutoscope pull` installs more."
        return InvalidRequest(f"No model {name!r}.", field="model", hint=hint)

    def _read(self) -> tuple[Model, ...]:
        found = []
        with suppress(FileError):  # a wheel without the starter's weights
            found.append(Model(find_model(POCKET, self.models_dir), self.shelf))
        for installed in installed_models(self.models_dir):
            if installed.manifest is not None and not installed.problem:
                found.append(Model(installed.manifest, self.shelf))
        return tuple(found)


def _fits(path: Path, model: Model) -> bool:
    try:
        check_lora(path, model.manifest)
    except FileError:
        return False
    return True
