"""The `model.toml`: which files make up a model, and its defaults. Written by `pull`, or by hand.

    name = "my-model"
    sizes = [[832, 480], [480, 832]]

    [files]                      # relative to this file
    dit = "dit.gguf"
    text_encoder = { path = "../files/umt5.gguf", sha256 = "...", size_bytes = 4145878880 }
    vae = "/elsewhere/vae.safetensors"

    [defaults]
    steps = 50
    ...

Strict: an unknown key, a wrong type, or a relative path that leaves the folder is an error that names the
place. docs/models.md describes every key for users.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from mutoscope.errors import FileError

MANIFEST = "model.toml"
SHARED_FILES = "files"
"""Folder beside the installed sets that holds what several of them use."""

Role = Literal["dit", "text_encoder", "vae"]
ROLES: tuple[Role, ...] = ("dit", "text_encoder", "vae")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that does not say otherwise."""

    steps: int
    guidance: float
    shift: float
    sampler: str
    width: int
    height: int
    frames: int
    fps: float
    negative_prompt: str = ""
    guidance_kept: float | None = None  # where the picture is given: None for `guidance` there too


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model was made for; 0 means: no limit known."""

    max_frames: int = 0
    max_pixels: int = 0
    size_multiple: int = 16


TASKS = ("text", "keyframes", "references", "control", "repaint", "outpaint", "extend", "tracks")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What the service's router knows about the model.

    tasks: what it follows; empty: all, or only text for models named t2v. quality: 0 to 1, against other models.
    price_factor: on the price list. max_queue: waiting jobs from which it counts as full; 0: never. max_seconds:
    longest video; 0: what its frames allow. aliases: other names that it answers to.
    """

    tasks: tuple[str, ...] = ()
    quality: float = 0.5
    price_factor: float = 1.0
    max_queue: int = 0
    max_seconds: float = 0.0
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A file of an installed set. What a pull knew about it is kept."""

    path: Path
    sha256: str = ""
    size_bytes: int = 0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """dit_extra: further DiT files whose tensors are added (VACE modules on top of a base model);
    vocabulary: JSON list of the words that the model knows, for prompt advice; magnitudes: JSON of what MagCache has to
    know (see engine/cache.py)."""

    dit: ModelFile
    text_encoder: ModelFile
    vae: ModelFile
    dit_extra: tuple[ModelFile, ...] = ()
    vocabulary: ModelFile | None = None
    magnitudes: ModelFile | None = None

    def all(self) -> tuple[ModelFile, ...]:
        optional = (file for file in (self.vocabulary, self.magnitudes) if file is not None)
        return (self.dit, self.text_encoder, self.vae, *self.dit_extra, *optional)


@dataclass(frozen=True, kw_only=True)
class NamedLora:
    """A LoRA that belongs to the model, under a name; its sampling counts where a request says nothing."""

    file: ModelFile
    strength: float = 1.0
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What it changes of the model's `Defaults`."""
        wanted = {name: getattr(self, name) for name in _LORA_SETTINGS}
        return {name: value for name, value in wanted.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ModelManifest:
    """A `model.toml`, read and checked."""

    name: str
    files: ModelFiles
    defaults: Defaults
    title: str = ""
    licence: str = ""
    notes: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    limits: Limits = field(default_factory=Limits)
    service: Serving = field(default_factory=Serving)
    loras: Mapping[str, NamedLora] = field(default_factory=dict)

    def check_files(self) -> None:
        """Raise if a file is missing or has another size than when it was installed."""
        for file in (*self.files.all(), *(lora.file for lora in self.loras.values())):
            if not file.path.is_file():
                raise FileError(f"model {self.name}: {file.path} is missing.", hint=_PULL_AGAIN)
            size = file.path.stat().st_size
            if file.size_bytes and size != file.size_bytes:
                raise FileError(
                    f"model {self.name}: {file.path} has {size} bytes, {file.size_bytes} expected.",
                    hint=_PULL_AGAIN,
                )


_PULL_AGAIN = "Pull the model again, or correct its model.toml."


def suggest(word: str, known: Iterable[str]) -> str:
    """A question with the nearest names, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else ""


_TEXT_KEYS = ("name", "title", "licence", "notes")
_TOP_KEYS = (*_TEXT_KEYS, "files", "defaults", "sizes", "limits", "service", "loras")
_OPTIONAL_FILES = ("vocabulary", "magnitudes")
_FILE_KEYS = ("path", "sha256", "size_bytes", "source")
_LORA_SETTINGS: dict[str, type] = {"steps": int, "guidance": float, "shift": float, "sampler": str}


def read_manifest(path: str | Path) -> ModelManifest:
    """Read and check a model.toml; whether its files are there, `check_files` says."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file.", hint="A model is a folder with a model.toml.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise FileError(f"{path}: is not a readable TOML file ({e}).") from e

    _only(table, _TOP_KEYS, str(path))
    texts = {key: _typed(table, key, str, str(path), "") for key in _TEXT_KEYS}
    if not texts["name"]:
        raise FileError(f"{path}: has no name.", hint='Add a line like: name = "my-model"')
    return ModelManifest(
        **texts,
        files=_files(_section(table, "files", path), path),
        defaults=_defaults(_section(table, "defaults", path), path),
        limits=_record(Limits, table.get("limits", {}), f"{path} [limits]"),
        service=_serving(table.get("service", {}), f"{path} [service]"),
        sizes=_sizes(table.get("sizes", []), path),
        loras=_loras(table.get("loras", {}), path),
    )


def write_manifest(manifest: ModelManifest, path: str | Path) -> None:
    """Write a model.toml at once: whoever reads it sees the old one or the whole new one."""
    path = Path(path)

    def place(file: Path) -> str:
        relative = os.path.relpath(file, path.parent)
        return PurePosixPath(Path(relative)).as_posix() if _stays(relative) else str(file.absolute())

    def described(file: ModelFile) -> str:
        facts = {"path": place(file.path), "sha256": file.sha256, "size_bytes": file.size_bytes}
        facts["source"] = file.source
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in facts.items() if v) + " }"

    lines = [f"{key} = {_toml(getattr(manifest, key))}" for key in _TEXT_KEYS if getattr(manifest, key)]
    if manifest.sizes:
        lines.append(f"sizes = {_toml([list(s) for s in manifest.sizes])}")
    lines += ["", "[files]"]
    lines += [f"{role} = {described(getattr(manifest.files, role))}" for role in ROLES]
    if manifest.files.dit_extra:
        lines.append(f"dit_extra = [{', '.join(described(f) for f in manifest.files.dit_extra)}]")
    for name in _OPTIONAL_FILES:
        if getattr(manifest.files, name):
            lines.append(f"{name} = {described(getattr(manifest.files, name))}")
    for section in ("defaults", "limits"):
        lines += ["", f"[{section}]"]
        lines += [
            f"{k} = {_toml(v)}" for k, v in vars(getattr(manifest, section)).items() if v not in ("", 0, None)
        ]
    told = {k: v for k, v in vars(manifest.service).items() if v != getattr(Serving(), k)}
    if told:
        lines += ["", "[service]"]
        lines += [f"{k} = {_toml(list(v) if isinstance(v, tuple) else v)}" for k, v in told.items()]
    for name, lora in manifest.loras.items():
        strength = {"strength": lora.strength} if lora.strength != 1.0 else {}
        lines += ["", f"[loras.{_toml(name)}]", f"file = {described(lora.file)}"]
        lines += [f"{k} = {_toml(v)}" for k, v in {**strength, **lora.settings}.items()]
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, path)


