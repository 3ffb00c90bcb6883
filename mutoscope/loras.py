"""LoRA files that can be asked for by name, and what of a request only a model's files can tell. No torch.

    shelf = Shelf(folder)                    # "style" is style.safetensors in it
    check_lora(shelf.get("style").path, manifest)
    check_cache("mag=0.1", manifest)

Everything is told by the headers of files: whether each key of a LoRA has its layer in the model, with the right
shape. So a request is refused before anything is loaded, by the very checks that the engine makes. What was found is
remembered until one of the files changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mutoscope.digests import Identity, identity
from mutoscope.engine.cache_tables import published
from mutoscope.engine.headers import file_kind, read_header
from mutoscope.engine.lora_keys import placed, sort_keys
from mutoscope.engine.wan_names import our_names
from mutoscope.errors import FileError, RequestError, WeightError
from mutoscope.manifest import ModelManifest, suggest

SUFFIXES = (".safetensors", ".gguf")
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_TITLES = ("modelspec.title", "ss_output_name", "general.name")
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_word")


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """A file of the shelf. `rank` is its largest, 0 if it has none; `problem` says why it cannot be used."""

    name: str
    path: Path
    size_bytes: int
    changed_at: float  # unix seconds
    rank: int = 0
    layers: int = 0
    title: str = ""
    trigger: str = ""
    problem: str = ""


class Shelf:
    """The LoRA files of a folder. A name is that of a file without its ending, unless two files share it. Files in
    folders of the folder, and hidden ones, are not offered. None: an empty one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def all(self) -> tuple[LoraInfo, ...]:
        """By name. A folder that is not there is an empty one."""
        if self.folder is None or not self.folder.is_dir():
            return ()
        files = [f for f in sorted(self.folder.iterdir()) if f.suffix.lower() in (*SUFFIXES, *PICKLED)]
        files = [f for f in files if f.is_file() and not f.name.startswith(".")]
        stems = [f.stem for f in files]
        return tuple(_info(f.stem if stems.count(f.stem) == 1 else f.name, f) for f in files)

    def find(self, name: str) -> LoraInfo | None:
        """By name, or by the name of the file."""
        return next((lora for lora in self.all() if name in (lora.name, lora.path.name)), None)

    def get(self, name: str, *, also: tuple[str, ...] = ()) -> LoraInfo:
        """One that can be used. `also`: further names, for the message.

        Raises:
            RequestError: there is none of this name. FileError: it cannot be used.
        """
        found = self.find(name)
        if found is None:
            known = [*also, *(lora.name for lora in self.all())]
            there = (
                f"known: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
                if known
                else "there are none"
            )
            raise RequestError(f"LoRA {name!r} is unknown; {there}.", hint=suggest(name, known))
        if found.problem:
            raise FileError(f"LoRA {name!r} cannot be used: {found.problem}")
        return found


def check_lora(path: Path, manifest: ModelManifest) -> None:
    """Whether a model can take a LoRA, by the headers of both. What only torch can open passes: the engine looks.

    Raises:
        FileError: a file is missing or damaged. WeightError: it was made for another model.
    """
    dit = tuple(identity(f.path) for f in (manifest.files.dit, *manifest.files.dit_extra))
    wrong = _fit(identity(path), dit)
    if wrong is not None:
        raise WeightError(f"{wrong[0].rstrip('.')} (model {manifest.name}).", hint=wrong[1])


def check_cache(cache: str, manifest: ModelManifest) -> None:
    """Whether the numbers are there that a step cache needs.

    Raises:
        RequestError: there are none for this model.
    """
    kind = cache.partition("=")[0]
    if kind not in ("tea", "mag") or (kind == "mag" and manifest.files.magnitudes is not None):
        return
    shapes = _shapes(tuple(identity(f.path) for f in (manifest.files.dit, *manifest.files.dit_extra)))
    if shapes is None:
        return
    dim = shapes["head.modulation"][-1] if "head.modulation" in shapes else 0
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    published(kind, dim, layers, vace=any(name.startswith("vace_blocks.") for name in shapes))


def _info(name: str, path: Path) -> LoraInfo:
    stat = path.stat()
    known = LoraInfo(name=name, path=path, size_bytes=stat.st_size, changed_at=stat.st_mtime)
    try:
        rank, layers, title, trigger = _facts(identity(path))
    except FileError as error:
        return LoraInfo(**vars(known) | {"problem": str(error).replace(f"{path.parent}/", "")})
    return LoraInfo(**vars(known) | {"rank": rank, "layers": layers, "title": title, "trigger": trigger})


@lru_cache(maxsize=1024)
def _facts(lora: Identity) -> tuple[int, int, str, str]:
    """Rank, number of layers, title and trigger words."""
    header = read_header(lora[0])
    targets = sort_keys(lora[0].name, header.tensors.values())
    ranks = [parts["down"].shape[0] for parts in targets.values() if "down" in parts and parts["down"].shape]
    said = {key: str(value) for key, value in header.metadata.items() if key in (*_TITLES, *_TRIGGERS)}
    title = next((said[key] for key in _TITLES if said.get(key)), "")
    return max(ranks, default=0), len(targets), title, next((said[k] for k in _TRIGGERS if said.get(k)), "")


@lru_cache(maxsize=4096)
def _fit(lora: Identity, dit: tuple[Identity, ...]) -> tuple[str, str] | None:
    """What is wrong, with what to do."""
    shapes = _shapes(dit)
    if shapes is None or not file_kind(lora[0]):
        return None
    try:
        placed(lora[0].name, sort_keys(lora[0].name, read_header(lora[0]).tensors.values()), shapes)
    except WeightError as error:
        return error.message, error.hint
    return None


@lru_cache(maxsize=64)
def _shapes(dit: tuple[Identity, ...]) -> Mapping[str, tuple[int, ...]] | None:
    """Of a transformer's parameters, as the loaded model has them; None if only torch can open a file."""
    if not all(file_kind(of[0]) for of in dit):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for of in dit:
        tensors = read_header(of[0]).tensors
        shapes |= {ours: tensors[theirs].shape for theirs, ours in our_names(tensors).items()}
    for name in ("patch_embedding.weight", "vace_patch_embedding.weight"):  # some files fold them
        if name in shapes and "head.modulation" in shapes:
            dim = shapes["head.modulation"][-1]
            shapes[name] = (dim, math.prod(shapes[name]) // dim // 4, 1, 2, 2)
    return shapes
