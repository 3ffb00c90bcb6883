"""Which models exist, and which are installed.

A *model set* is what one pipeline needs: a DiT, a text encoder and a VAE. Known sets (the tables below) can
be pulled from the Hugging Face hub; an installed set is a folder with a `model.toml` (see manifest.py):

    <models dir>/wan2.1-vace-14b-q4_k_m/model.toml
    <models dir>/files/3c5e7ff7718e-Wan2.1_14B_VACE-Q4_K_M.gguf      shared between sets, see hub.py

The starter "pocket" is such a folder too, inside the package. docs/models.md describes the format for users.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import platformdirs

from mutoscope.errors import FileError, RequestError
from mutoscope.manifest import (
    MANIFEST,
    Defaults,
    Limits,
    ModelManifest,
    Role,
    read_manifest,
    suggest,
)

OFFICIAL_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of Wan-Video/Wan2.1 wan/configs/shared_config.py (commit 9737cba), left as it is: it is
part of how the models are used by their makers."""

POCKET = "pocket"
"""The starter model, inside the package."""


# -- known sets ----------------------------------------------------------------------------------------------

Evidence = Literal["listed", "used", "assumed"]
"""How a file name is known: listed = on the hub's own page, used = in public programs that download it,
assumed = by the repository's naming pattern. docs/models.md says it to users."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the hub. `sha256` is set only where the hub's own page was seen to say it."""

    repo: str
    path: str
    size_bytes: int
    evidence: Evidence = "listed"
    sha256: str | None = None
    revision: str = "main"

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a DiT that its memory depends on."""

    dim: int
    ffn: int
    vace: bool


@dataclass(frozen=True, kw_only=True)
class ModelSet:
    """One thing that can be pulled: `name` is family:quant."""

    name: str
    title: str
    licence: str
    files: Mapping[Role, RemoteFile]
    defaults: Defaults
    sizes: tuple[tuple[int, int], ...]
    limits: Limits
    shape: Shape
    notes: str = ""

    @property
    def download_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files.values())

    def memory_bytes(self, width: int = 0, height: int = 0, frames: int = 0) -> int:
        """Estimated peak for a clip (default: the model's own size), whichever stage needs most.

        Stages run one after another: text encoder; DiT with its activations; VAE, one latent frame at a time.
        Calculated from shapes, not measured; quantised weights stay packed.
        """
        width, height = width or self.defaults.width, height or self.defaults.height
        frames = frames or self.defaults.frames
        tokens = (1 + (frames - 1) // 4) * (width // 16) * (height // 16)
        # per token: residual (and VACE) stream in 4 bytes; q, k, v, attention output, branch and FFN in 2
        streams = 2 if self.shape.vace else 1
        per_token = self.shape.dim * (4 * streams + 2 * 5) + 2 * self.shape.ffn
        decode = 4 * width * height * 96 * 4 * 4  # 4 frames of 96 channels in 4 bytes, 4 buffers alive
        return max(
            self.files["text_encoder"].size_bytes,
            self.files["dit"].size_bytes + tokens * per_token,
            self.files["vae"].size_bytes + decode,
        )


@dataclass(frozen=True, kw_only=True)
class _Family:
    name: str
    title: str
    dits: Mapping[str, RemoteFile]  # by quant
    default_quant: str
    defaults: Defaults
    sizes: tuple[tuple[int, int], ...]
    limits: Limits
    shape: Shape
    notes: str = ""


def _gguf(
    repo: str, pattern: str, sizes_gb: Mapping[str, float], **evidence: Iterable[str]
) -> dict[str, RemoteFile]:
    """{quant: file} for one repository; `{}` in the pattern is the quant as spelled in `sizes_gb`."""
    level = {q: name for name in ("listed", "used", "assumed") for q in evidence.get(name, ())}
    return {
        quant.lower(): RemoteFile(
            repo=repo,
            path=pattern.format(quant),
            size_bytes=round(gb * 1e9),
            evidence=level[quant],  # type: ignore[arg-type]  # a KeyError here is a hole in the table
        )
        for quant, gb in sizes_gb.items()
    }


_COMFY = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
_VAE = RemoteFile(repo=_COMFY, path="split_files/vae/wan_2.1_vae.safetensors", size_bytes=253_815_318)
_UMT5 = "city96/umt5-xxl-encoder-gguf"
_UMT5_Q5 = RemoteFile(repo=_UMT5, path="umt5-xxl-encoder-Q5_K_M.gguf", size_bytes=4_145_878_880)
_UMT5_Q8 = RemoteFile(repo=_UMT5, path="umt5-xxl-encoder-Q8_0.gguf", size_bytes=6_040_000_000)
"""Its author recommends Q5_K_M or larger. Two variants only, so that sets share the download."""

_480P = ((832, 480), (480, 832))
_720P = ((1280, 720), (720, 1280))
_VACE_DEFAULTS = Defaults(
    steps=50,
    guidance=5.0,
    shift=16.0,
    sampler="unipc",
    width=832,
    height=480,
    frames=81,
    fps=16.0,
    negative_prompt=OFFICIAL_NEGATIVE_PROMPT,
)
_LIMITS_480P = Limits(max_frames=81, max_pixels=832 * 480)
_LIMITS_720P = Limits(max_frames=81, max_pixels=1280 * 720)

_FAMILIES = (
    _Family(
        name="wan2.1-vace-14b",
        title="Wan2.1 VACE 14B: text, image, video, mask, reference and layout to video",
        dits={
            **_gguf(
                "QuantStack/Wan2.1_14B_VACE-GGUF",
                "Wan2.1_14B_VACE-{}.gguf",
                {
                    "Q3_K_S": 7.84,
                    "Q3_K_M": 8.64,
                    "Q4_0": 10.33,
                    "Q4_K_S": 10.55,
                    "Q4_K_M": 11.64,
                    "Q5_K_S": 12.25,
                    "Q5_K_M": 13.04,
                    "Q6_K": 14.52,
                },
                used=("Q3_K_S", "Q4_0", "Q4_K_M", "Q5_K_S", "Q5_K_M"),
                assumed=("Q3_K_M", "Q4_K_S", "Q6_K"),
            ),
            "q8_0": RemoteFile(
                repo="QuantStack/Wan2.1_14B_VACE-GGUF",
                path="Wan2.1_14B_VACE-Q8_0.gguf",
                size_bytes=18_700_000_000,
                sha256="3c5e7ff7718e65df4940a0dbf4dcd986e0f63f6e46ee2b397a7173f3461fb0f8",
            ),
        },
        default_quant="q4_k_m",
        defaults=_VACE_DEFAULTS,
        sizes=_480P + _720P,
        limits=_LIMITS_720P,
        shape=Shape(dim=5120, ffn=13824, vace=True),
    ),
    _Family(
        name="wan2.1-vace-1.3b",
        title="Wan2.1 VACE 1.3B: all VACE tasks in little memory",
        dits={
            **_gguf(
                "calcuis/wan-1.3b-gguf",
                "wan2.1-vace-1.3b-{}.gguf",
                {"q4_0": 1.30, "q8_0": 2.32},
                used=("q4_0", "q8_0"),
            ),
            "f16": RemoteFile(
                repo=_COMFY,
                path="split_files/diffusion_models/wan2.1_vace_1.3B_fp16.safetensors",
                size_bytes=4_310_000_000,
            ),
        },
        default_quant="q8_0",
        defaults=_VACE_DEFAULTS,
        sizes=_480P,
        limits=_LIMITS_480P,
        shape=Shape(dim=1536, ffn=8960, vace=True),
        notes="samuelchristlie/Wan2.1-VACE-1.3B-GGUF is not used: users report that its files lack "
        "vace_patch_embedding.weight.",
    ),
    _Family(
        name="wan2.1-t2v-14b",
        title="Wan2.1 T2V 14B: text to video",
        dits=_gguf(
            "city96/Wan2.1-T2V-14B-gguf",
            "wan2.1-t2v-14b-{}.gguf",
            {
                "Q3_K_S": 6.99,
                "Q3_K_M": 7.65,
                "Q4_0": 9.03,
                "Q4_1": 9.73,
                "Q4_K_S": 9.22,
                "Q4_K_M": 10.1,
                "Q5_0": 10.8,
                "Q5_1": 11.5,
                "Q5_K_S": 10.6,
                "Q5_K_M": 11.3,
                "Q6_K": 12.5,
                "Q8_0": 15.9,
                "F16": 29.1,
                "BF16": 29.1,
            },
            listed=("Q3_K_S", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "F16", "BF16"),
            used=("Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
        ),
        default_quant="q4_k_m",
        defaults=Defaults(**{**vars(_VACE_DEFAULTS), "shift": 5.0}),
        sizes=_480P + _720P,
        limits=_LIMITS_720P,
        shape=Shape(dim=5120, ffn=13824, vace=False),
        notes="Text only: no images, masks or references. Shift 3 is advised by some for 832x480.",
    ),
    _Family(
        name="wan2.1-t2v-1.3b",
        title="Wan2.1 T2V 1.3B: text to video in little memory",
        dits={
            **_gguf(
                "samuelchristlie/Wan2.1-T2V-1.3B-GGUF",
                "Wan2.1-T2V-1.3B-{}.gguf",
                {"Q4_K_S": 0.89, "Q4_K_M": 0.982716640, "Q5_K_M": 1.087410400, "Q8_0": 1.535768800},
                used=("Q4_K_S", "Q4_K_M", "Q5_K_M", "Q8_0"),
            ),
            "f16": RemoteFile(
                repo=_COMFY,
                path="split_files/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
                size_bytes=2_840_000_000,
                sha256="be531024cd9018cb5b48c40cfbb6a6191645b1c792eb8bf4f8c1c6e10f924dc5",
            ),
        },
        default_quant="q8_0",
        defaults=Defaults(**{**vars(_VACE_DEFAULTS), "guidance": 6.0, "shift": 8.0}),
        sizes=_480P,
        limits=_LIMITS_480P,
        shape=Shape(dim=1536, ffn=8960, vace=False),
        notes="Text only: no images, masks or references.",
    ),
)


def _model_set(family: _Family, quant: str) -> ModelSet:
    return ModelSet(
        name=f"{family.name}:{quant}",
        title=f"{family.title} ({quant})",
        licence="Apache-2.0",
        files={
            "dit": family.dits[quant],
            "text_encoder": _UMT5_Q8 if quant in ("q8_0", "f16", "bf16") else _UMT5_Q5,
            "vae": _VAE,
        },
        defaults=family.defaults,
        sizes=family.sizes,
        limits=family.limits,
        shape=family.shape,
        notes=family.notes,
    )


def known_models() -> list[ModelSet]:
    """Every set that can be pulled."""
    return [_model_set(family, quant) for family in _FAMILIES for quant in family.dits]


def parse_name(name: str) -> tuple[str, str]:
    """("wan2.1-vace-14b", "q4_k_m") from "wan2.1-vace-14b:Q4_K_M"; without a quant, the family's default."""
    family_name, _, quant = name.strip().lower().partition(":")
    families = {family.name: family for family in _FAMILIES}
    family = families.get(family_name)
    if family is None:
        raise RequestError(
            f"unknown model {name!r}.",
            hint=suggest(family_name, families) or f"Known: {', '.join(families)}.",
        )
    if not quant:
        return family.name, family.default_quant
    if quant not in family.dits:
        hint = suggest(quant, family.dits)
        raise RequestError(
            f"model {family.name} has no {quant!r}.", hint=f"{hint} Known: {', '.join(family.dits)}.".strip()
        )
    return family.name, quant


def known_model(name: str) -> ModelSet:
    """The set of that name, which may leave the quant out."""
    family_name, quant = parse_name(name)
    return _model_set(next(f for f in _FAMILIES if f.name == family_name), quant)


# -- installed sets ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A folder with a model.toml; one that cannot be used is listed with its problem."""

    name: str
    folder: Path
    manifest: ModelManifest | None
    problem: str = ""


def default_models_dir() -> Path:
    """$MUTOSCOPE_HOME/models, else the platform's user data folder. Nothing is created."""
    return _home() / "models"


def default_loras_dir() -> Path:
    """The folder `loras` beside that of the models. Nothing is created."""
    return _home() / "loras"


def _home() -> Path:
    home = os.environ.get("MUTOSCOPE_HOME") or platformdirs.user_data_dir("mutoscope", appauthor=False)
    return Path(home).expanduser()


def default_cache_dir() -> Path | None:
    """$MUTOSCOPE_CACHE, else the platform's user cache folder; None if that is "off". Nothing is created."""
    told = os.environ.get("MUTOSCOPE_CACHE") or platformdirs.user_cache_dir("mutoscope", appauthor=False)
    return None if told == "off" else Path(told).expanduser()


def folder_name(name: str) -> str:
    """The folder of a set: its name with what Windows cannot store replaced."""
    return name.replace(":", "-")


def installed_models(models_dir: str | Path | None = None) -> list[Installed]:
    """What is in the models folder, in order of name; the starter is not listed."""
    models_dir = Path(models_dir) if models_dir is not None else default_models_dir()
    found = []
    for path in sorted(models_dir.glob(f"*/{MANIFEST}")):
        try:
            manifest = read_manifest(path)
        except FileError as e:
            found.append(Installed(name=path.parent.name, folder=path.parent, manifest=None, problem=str(e)))
            continue
        problem = ""
        try:
            manifest.check_files()
        except FileError as e:
            problem = str(e)
        found.append(Installed(name=manifest.name, folder=path.parent, manifest=manifest, problem=problem))
    return sorted(found, key=lambda i: i.name)


def find_model(name_or_path: str | Path, models_dir: str | Path | None = None) -> ModelManifest:
    """The model of that name ("pocket", or an installed set, quant optional), folder, or model.toml file."""
    manifest = _find(name_or_path, Path(models_dir) if models_dir is not None else default_models_dir())
    manifest.check_files()
    return manifest


def _find(name_or_path: str | Path, models_dir: Path) -> ModelManifest:
    name = str(name_or_path)
    if name == POCKET:
        return read_manifest(Path(__file__).parent / POCKET / MANIFEST)
    installed = installed_models(models_dir)
    wanted = name.lower()
    known: str | None = None
    with suppress(RequestError):
        known = ":".join(parse_name(wanted))
    for model in installed:
        if model.name.lower() in (wanted, known) or model.folder.name.lower() == wanted:
            return model.manifest or read_manifest(model.folder / MANIFEST)  # the second raises its problem
    path = Path(name_or_path)
    if path.is_dir():
        return read_manifest(path / MANIFEST)
    if path.is_file():
        if path.suffix != ".toml":
            raise FileError(
                f"{path}: is not a model.toml.",
                hint="Write one that names the three files, see docs/models.md.",
            )
        return read_manifest(path)
    if known:
        raise RequestError(f"model {known} is not installed.", hint=f"Run: mutoscope pull {known}")
    names = [
        POCKET,
        *(m.name for m in installed),
        *(f.name for f in _FAMILIES),
        *(m.name for m in known_models()),
    ]
    raise RequestError(
        f"no model {name!r}, neither installed nor a folder or model.toml.",
        hint=suggest(wanted, names) or "Run: mutoscope models",
    )