def _files(table: Mapping[str, Any], path: Path) -> ModelFiles:
    where = f"{path} [files]"
    _only(table, (*ROLES, "dit_extra", *_OPTIONAL_FILES), where)
    missing = [role for role in ROLES if role not in table]
    if missing:
        raise FileError(
            f"{where}: {', '.join(missing)} missing.", hint="A model needs dit, text_encoder and vae."
        )
    extra = table.get("dit_extra", [])
    if not isinstance(extra, list):
        raise FileError(f"{where}: dit_extra is {_kind(extra)}, a list of files expected.")
    return ModelFiles(
        dit=_file(table["dit"], path, f"{where} dit"),
        text_encoder=_file(table["text_encoder"], path, f"{where} text_encoder"),
        vae=_file(table["vae"], path, f"{where} vae"),
        dit_extra=tuple(_file(e, path, f"{where} dit_extra {i}") for i, e in enumerate(extra)),
        **{k: _file(table[k], path, f"{where} {k}") for k in _OPTIONAL_FILES if k in table},
    )


def _loras(table: Any, path: Path) -> dict[str, NamedLora]:
    if not isinstance(table, dict):
        raise FileError(f"{path} [loras]: is {_kind(table)}, a table of tables expected.")
    found = {}
    for name, entry in table.items():
        where = f"{path} [loras.{name}]"
        entry = entry if isinstance(entry, dict) else {"file": entry}
        _only(entry, ("file", "strength", *_LORA_SETTINGS), where)
        if "file" not in entry:
            raise FileError(f"{where}: has no file.", hint='Add a line like: file = "lora.safetensors"')
        settings = {
            k: _typed(entry, k, kind, where, None) for k, kind in _LORA_SETTINGS.items() if k in entry
        }
        if any(settings.get(key, 1) <= 0 for key in ("steps", "guidance", "shift")):
            raise FileError(f"{where}: steps, guidance and shift are more than 0.")
        strength = _typed(entry, "strength", float, where, 1.0)
        found[name] = NamedLora(
            file=_file(entry["file"], path, f"{where} file"), strength=strength, **settings
        )
    return found


def _file(value: Any, toml: Path, where: str) -> ModelFile:
    """A file is its path, or a table with the path and what is known about it."""
    table = {"path": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise FileError(f"{where}: is {_kind(value)}, a path or a table with a path expected.")
    _only(table, _FILE_KEYS, where)
    written = _typed(table, "path", str, where, "")
    if not written:
        raise FileError(f"{where}: has no path.")
    sha256 = _typed(table, "sha256", str, where, "")
    if sha256 and (len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef")):
        raise FileError(f"{where}: sha256 is {sha256!r}, 64 hexadecimal digits expected.")
    if not os.path.isabs(written) and not _stays(written):
        raise FileError(
            f"{where}: {written} leaves the model's folder.",
            hint=f"Only ../{SHARED_FILES}/ may be named relatively; write other places as absolute paths.",
        )
    return ModelFile(
        path=Path(os.path.normpath(toml.parent.absolute() / written)),
        sha256=sha256,
        size_bytes=_typed(table, "size_bytes", int, where, 0),
        source=_typed(table, "source", str, where, ""),
    )


def _stays(relative: str) -> bool:
    parts = Path(os.path.normpath(relative.replace("\\", "/"))).parts
    return ".." not in parts or (parts[:2] == ("..", SHARED_FILES) and ".." not in parts[1:])


def _defaults(table: Mapping[str, Any], path: Path) -> Defaults:
    where = f"{path} [defaults]"
    defaults = _record(Defaults, table, where)
    for key in ("steps", "guidance", "guidance_kept", "shift", "width", "height", "frames", "fps"):
        value = getattr(defaults, key)
        if value is not None and value <= 0:
            raise FileError(f"{where}: {key} is {value}, more than 0 expected.")
    if defaults.frames % 4 != 1:
        raise FileError(f"{where}: frames is {defaults.frames}, 4n+1 expected.", hint="For example 17 or 81.")
    return defaults


def _serving(table: Any, where: str) -> Serving:
    if not isinstance(table, dict):
        raise FileError(f"{where}: is {_kind(table)}, a table expected.")
    tasks = table.get("tasks", [])
    if not isinstance(tasks, list) or not all(task in TASKS for task in tasks):
        raise FileError(f"{where}: tasks is {tasks!r}, a list of some of {', '.join(TASKS)} expected.")
    _only(table, [f.name for f in fields(Serving)], where)
    names = table.get("aliases", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise FileError(f"{where}: aliases is {names!r}, a list of names expected.")
    numbers = {"quality": float, "price_factor": float, "max_queue": int, "max_seconds": float}
    values = {key: _typed(table, key, numbers[key], where, None) for key in table if key in numbers}
    made = Serving(tasks=tuple(tasks), aliases=tuple(names), **values)
    if not (0 <= made.quality <= 1 and min(made.price_factor, made.max_queue, made.max_seconds) >= 0):
        raise FileError(f"{where}: quality is 0 to 1; price_factor, max_queue and max_seconds are 0 or more.")
    return made


def _sizes(value: Any, path: Path) -> tuple[tuple[int, int], ...]:
    def is_size(pair: Any) -> bool:
        return (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair)
        )

    if not isinstance(value, list) or not all(is_size(pair) for pair in value):
        raise FileError(f"{path}: sizes is {value!r}, a list like [[832, 480], [480, 832]] expected.")
    return tuple((width, height) for width, height in value)


_T = TypeVar("_T")


def _record(kind: type[_T], table: Any, where: str) -> _T:
    """A flat dataclass from a TOML table: its fields are the only keys."""
    if not isinstance(table, dict):
        raise FileError(f"{where}: is {_kind(table)}, a table expected.")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    _only(table, known, where)
    types = {"int": int, "float": float, "str": str}
    values = {
        key: _typed(table, key, types[str(known[key].type).removesuffix(" | None")], where, None)
        for key in table
    }
    missing = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.name not in table]
    if missing:
        raise FileError(f"{where}: {', '.join(missing)} missing.")
    return kind(**values)


def _section(table: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    section = table.get(key)
    if not isinstance(section, dict):
        raise FileError(f"{path}: has no [{key}] section.", hint="See docs/models.md for an example.")
    return section


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str, default: Any) -> Any:
    value = table.get(key, default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FileError(f"{where}: {key} is {_kind(value)}, {_KINDS[kind]} expected.")
    return value


_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def _kind(value: Any) -> str:
    return f"{_KINDS.get(type(value), type(value).__name__)} ({value!r})"


def _only(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            hint = suggest(key, known) or f"Known: {', '.join(known)}."
            raise FileError(f"{where}: unknown key {key!r}.", hint=hint)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for this one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
